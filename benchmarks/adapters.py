"""What each adapter costs beside LoRA of rank 8: seconds an optimizer step, and the most memory of
tensors within one.

One miniature with random weights and the same real batches for all, on a base in float32 and on one
in NF4; forward, backward, update and whatever an adapter does around a step (AdaLoRA's allocation),
in turn. ROSA's factorization, which comes once a period, is timed by itself. Memory is the storage
of every tensor that an operation of torch makes, counted while it lives: it does not depend on an
allocator.
"""

import dataclasses
import gc
import statistics
import tempfile
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finrepro.kinds import adapter_of, kind_module
from finrepro.runtime import process

process.quiet_environment()

import torch  # noqa: E402
from _measure import interleaved, sized, write  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from torch.utils._pytree import tree_leaves  # noqa: E402

from finrepro.catalogue import reader  # noqa: E402
from finrepro.catalogue.cells import expand  # noqa: E402
from finrepro.catalogue.selection import Selection  # noqa: E402
from finrepro.catalogue.spec import RunSpec  # noqa: E402
from finrepro.data import files  # noqa: E402
from finrepro.data.batches import side_by_side  # noqa: E402
from finrepro.data.tokens import Encoded, encode  # noqa: E402
from finrepro.evidence.place import Place  # noqa: E402
from finrepro.evidence.store import open_store  # noqa: E402
from finrepro.models.build import build  # noqa: E402
from finrepro.running.base import embedded_tokenizer  # noqa: E402
from finrepro.training.engines.base import Engine  # noqa: E402
from finrepro.training.engines.start import start_engine  # noqa: E402
from finrepro.training.hooks import Hooks  # noqa: E402
from finrepro.training.loop import optimizer_step  # noqa: E402

MODEL, BASES, BASELINE = "llama3_1_8b_mini", ("none", "nf4"), "lora_r8"
BATCH, STEPS, REPEATS = sized((32, 4, 5), (2, 1, 1))  # examples a step, steps a timing, timings
DRY_ADAPTERS = ("lora_r8", "adalora_r8")  # the second has hooks around a step


def specs(quantizer: str) -> dict[str, RunSpec]:
    """Adapter -> its cell on this base, of every adapter that can be trained there."""
    smoke = reader.table("table3").smoke
    assert smoke is not None
    trainable = {}
    for name in sized(smoke.axes.adapter, DRY_ADAPTERS):
        only = f"{MODEL}-{quantizer}-{name}-tfns-s0"
        (cell,) = expand(
            Selection("3", full=True, seeds=(0,), only=only, weights="random"), "smoke"
        )
        if cell.refusal is None and cell.spec.train.max_steps:
            trainable[name] = cell.spec
    return trainable


def examples(spec: RunSpec, folder: Path) -> list[Encoded]:
    """Enough of the real training set for a timing."""
    tokenizer = embedded_tokenizer(spec, Place(open_store(folder)))
    module, config = kind_module("tasks", spec.tasks[0].task.kind), spec.tasks[0].task.config
    train = files.load(spec.tasks[0].dataset, None).splits["train"][: BATCH * STEPS]
    pairs = [(module.prompt(example, config), module.target(example, config)) for example in train]
    return encode(tokenizer, pairs, spec.train.max_seq_len, end=True)


class Counted(TorchDispatchMode):
    """Counts the bytes of tensors that live, from those it is given and those that operations
    make; `peak` is the most.
    """

    def __init__(self, tensors: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()
        for tensor in tensors:
            self._add(tensor)

    def _add(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self._add(leaf)
        return result


class Training:
    """A cell's training, to be driven a step at a time."""

    def __init__(self, spec: RunSpec, rows: Sequence[Encoded]) -> None:
        self.device = torch.device("cpu")
        built = build(spec, None, self.device)
        self.model, self.trained, self.rows, self.step = (
            built.model,
            built.trainable_parameters,
            rows,
            0,
        )
        settings = dataclasses.replace(
            spec.train, engine="ddp"
        )  # the one that leaves the optimizer's state where it can be counted
        self.hooks = Hooks(spec.adapter, settings.optimizer, built.model, settings.max_steps)
        adapter = adapter_of(spec.adapter)
        self.engine: Engine = start_engine(
            built.model, settings, self.device, adapter.lr_scale, adapter.extra_loss
        )
        self.hooks.start(self.engine)

    def take_step(self, index: int) -> None:
        """One optimizer step."""
        rows = self.rows[index * BATCH : (index + 1) * BATCH]
        optimizer_step(
            self.engine,
            [side_by_side(rows)],
            sum(row.num_supervised for row in rows),
            self.device,
            partial(self.hooks.before_step, self.step),
        )
        self.hooks.after_step(self.step)
        self.step += 1

    def take_steps(self) -> None:
        """As many as are timed at once."""
        for index in range(STEPS):
            self.take_step(index)

    def peak_bytes(self) -> int:
        """The most that tensors take within a step, weights, gradients and moments included."""
        gc.collect()
        states = self.engine.stepped_by.state.values()
        tensors = [
            *self.model.parameters(),
            *self.model.buffers(),
            *tree_leaves([dict(state) for state in states]),
        ]
        tensors += [parameter.grad for parameter in self.model.parameters()]
        with Counted(leaf for leaf in tensors if isinstance(leaf, torch.Tensor)) as counted:
            self.take_step(0)
        return counted.peak


def measured(base: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Adapter -> its costs on this base, raw and beside LoRA's."""
    cells = specs(base)
    rows = examples(cells[BASELINE], folder)
    began = time.perf_counter()
    training = {name: Training(spec, rows) for name, spec in cells.items()}
    print(f"{base}: {len(training)} models built in {time.perf_counter() - began:.0f} s")
    runs: dict[str, Callable[[], object]] = {name: run.take_steps for name, run in training.items()}
    seconds = {
        name: [total / STEPS for total in totals]
        for name, totals in interleaved(runs, REPEATS).items()
    }
    peaks = {name: run.peak_bytes() for name, run in training.items()}
    for run in training.values():
        run.engine.close()
    return {
        name: {
            "trained_parameters": run.trained,
            "seconds_a_step": seconds[name],
            "peak_bytes": peaks[name],
            "times_the_seconds": statistics.median(
                own / lora for own, lora in zip(seconds[name], seconds[BASELINE], strict=True)
            ),
            "times_the_memory": peaks[name] / peaks[BASELINE],
        }
        for name, run in training.items()
    }


def main() -> None:
    """Both bases."""
    process.setup(0, 2)
    with tempfile.TemporaryDirectory() as folder:
        results = {base: measured(base, Path(folder)) for base in BASES}
    summary = {
        base: {
            name: {
                "ms_a_step": round(1000 * statistics.median(costs["seconds_a_step"])),
                "times_lora_r8": round(costs["times_the_seconds"], 2),
                "peak_MiB": round(costs["peak_bytes"] / 2**20),
                "times_memory": round(costs["times_the_memory"], 2),
            }
            for name, costs in by_adapter.items()
        }
        for base, by_adapter in results.items()
    }
    write("adapters", {"model": MODEL, "batch": BATCH, "results": results, "summary": summary})


if __name__ == "__main__":
    main()
