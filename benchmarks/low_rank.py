"""A GPT-2 block, dense against low-rank, forward and backward on a CPU: the speed-up, and the share
of the one that its operations allow.

Dense is a block of `nn.Linear`; GPT-2's own Conv1D is measured beside it, and the four linear
layers without the rest of the block. Norms, activation and attention take time that no operation of
the bound stands for: the layers alone show what the factors do. 416 stands beside 413, the rank of
the paper's compression, because matrix kernels like multiples of 16. Candidates run in turn on one
thread, whose processor time is counted: the one clock that does not count a machine's other work. A
CPU computes slowly next to its memory and cannot show where a GPU's memory becomes the limit, so
the roofline ceiling of two GPUs stands beside each rank (finrepro/budgeting/roofline.py), and
whether they follow.
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from finrepro.runtime import process

process.quiet_environment()

import torch  # noqa: E402
from _measure import interleaved, ratios, sized, write  # noqa: E402
from torch import nn  # noqa: E402

from finrepro.budgeting import roofline as roof  # noqa: E402
from finrepro.budgeting.hardware import gpu as catalogue_gpu  # noqa: E402
from finrepro.methods.layers.linear import linear_layers  # noqa: E402
from finrepro.methods.layers.low_rank import like  # noqa: E402

GPUS = {name: catalogue_gpu(name) for name in ("h100", "h200")}
WIDTHS, RANKS = sized(((1024, 1600), (64, 128, 256, 413, 416, 512)), ((128,), (16, 128)))
BATCH, SEQ, REPEATS, THREADS = sized((4, 256, 4, 1), (1, 8, 1, 1))
TOKENS = 8192  # of the roofline: a micro-batch of eight sequences of 1,024
GOAL, GOAL_RANK = 0.8, 128  # the share of the operations' speed-up, from this rank
FOLLOWS = 0.9  # a GPU follows where its ceiling is at least this share of what the operations allow


def model(width: int) -> Any:
    """One block of GPT-2 between small embeddings, randomly initialised."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    # The activation is GPT-2's function in one kernel, for every candidate.
    settings = {"activation_function": "gelu_pytorch_tanh"} | {
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "attn_implementation": "sdpa",
    }
    return GPT2LMHeadModel(
        GPT2Config(n_layer=1, n_embd=width, n_head=width // 64, vocab_size=64, **settings)
    )


def block(width: int, rank: int | None, conv1d: bool = False) -> nn.Module:
    """Its block: as it is, of `nn.Linear`, or with every linear layer factored."""
    dense = model(width)
    layers = {} if conv1d else linear_layers(dense)
    for name, layer in layers.items():
        new = like(layer, rank)
        for parameter in new.parameters():
            nn.init.normal_(parameter, std=0.02)
        dense.set_submodule(name, new)
    first: nn.Module = dense.transformer.h[0]
    return first


class LinearLayers(nn.Module):
    """The linear layers of a block alone, each with an input of its own width."""

    def __init__(self, block: Any, width: int) -> None:
        super().__init__()
        self.narrow = nn.ModuleList([block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc])
        self.wide: nn.Module = block.mlp.c_proj
        self.width = width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of their outputs' means; `x` is (batch, seq, 4 width)."""
        outputs = [layer(x[..., : self.width]) for layer in self.narrow] + [self.wide(x)]
        return torch.stack([output.mean() for output in outputs])


def step(module: nn.Module, x: torch.Tensor) -> None:
    """Forward and backward, with the gradient of the input, which every block but the first
    passes on.
    """
    module.zero_grad(set_to_none=True)
    out = module(x.detach().requires_grad_(True))
    (out[0] if isinstance(out, tuple) else out).square().mean().backward()


def operations(width: int, rank: int | None) -> int:
    """Floating-point operations of the block's forward pass a token: linear layers, and
    attention over SEQ positions.
    """
    linear = 24 * width * width if rank is None else 32 * width * rank
    return linear + 4 * SEQ * width


def roofline(width: int, rank: int) -> dict[str, float]:
    """Ceilings of the block's four linear layers together, by GPU."""
    sizes = ((width, 3 * width), (width, width), (width, 4 * width), (4 * width, width))
    ceilings = {"operations": round(0.75 * width / rank, 2)}
    for name, gpu in GPUS.items():
        dense = sum(roof.seconds(gpu, TOKENS, *size) for size in sizes)
        for key, fused in (("", False), (" fused", True)):
            factored = sum(roof.factored_seconds(gpu, *size, rank, TOKENS, fused) for size in sizes)
            ceilings[f"{name}{key}"] = round(dense / factored, 2)
    return ceilings


def measured(width: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Raw seconds by block, and their summary."""
    x = torch.randn(BATCH, SEQ, width)
    blocks = {"linear": block(width, None), "conv1d": block(width, None, conv1d=True)}
    blocks |= {f"r{rank}": block(width, rank) for rank in RANKS}
    runs: dict[str, Callable[[], object]] = {
        name: partial(step, module, x) for name, module in blocks.items()
    }
    wide = torch.randn(BATCH, SEQ, 4 * width)
    layers = {
        f"{name} layers": LinearLayers(module, width)
        for name, module in blocks.items()
        if name != "conv1d"
    }
    runs |= {name: partial(step, module, wide) for name, module in layers.items()}
    times = interleaved(runs, REPEATS, time.process_time)
    conv = ratios(times["linear"], times["conv1d"])["median"]
    summary: dict[str, Any] = {
        "dense_seconds": round(statistics.median(times["linear"]), 4),
        "conv1d_speedup": round(conv, 3),
    }
    for rank in RANKS:
        bound = operations(width, None) / operations(width, rank)
        speedup = ratios(times["linear"], times[f"r{rank}"])
        gpus = roofline(width, rank)
        alone = ratios(times["linear layers"], times[f"r{rank} layers"])["median"]
        summary[f"r{rank}"] = {
            "speedup": round(speedup["median"], 3),
            "speedup_min_max": [round(speedup["min"], 3), round(speedup["max"], 3)],
            "bound_by_operations": round(bound, 3),
            "share_of_bound": round(speedup["median"] / bound, 3),
            "linear_layers_alone": {
                "speedup": round(alone, 3),
                "share": round(alone / (0.75 * width / rank), 3),
            },
            "gpu_ceiling_of_the_linear_layers": gpus,
            "gpus_that_follow": [
                name for name in GPUS if gpus[name] >= FOLLOWS * gpus["operations"]
            ],
        }
    return times, summary


def main() -> None:
    """Measure both widths and write the summary."""
    process.setup(0, THREADS)
    began, raw, summary = time.monotonic(), {}, {}
    for width in WIDTHS:
        raw[f"d{width}"], summary[f"d{width}"] = measured(width)
    shares = [
        summary[f"d{width}"][f"r{rank}"]["share_of_bound"]
        for width in WIDTHS
        for rank in RANKS
        if rank >= GOAL_RANK
    ]
    layers = {
        "768x768": (768, 768),
        "768x3072": (768, 3072),
        "1600x1600": (1600, 1600),
        "1600x6400": (1600, 6400),
    }
    summary["goal"] = {
        "share_of_bound": GOAL,
        "from_rank": GOAL_RANK,
        "least_found": min(shares),
        "met": min(shares) >= GOAL,
    }
    summary["gpu_ceiling_by_layer"] = {
        name: {
            f"r{rank}": {
                gpu_name: round(roof.low_rank(gpu, *size, rank, TOKENS).two_products, 2)
                for gpu_name, gpu in GPUS.items()
            }
            | {"operations": round(size[0] * size[1] / (rank * sum(size)), 2)}
            for rank in RANKS
        }
        for name, size in layers.items()
    }
    facts: dict[str, Any] = {
        "batch": BATCH,
        "seq": SEQ,
        "threads": THREADS,
        "repeats": REPEATS,
        "roofline_tokens": TOKENS,
    }
    facts |= {
        "ridge_operations_per_byte": {name: round(roof.ridge(gpu)) for name, gpu in GPUS.items()}
    }
    write(
        "low_rank",
        {**facts, "seconds": round(time.monotonic() - began), "raw": raw, "summary": summary},
    )


if __name__ == "__main__":
    main()
