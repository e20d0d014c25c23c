"""Training on windows of running text is training on their documents' pieces, and an interrupted
run goes on where it was.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.corpora import random_documents, stream_of
from fixtures.model import broken

from finrepro.catalogue.cells import Selection, expand
from finrepro.catalogue.spec import RunSpec
from finrepro.data.batches import side_by_side
from finrepro.data.corpora.mixture import Mixture
from finrepro.data.corpora.windows import Piece, Window, Windows
from finrepro.data.tokens import Encoded
from finrepro.errors import Interrupted, UsageError
from finrepro.kinds import optimizer_of
from finrepro.methods.layers.supervised import SupervisedLM
from finrepro.models.build import build
from finrepro.runtime import process
from finrepro.training.checkpoint import Control
from finrepro.training.loop import train
from finrepro.training.progress import Trained
from finrepro.training.schedule import learning_rate

CPU = torch.device("cpu")
STEPS = 3


@pytest.fixture(autouse=True)
def _setup() -> None:
    process.quiet_environment()
    process.setup(0, 2)


@pytest.fixture(scope="module")
def windows(tmp_path_factory: pytest.TempPathFactory) -> Windows:
    return Windows(stream_of(tmp_path_factory.mktemp("c") / "corpus", random_documents(0, 12)), 16)


def spec_of(**changes: Any) -> RunSpec:
    spec = expand(Selection("3", only="gpt2*-none-full-tfns-*", weights="random"), "smoke")[0].spec
    few = {
        "max_steps": STEPS,
        "warmup_steps": 1,
        "global_batch_size": 4,
        "max_tokens": 40,
        "layout": "bins",
    }
    return dataclasses.replace(spec, train=dataclasses.replace(spec.train, **few | changes))


def trained_on(
    data: Sequence[Window], folder: Path, stop: Callable[[], bool] = lambda: False, **changes: Any
) -> Trained:
    spec = spec_of(**changes)
    return train(
        build(spec, None, CPU).model,
        data,
        spec,
        CPU,
        Control([].append, stop, folder, checkpoint_seconds=1e9),
    )


def alone(piece: Piece) -> Encoded | None:
    """The piece as an example by itself, None where it learns nothing."""
    ids = [*piece.ids.tolist(), *([] if piece.successor is None else [piece.successor])]
    return Encoded(tuple(ids), 1) if len(ids) > 1 else None


def training_is_on_the_pieces(losses: Sequence[float], windows: Windows) -> None:
    """A loop without DeepSpeed, one piece a forward pass."""
    spec = spec_of()
    model = build(spec, None, CPU).model
    lm, settings = SupervisedLM(model), spec.train
    trainable = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    optimizer = optimizer_of(settings.optimizer).build(trainable, settings.lr)
    expected = []
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, settings)
        examples_of_step = [windows[row] for row in windows.rows(step, 4, spec.seed)]
        examples = [alone(piece) for window in examples_of_step for piece in window.pieces]
        supervised = sum(window.num_supervised for window in examples_of_step)
        loss = sum(lm(side_by_side([each])) for each in examples if each) / supervised
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in trainable], settings.max_grad_norm)
        optimizer.step()
        expected.append(float(loss.detach()))
    assert all(math.isclose(a, b, rel_tol=1e-5) for a, b in zip(losses, expected, strict=True)), (
        losses,
        expected,
    )


def test_the_loop_trains_on_the_pieces_and_goes_on_where_it_was(
    windows: Windows, tmp_path: Path
) -> None:
    uninterrupted = trained_on(windows, tmp_path / "a")
    losses = [row["loss"] for row in uninterrupted.losses]
    training_is_on_the_pieces(losses, windows)
    broken(training_is_on_the_pieces, losses[::-1], windows)
    rows = [row for step in range(STEPS) for row in windows.rows(step, 4, 0)]
    assert uninterrupted.supervised_tokens == sum(windows[row].num_supervised for row in rows)
    assert (
        uninterrupted.tokens
        == uninterrupted.computed_tokens
        == sum(windows.lengths[row] for row in rows)
    ), "no padding"
    with pytest.raises(Interrupted):
        trained_on(windows, tmp_path / "b", stop=lambda: True)
    again = trained_on(windows, tmp_path / "b")
    assert [row["loss"] for row in again.losses] == losses


def test_a_mixture_trains_as_its_windows_do_and_padding_is_refused(
    windows: Windows, tmp_path: Path
) -> None:
    mixture = Mixture({"a": windows, "b": windows}, {"a": 1, "b": 3})
    assert np.isfinite(
        [row["loss"] for row in trained_on(mixture, tmp_path / "a", max_steps=1).losses]
    ).all()
    with pytest.raises(UsageError, match="need the layout 'bins'"):
        trained_on(windows, tmp_path / "b", layout="padded")
