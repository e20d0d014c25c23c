"""What compiled training costs and saves: the compiler's seconds, how far loss and gradient are
off, and the time of a step beside training as written. On a GPU in its own dtype where there is
one, else on one CPU thread with the miniature sizes below.

Both models hold the same weights and take the same batches in turn; the batches have different
shapes, as training's have, and are gone through twice before the clock starts, so that every code
is there. Steps are whole: forward, backward, update.
"""

import dataclasses
import json
import os
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal

from finrepro.runtime import process

process.quiet_environment()
os.environ["TORCHINDUCTOR_FORCE_DISABLE_CACHES"] = (
    "1"  # the compiler's seconds are those of the first time
)

import torch  # noqa: E402
from _measure import interleaved, ratios, sized, write  # noqa: E402
from torch._dynamo.utils import counters  # noqa: E402

from finrepro.catalogue import reader, resolve  # noqa: E402
from finrepro.catalogue.selection import Selection  # noqa: E402
from finrepro.catalogue.spec import Model, RunSpec  # noqa: E402
from finrepro.data.batches import COLLATE, Batch  # noqa: E402
from finrepro.data.tokens import Encoded  # noqa: E402
from finrepro.models.build import build  # noqa: E402
from finrepro.training import compilation  # noqa: E402
from finrepro.training.engines.start import start_engine  # noqa: E402
from finrepro.training.loop import optimizer_step  # noqa: E402

CUDA = torch.cuda.is_available()
BLOCKS, WIDTH, VOCABULARY, LONGEST, TOKENS = sized(
    (12, 2048, 32000, 512, 8192) if CUDA else (4, 256, 2048, 128, 1024), (1, 64, 64, 32, 64)
)
HEAD_WIDTH = sized(64, 16)
DTYPE: Literal["float32", "bfloat16"] = "bfloat16" if CUDA else "float32"
BATCHES, REPEATS, THREADS = sized((4, 5, 1), (2, 1, 1))
Layout = Literal["padded", "bins"]
COMBINATIONS: tuple[tuple[str, str, Layout], ...] = (
    ("gpt2", "full", "padded"),
    ("llama", "full", "bins"),
    ("llama", "lora_r8", "padded"),
    ("llama", "lora_r8", "bins"),
)
CONFIGURATIONS = {
    f"{family}, {adapter}, {layout}": (family, adapter, layout)
    for family, adapter, layout in sized(COMBINATIONS, COMBINATIONS[-1:])
}


def model_of(family: str) -> Model:
    """A catalogue's miniature of the family, in this benchmark's size."""
    heads = WIDTH // HEAD_WIDTH
    entry = reader.model({"gpt2": "gpt2_127m_mini", "llama": "llama3_1_8b_mini"}[family])
    sizes = (
        {"n_layer": BLOCKS, "n_embd": WIDTH, "n_head": heads, "n_positions": LONGEST}
        if family == "gpt2"
        else {
            "num_hidden_layers": BLOCKS,
            "hidden_size": WIDTH,
            "intermediate_size": 3 * WIDTH,
            "num_attention_heads": heads,
            "num_key_value_heads": heads // 2,
        }
    )
    architecture = {**entry.architecture, **sizes, "vocab_size": VOCABULARY}
    return dataclasses.replace(entry, architecture=architecture, dtype=DTYPE)


def spec_of(family: str, adapter: str, layout: Layout) -> RunSpec:
    """Table 3's smoke cell with this model, in this layout."""
    cell = resolve.spec_of_label(
        Selection(table="3", full=True), "smoke", f"llama3_1_8b_mini-none-{adapter}-tfns-s0"
    )
    engine: Any = "deepspeed" if adapter == "full" and CUDA else "ddp"
    train = dataclasses.replace(cell.train, layout=layout, engine=engine)
    return dataclasses.replace(cell, model=model_of(family), train=train, weights="random")


def batches_of(layout: Layout, device: torch.device) -> list[Batch]:
    """Of random tokens and lengths, about `TOKENS` each, an answer of four tokens an example."""
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(BATCHES):
        rows, size = [], 0
        while size < TOKENS:
            length = int(torch.randint(LONGEST // 4, LONGEST, (), generator=generator))
            ids = torch.randint(VOCABULARY, (length,), generator=generator).tolist()
            rows.append(Encoded(tuple(ids), length - 4))
            size += length
        batches.append(COLLATE[layout](rows).to(device))
    return batches


def stepper(
    spec: RunSpec, batches: list[Batch], device: torch.device
) -> tuple[Any, Callable[[], None]]:
    """A model of the cell, and a round of steps over the batches."""
    model = build(spec, None, device).model
    engine = start_engine(model, spec.train, device)

    def steps() -> None:
        for batch in batches:
            optimizer_step(engine, [batch], len(batch.targets), device)
        if CUDA:
            torch.cuda.synchronize()

    return model, steps


def main() -> None:
    """Each configuration: the proof, then steps in turn."""
    device = process.setup(0, THREADS)
    began = time.monotonic()
    results: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    for name, (family, adapter, layout) in CONFIGURATIONS.items():
        spec, batches = spec_of(family, adapter, layout), batches_of(layout, device)
        _, as_written = stepper(spec, batches, device)
        model, compiled = stepper(spec, batches, device)
        proofs: list[Any] = []
        counters.clear()
        with ExitStack() as until_the_end:
            until_the_end.enter_context(
                compilation.compiled(model, batches[0], DTYPE, proofs.append)
            )
            compiled()
            seconds = interleaved({"as written": as_written, "compiled": compiled}, REPEATS)
        codes = counters["stats"]["unique_graphs"]
        proof = proofs[0]["ranks"][0]
        results[name] = {
            "seconds_a_round": seconds,
            "proof": proof,
            "codes": codes,
            "batches": BATCHES,
        }
        summary[name] = {
            "ms_a_step": {
                mode: round(1e3 * statistics.median(rounds) / BATCHES, 1)
                for mode, rounds in seconds.items()
            },
            "times_faster": round(ratios(seconds["as written"], seconds["compiled"])["median"], 3),
            "compiler_seconds": round(proof["seconds"], 1),
            "off": {quantity: float(f"{off:.2g}") for quantity, off in proof["off"].items()},
            "codes": codes,
        }
        print(name, json.dumps(summary[name]), flush=True)
    facts = {
        "device": torch.cuda.get_device_name() if CUDA else "cpu",
        "dtype": DTYPE,
        "blocks": BLOCKS,
        "width": WIDTH,
        "vocabulary": VOCABULARY,
        "tokens_a_batch": TOKENS,
        "backend": compilation.BACKEND,
        "threads": THREADS,
    }
    write(
        "compilation",
        {
            **facts,
            "seconds": round(time.monotonic() - began),
            "results": results,
            "summary": summary,
        },
    )


if __name__ == "__main__":
    main()
