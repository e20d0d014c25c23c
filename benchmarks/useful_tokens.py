"""How many of the tokens that go through the model are real, and examples a second, for four ways
to lay out a batch.

Side by side on a Llama miniature, forward and backward over the same examples: fixed padding to
`max_seq_len`, dynamic padding of shuffled batches of 8, length-sorted token-budget batches, and the
bins of finrepro.data.packing with isolated attention. TFNS, and FPB where FINREPRO_DATA_DIR has it.
"""

import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from finrepro.kinds import kind_module
from finrepro.runtime import process

process.quiet_environment()

import numpy as np  # noqa: E402
from _measure import interleaved, ratios, sized, write  # noqa: E402
from _text import data_dir  # noqa: E402

from finrepro.catalogue.cells import expand  # noqa: E402
from finrepro.catalogue.selection import Selection  # noqa: E402
from finrepro.data import files, packing  # noqa: E402
from finrepro.data.batches import COLLATE, Batch, side_by_side  # noqa: E402
from finrepro.data.tokens import Encoded, encode  # noqa: E402
from finrepro.evidence.place import Place  # noqa: E402
from finrepro.evidence.store import open_store  # noqa: E402
from finrepro.methods.layers.supervised import SupervisedLM  # noqa: E402
from finrepro.models.build import build  # noqa: E402
from finrepro.running.base import embedded_tokenizer  # noqa: E402

MAX_SEQ_LEN, BUDGET, EXAMPLES, REPEATS = sized((256, 4096, 768, 3), (256, 512, 4, 1))
CELL = "llama3_1_8b_mini-none-full-{}-*"


def fixed(examples: Sequence[Encoded]) -> Batch:
    """Every row padded to `MAX_SEQ_LEN`, by a row of that length that is cut off again: no
    supervised token is added.
    """
    filler = Encoded((0,) * MAX_SEQ_LEN, MAX_SEQ_LEN)
    batch = side_by_side([*examples, filler])
    keep = len(examples)
    return Batch(batch.input_ids[:keep], batch.position_ids, batch.positions, batch.targets)


def layouts(rows: list[int], lengths: list[int]) -> dict[str, tuple[list[list[int]], Any]]:
    """Name -> (micro-batches, collate)."""
    eights = [rows[i : i + 8] for i in range(0, len(rows), 8)]
    return {
        "fixed_padding": (eights, fixed),
        "dynamic_padding_8": (eights, side_by_side),
        "length_sorted": (packing.padded(rows, lengths, BUDGET), COLLATE["padded"]),
        "bins": (packing.bins(rows, lengths, BUDGET), COLLATE["bins"]),
    }


def computed(batches: list[list[int]], lengths: list[int], name: str) -> int:
    """Tokens that go through the model."""
    if name == "fixed_padding":
        return MAX_SEQ_LEN * sum(map(len, batches))
    return packing.computed_tokens(batches, lengths, "bins" if name == "bins" else "padded")


def measure(task: str, folder: Path) -> dict[str, Any]:
    """One dataset."""
    spec = expand(Selection("3", only=CELL.format(task), weights="random"), "smoke")[0].spec
    device = process.setup(0, spec.threads)
    tokenizer = embedded_tokenizer(spec, Place(open_store(folder)))
    module, config = kind_module("tasks", spec.tasks[0].task.kind), spec.tasks[0].task.config
    train = files.load(spec.tasks[0].dataset, data_dir()).splits["train"]
    pairs = [(module.prompt(example, config), module.target(example, config)) for example in train]
    encoded = encode(tokenizer, pairs, MAX_SEQ_LEN, end=True)
    lengths = [len(example.ids) for example in encoded]
    order = np.random.default_rng(0).permutation(len(encoded)).tolist()
    epoch = layouts(order, lengths)
    share = {
        name: sum(lengths) / computed(batches, lengths, name)
        for name, (batches, _) in epoch.items()
    }
    share["bins_of_fixed_size"] = sum(lengths) / (BUDGET * len(epoch["bins"][0]))
    lm = SupervisedLM(build(spec, None, device).model)
    losses: dict[str, float] = {}

    def forward_and_backward(name: str, batches: list[list[int]], collate: Any) -> None:
        lm.zero_grad()
        total = 0.0
        for batch in batches:
            loss = lm(collate([encoded[row] for row in batch]))
            loss.backward()
            total += float(loss.detach())
        losses[name] = total

    few = layouts(order[:EXAMPLES], lengths)
    runs: dict[str, Callable[[], object]] = {
        name: partial(forward_and_backward, name, batches, collate)
        for name, (batches, collate) in few.items()
    }
    seconds = interleaved(runs, REPEATS)
    return {
        "task": task,
        "examples": len(encoded),
        "mean_tokens": float(np.mean(lengths)),
        "useful_token_share": share,
        "timed_examples": EXAMPLES,
        "seconds": seconds,
        "examples_per_second": {
            name: EXAMPLES / float(np.median(times)) for name, times in seconds.items()
        },
        "times_faster_than_fixed": {
            name: ratios(seconds["fixed_padding"], seconds[name]) for name in seconds
        },
        "summed_loss": losses,
    }


def main() -> None:
    """TFNS, and FPB where it is."""
    tasks = ["tfns", "fpb"] if data_dir() else ["tfns"]
    with tempfile.TemporaryDirectory() as folder:
        results = [measure(task, Path(folder)) for task in tasks]
    measures = ("useful_token_share", "examples_per_second", "summed_loss")
    write(
        "useful_tokens",
        {
            "results": results,
            "summary": {r["task"]: {key: r[key] for key in measures} for r in results},
        },
    )


if __name__ == "__main__":
    main()
