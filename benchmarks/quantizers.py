"""What four 4-bit quantizers do to weights whose distribution is known: error, entropy of the
codes, and seconds a million weights.

NF4 and FP4 against ICQ, which moves each block for the entropy of its codes, and its control, which
moves it for the squared error, on normal weights and on Student's t with 5 degrees of freedom.
Drawn as docs/screenshots/quantizers.svg, or beside the JSON where that goes elsewhere.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from finrepro import PROJECT
from finrepro.kinds import kind_module
from finrepro.runtime import memory, process

process.quiet_environment()

import numpy as np  # noqa: E402
import torch  # noqa: E402
from _measure import RESULTS, interleaved, output_folder, sized, write  # noqa: E402

from finrepro.catalogue import reader  # noqa: E402
from finrepro.reporting.dots import Dot, Panel, draw, to_svg  # noqa: E402

QUANTIZERS, BASELINE = ("nf4", "fp4", "icq", "icq_mse"), "nf4"
ROWS, COLUMNS, BLOCK, REPEATS = sized((1024, 1024, 64, 3), (8, 256, 64, 1))
DISTRIBUTIONS = {"normal": "Normal weights", "student_t5": "Student's t, 5 degrees of freedom"}
MEASURES = {
    "entropy_bits": "entropy of a block's codes, bits",
    "squared_error": "squared error of a block over the weights' mean square",
}


def weights(distribution: str) -> torch.Tensor:
    """(ROWS, COLUMNS), the same at every call."""
    generator = np.random.default_rng(0)
    shape = ROWS, COLUMNS
    drawn = (
        generator.standard_normal(shape)
        if distribution == "normal"
        else generator.standard_t(5, size=shape)
    )
    return torch.from_numpy(drawn.astype(np.float32))


def entropies(packed: torch.Tensor) -> np.ndarray:
    """Of each block's 16-valued codes, in bits."""
    codes = torch.stack([packed.flatten() >> 4, packed.flatten() & 15], 1).view(-1, BLOCK).numpy()
    shares = np.stack([(codes == code).mean(1) for code in range(16)], 1)
    return -(shares * np.log2(shares, where=shares > 0, out=np.zeros_like(shares))).sum(1)


def measured(name: str, weight: torch.Tensor) -> dict[str, np.ndarray]:
    """Measure -> a value a block."""
    choice = reader.quantizer(name, "float32")
    module = kind_module("quantizers", choice.kind)
    stored = module.encode(weight, choice.config)
    error = (module.decode(stored) - weight).double().square().view(-1, BLOCK).mean(
        1
    ) / weight.double().square().mean()
    return {
        "entropy_bits": entropies(getattr(stored, "moved", stored).codes),
        "squared_error": error.numpy(),
    }


def peak_mib(name: str, weight: torch.Tensor) -> int:
    """Memory that encoding takes above what is held before it."""
    choice = reader.quantizer(name, "float32")
    memory.reset_peak_memory(torch.device("cpu"))
    before = memory.peak_memory_bytes(torch.device("cpu"))
    kind_module("quantizers", choice.kind).encode(weight, choice.config)
    return round((memory.peak_memory_bytes(torch.device("cpu")) - before) / 2**20)


def main() -> None:
    """Measure, time, draw."""
    process.setup(0, 2)
    blocks: dict[str, dict[str, dict[str, np.ndarray]]] = {
        drawn: {name: measured(name, weights(drawn)) for name in QUANTIZERS}
        for drawn in DISTRIBUTIONS
    }
    raw: dict[str, Any] = {}
    for drawn, by_quantizer in blocks.items():
        base = by_quantizer[BASELINE]
        raw[drawn] = {
            name: {
                "mean_entropy_bits": round(float(values["entropy_bits"].mean()), 4),
                "mean_squared_error": round(float(values["squared_error"].mean()), 6),
                "blocks_with_less_entropy_than_nf4": round(
                    float((values["entropy_bits"] < base["entropy_bits"] - 1e-9).mean()), 4
                ),
                "squared_error_over_nf4s": round(
                    float(values["squared_error"].mean() / base["squared_error"].mean()), 4
                ),
            }
            for name, values in by_quantizer.items()
        }
    weight = weights("normal")
    runs: dict[str, Callable[[], object]] = {}
    for name in QUANTIZERS:
        choice = reader.quantizer(name, "float32")
        encode = kind_module("quantizers", choice.kind).encode
        runs[name] = partial(encode, weight, choice.config)
    times = interleaved(runs, REPEATS)
    summary: dict[str, Any] = {
        "seconds_per_million_weights": {
            name: round(min(rounds) / weight.numel() * 1e6, 3) for name, rounds in times.items()
        },
        "peak_mib_above_the_weight": {
            f"{copies} x {ROWS} x {COLUMNS}": peak_mib("icq", weight.repeat(copies, 1))
            for copies in (1, 4)
        },
        **raw,
    }
    write(
        "quantizers",
        {"blocks": ROWS * COLUMNS // BLOCK, "repeats": REPEATS, "raw": times, "summary": summary},
    )
    target = output_folder()
    is_result = target.resolve() == RESULTS.resolve()
    folder = PROJECT / "docs" / "screenshots" if is_result else target
    panels = [
        Panel(
            title, axis, None, tuple(dot(name, blocks[drawn][name][measure]) for name in QUANTIZERS)
        )
        for drawn, title in DISTRIBUTIONS.items()
        for measure, axis in MEASURES.items()
    ]
    caption = (
        f"4-bit quantizers on {ROWS * COLUMNS // BLOCK:,} blocks of {BLOCK} weights: the mean, and "
        "where 9 of 10 blocks lie"
    )
    (folder / "quantizers.svg").write_text(to_svg(draw(panels, caption)))


def dot(name: str, values: np.ndarray) -> Dot:
    """The mean over blocks and the middle 90 % of them."""
    low, high = np.quantile(values, [0.05, 0.95])
    return Dot(name, name, float(values.mean()), float(low), float(high), weak=False)


if __name__ == "__main__":
    main()
