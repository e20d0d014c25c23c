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
from _measure import interleaved, write  # noqa: E402
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
BATCH, STEPS, REPEATS = 32, 4, 5  # examples a step, steps a timing, timings


def specs(quantizer: str) -> dict[str, RunSpec]:
    """Adapter -> its cell on this base, of every adapter that can be trained there."""
    found = {}
    for name in reader.table("table3").smoke.axes.adapter:
        only = f"{MODEL}-{quantizer}-{name}-tfns-s0"
        (cell,) = expand(
            Selection("3", full=True, seeds=(0,), only=only, weights="random"), "smoke"
        )
        if cell.refusal is None and cell.spec.train.max_steps:
            found[name] = cell.spec
    return found


def examples(spec: RunSpec, folder: Path) -> list[Encoded]:
    """Enough of the real training set for a timing."""
    tokenizer = embedded_tokenizer(spec, Place(open_store(folder)))
    module, config = kind_module("tasks", spec.tasks[0].task.kind), spec.tasks[0].task.config
    train = files.load(spec.tasks[0].dataset, None).splits["train"][: BATCH * STEPS]
    pairs = [(module.prompt(each, config), module.target(each, config)) for each in train]
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
        made = func(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor):
                self._add(each)
        return made


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
        scale = adapter_of(spec.adapter).lr_scale
        self.engine: Engine = start_engine(
            built.model, settings, self.device, scale, self.hooks.extra_loss
        )
        self.hooks.start(self.engine)

    def one(self, index: int) -> None:
        """One optimizer step."""
        batch = side_by_side(self.rows[index * BATCH : (index + 1) * BATCH])
        supervised = sum(
            each.num_supervised for each in self.rows[index * BATCH : (index + 1) * BATCH]
        )
        optimizer_step(
            self.engine,
            [batch],
            supervised,
            self.device,
            partial(self.hooks.before_step, self.step),
        )
        self.hooks.after_step(self.step)
        self.step += 1

    def several(self) -> None:
        """As many as are timed at once."""
        for index in range(STEPS):
            self.one(index)

    def peak_bytes(self) -> int:
        """The most that tensors take within a step, weights, gradients and moments included."""
        gc.collect()
        states = self.engine.stepped_by.state.values()
        held = [
            *self.model.parameters(),
            *self.model.buffers(),
            *tree_leaves([dict(each) for each in states]),
        ]
        held += [each.grad for each in self.model.parameters()]
        with Counted(each for each in held if isinstance(each, torch.Tensor)) as counted:
            self.one(0)
        return counted.peak


def main() -> None:
    """Both bases."""
    process.setup(0, 2)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for base in BASES:
            wanted = specs(base)
            rows = examples(wanted[BASELINE], Path(folder))
            began = time.perf_counter()
            training = {name: Training(spec, rows) for name, spec in wanted.items()}
            print(f"{base}: {len(training)} models built in {time.perf_counter() - began:.0f} s")
            runs: dict[str, Callable[[], object]] = {
                name: each.several for name, each in training.items()
            }
            seconds = {
                name: [total / STEPS for total in each]
                for name, each in interleaved(runs, REPEATS).items()
            }
            peaks = {name: each.peak_bytes() for name, each in training.items()}
            results[base] = {
                name: {
                    "trained_parameters": each.trained,
                    "seconds_a_step": seconds[name],
                    "peak_bytes": peaks[name],
                    "times_the_seconds": statistics.median(
                        own / lora
                        for own, lora in zip(seconds[name], seconds[BASELINE], strict=True)
                    ),
                    "times_the_memory": peaks[name] / peaks[BASELINE],
                }
                for name, each in training.items()
            }
            for each in training.values():
                each.engine.close()
    summary = {
        base: {
            name: {
                "ms_a_step": round(1000 * statistics.median(each["seconds_a_step"])),
                "times_lora_r8": round(each["times_the_seconds"], 2),
                "peak_MiB": round(each["peak_bytes"] / 2**20),
                "times_memory": round(each["times_the_memory"], 2),
            }
            for name, each in found.items()
        }
        for base, found in results.items()
    }
    write("adapters", {"model": MODEL, "batch": BATCH, "results": results, "summary": summary})


if __name__ == "__main__":
    main()
