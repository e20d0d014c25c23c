"""What recomputing activations saves and costs in pretraining, for a dense GPT-2 and one of
factored layers: memory by phase, time, FLOPs.

Everything is beside the dense model without recomputation. Memory is measured in a process of its
own a configuration, in which the C library gives back at once what is freed (it keeps it otherwise,
and the phases would run into one another), above what the process holds once a tiny model has been
trained: libraries are no part of it. What is kept for backward is counted at autograd's own hooks,
every storage once, parameters left out. Steps are timed in turn on one thread, by processor time:
the one clock that does not count a machine's other work. FLOPs are computed (finrepro.sizes.flops),
with attention in full.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from finrepro.runtime import memory as memory_runtime
from finrepro.runtime import process

process.quiet_environment()

import torch  # noqa: E402
from _measure import DRY_OPTION, interleaved, sized, write  # noqa: E402

from finrepro.catalogue import reader, resolve  # noqa: E402
from finrepro.catalogue.selection import Selection  # noqa: E402
from finrepro.catalogue.spec import Model, RunSpec  # noqa: E402
from finrepro.data.batches import end_to_end  # noqa: E402
from finrepro.data.tokens import Encoded  # noqa: E402
from finrepro.evaluation.log_likelihood import text_log_likelihoods  # noqa: E402
from finrepro.methods.layers.supervised import SupervisedLM  # noqa: E402
from finrepro.models.build import build  # noqa: E402
from finrepro.runtime.phases import Phases  # noqa: E402
from finrepro.sizes import flops  # noqa: E402
from finrepro.sizes.shapes import rank  # noqa: E402
from finrepro.training.engines.start import start_engine  # noqa: E402
from finrepro.training.loop import optimizer_step  # noqa: E402

BLOCKS, WIDTH, VOCABULARY, ROWS, TOKENS = sized((8, 512, 2048, 4, 512), (2, 64, 64, 2, 16))
COMPRESSION, STEPS, REPEATS, THREADS = sized((2.6, 3, 3, 1), (2.65, 2, 1, 1))
CPU = torch.device("cpu")
CHILD, PLAIN = "--memory-of", "dense"
CONFIGURATIONS = {
    PLAIN: (False, False),
    "dense, recomputed": (False, True),
    "low-rank": (True, False),
    "low-rank, recomputed": (True, True),
}


def model_of(low_rank: bool, blocks: int = BLOCKS, width: int = WIDTH) -> Model:
    """The architecture, dense or with every linear layer of the blocks factored."""
    entry = reader.model("gpt2_1_5b_deep_mini_lr")
    sizes = {
        "n_layer": blocks,
        "n_embd": width,
        "n_head": width // 64,
        "n_positions": TOKENS,
        "vocab_size": VOCABULARY,
    }
    assert entry.low_rank is not None
    factored = dataclasses.replace(entry.low_rank, compression=COMPRESSION) if low_rank else None
    return dataclasses.replace(
        entry, architecture={**entry.architecture, **sizes}, low_rank=factored
    )


def spec_of(model: Model, recomputed: bool) -> RunSpec:
    """Table 2's smoke cell with this model."""
    cell = resolve.spec_of_label(
        Selection(table="2", full=True),
        "smoke",
        "gpt2_1_5b_deep_mini_lr-none-full-wikitext2_text-adamw-s0",
    )
    train = dataclasses.replace(
        cell.train, activation_checkpointing=recomputed, engine="ddp", max_seq_len=TOKENS
    )
    return dataclasses.replace(cell, model=model, train=train)


class Training:
    """A model and its optimizer, to be driven a step at a time over the same rows of random
    tokens.
    """

    def __init__(self, spec: RunSpec) -> None:
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator).tolist()
        self.rows = [Encoded(tuple(row), 1) for row in ids]
        built = build(spec, None, CPU)
        self.model, self.parameters = built.model, built.trainable_parameters
        self.engine = start_engine(self.model, spec.train, CPU)

    def step(self, before_update: Callable[[], None] = lambda: None) -> None:
        """Forward, backward and update."""
        optimizer_step(
            self.engine, [end_to_end(self.rows)], ROWS * (TOKENS - 1), CPU, before_update
        )

    def kept_bytes(self) -> int:
        """What a forward pass keeps for backward, every storage once, without the parameters."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            # Autograd keeps it until backward: no other gets its address.
            saved[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = SupervisedLM(self.model)(end_to_end(self.rows))
        saved_bytes = sum(size for address, size in saved.items() if address not in own)
        del loss
        return saved_bytes


def memory(name: str) -> dict[str, Any]:
    """Peak bytes by phase of a configuration, above those of the process; what the first step
    alone needs; what is kept for backward.
    """
    low_rank, recomputed = CONFIGURATIONS[name]
    tiny = Training(spec_of(model_of(False, 2, 64), recomputed))
    for _ in range(2):
        tiny.step()
    text_log_likelihoods(tiny.model, tiny.rows, ROWS * TOKENS)
    tiny.engine.close()
    del tiny
    memory_runtime.reset_peak_memory(CPU)
    before = memory_runtime.peak_memory_bytes(CPU)
    phases = Phases(CPU, "load")
    training = Training(spec_of(model_of(low_rank), recomputed))
    first: dict[str, Any] = {}
    for step in range(STEPS):
        phases.begin("backward")
        training.step(lambda: phases.begin("step"))
        first = first if step else phases.costs()
    phases.begin("evaluate")
    text_log_likelihoods(training.model, training.rows, ROWS * TOKENS)
    phases.begin("save")
    with tempfile.TemporaryDirectory() as folder:
        training.engine.save(Path(folder), "step", {})
    peaks = phases.costs()
    above = [{phase: peak - before for phase, peak in costs.items()} for costs in (peaks, first)]
    return {
        "parameters": training.parameters,
        "bytes_before": before,
        "peaks": above[0],
        "peaks_to_the_end_of_the_first_step": above[1],
        "kept_for_backward_bytes": training.kept_bytes(),
    }


def memory_in_a_process(name: str) -> dict[str, Any]:
    """`memory` of a configuration in a process that holds nothing else."""
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": str(THREADS)}
    call = [sys.executable, __file__, CHILD, name, *DRY_OPTION]
    printed = subprocess.run(
        call, env=environment, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    return dict(json.loads(printed.splitlines()[-1]))


def main() -> None:
    """Memory a configuration, then the times of all in turn."""
    process.setup(0, THREADS)
    began = time.monotonic()
    results = {name: memory_in_a_process(name) for name in CONFIGURATIONS}
    print(f"memory measured in {time.monotonic() - began:.0f} s", flush=True)
    runs: dict[str, Callable[[], object]] = {
        name: Training(spec_of(model_of(low), again)).step
        for name, (low, again) in CONFIGURATIONS.items()
    }
    seconds = interleaved(runs, REPEATS, time.process_time)
    summary: dict[str, Any] = {}
    for name, (low_rank, recomputed) in CONFIGURATIONS.items():
        costs, plain = results[name], results[PLAIN]
        costs["seconds_a_step"] = seconds[name]
        costs["flops_a_step"] = (
            ROWS
            * TOKENS
            * flops.training(model_of(low_rank), TOKENS, checkpointing=recomputed).total
        )
        summary[name] = {
            "parameters": costs["parameters"],
            "MiB": {key: round(peak / 2**20, 1) for key, peak in costs["peaks"].items()},
            "kept_for_backward_MiB": round(costs["kept_for_backward_bytes"] / 2**20, 1),
            "seconds_a_step": round(statistics.median(seconds[name]), 2),
            "GFLOP_a_step": round(costs["flops_a_step"] / 1e9, 1),
            "times_dense": {
                **{
                    key: round(peak / plain["peaks"][key], 3)
                    for key, peak in costs["peaks"].items()
                },
                "kept_for_backward": round(
                    costs["kept_for_backward_bytes"] / plain["kept_for_backward_bytes"], 3
                ),
                "seconds": round(
                    statistics.median(
                        a / b for a, b in zip(seconds[name], seconds[PLAIN], strict=True)
                    ),
                    3,
                ),
                "flops": round(costs["flops_a_step"] / plain["flops_a_step"], 3),
            },
        }
    facts = {
        "blocks": BLOCKS,
        "width": WIDTH,
        "vocabulary": VOCABULARY,
        "rows": ROWS,
        "tokens_a_row": TOKENS,
        "rank": rank(model_of(True)),
        "dtype": "float32",
        "engine": "ddp",
        "threads": THREADS,
    }
    write(
        "recomputation",
        {
            **facts,
            "seconds": round(time.monotonic() - began),
            "results": results,
            "summary": summary,
        },
    )


if __name__ == "__main__":
    if sys.argv[1:2] == [CHILD]:
        process.setup(0, THREADS)
        print(json.dumps(memory(sys.argv[2])))
    else:
        main()
