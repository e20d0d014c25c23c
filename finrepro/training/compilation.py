"""`torch.compile` for training, and the proof that it changes nothing but the time: before the
first step of every process the loss and the gradient of the run's first micro-batch are computed
twice from the same weights, as written and compiled, and compared.

Each decoder layer is compiled by itself, whole, so that all share one code ("regional compilation"
in torch's documentation), with the sizes of a batch left open: a new batch is no new code.
Embeddings, output head and loss are not compiled. What is compiled lies inside of whatever engine
drives the model. Evaluation runs as written: nothing stays compiled.

Tolerances are of relative differences. In float32 compiled code adds in another order: on the
miniatures the loss was off by at most 2e-7 and a parameter's gradient by 3e-6. In bfloat16 it is
told to round where the model as written does, and was off by at most 2e-5 and 1.2e-2; left to
itself it rounds less (1.1e-3 and 4e-2). Measured on CPUs alone: docs/methods.md.
"""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from finrepro.errors import CellFailed, EnvironmentFault

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from finrepro.catalogue.spec import RunSpec
    from finrepro.data.batches import Batch

BACKEND = "inductor"
# The same random numbers and roundings as without. Handed to the backend: torch's own settings hold
# for one thread, and a GPU's backward pass is compiled in another.
OPTIONS = {"inductor": {"fallback_random": True, "emulate_precision_casts": True}}
# the most codes of a layer: few are needed, whatever the batches (tested), and torch's own limit of
# 8 counts all layers
GRAPHS = 64
# By dtype: the loss and the gradient's norm; the gradient itself, the worst parameter's.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 5e-2)}
# a parameter's gradient shorter than this share of the whole one is measured against that share
NEARLY_ZERO = 1e-3


def expect_compiler(spec: "RunSpec", device: "torch.device") -> None:
    """Raise `EnvironmentFault` where a cell asks for compiled training, and there is nothing
    here that compiles for the device.
    """
    if not (spec.train.compile and spec.train.max_steps):
        return
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise EnvironmentFault(
                "'compile: true' needs the package triton and a GPU that it supports: install it, or train without."
            )
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise EnvironmentFault(
            "'compile: true' needs a C++ compiler on a CPU, and none was found: install g++, or train without."
        ) from None


@contextmanager
def compiled(
    model: "nn.Module", batch: "Batch", dtype: str, keep: Callable[[dict[str, Any]], None]
) -> Iterator[None]:
    """Inside, the model's decoder layers are compiled and proven on `batch`, which lies on the
    model's device; all ranks call it.

    `keep` gets the proof: what was compared, by rank, and the tolerances. Weights, buffers,
    gradients and generators are as before. Raises `CellFailed` on every rank when one's compiled
    loss or gradient is too far off, or is not to be had.
    """
    import torch

    from finrepro.methods.layers.supervised import backbone_and_head

    backbone, _ = backbone_and_head(model)
    layers = next(each for each in backbone.modules() if isinstance(each, torch.nn.ModuleList))
    with ExitStack() as until_the_end:
        # Numbers of the model's configuration (epsilon, scale) are constants.
        until_the_end.enter_context(
            torch._dynamo.config.patch(recompile_limit=GRAPHS, specialize_float=True)
        )
        torch._dynamo.reset()  # the codes of an earlier cell
        until_the_end.callback(torch._dynamo.reset)
        until_the_end.callback(_as_written, layers)
        try:
            found = _compare(model, layers, batch)
        except Exception as error:  # whatever dynamo, a backend or a compiler say
            said = " ".join(str(error).split())[:200]
            found = {"error": f"{type(error).__name__}: {said}"}
        keep(
            {
                "backend": BACKEND,
                "tolerance": dict(zip(("loss", "gradient"), TOLERANCES[dtype], strict=True)),
                "ranks": _judged(found, dtype),
            }
        )
        yield


def _as_written(layers: "nn.ModuleList") -> None:
    for layer in layers:
        layer._compiled_call_impl = None


def _compare(model: "nn.Module", layers: "nn.ModuleList", batch: "Batch") -> dict[str, Any]:
    """Loss and gradient as written and compiled, what separates them, and the seconds of the
    compiled pass, most of them the compiler's.
    """
    loss, gradient = _pass(model, batch)
    gradient = [
        None if each is None else each.cpu() for each in gradient
    ]  # a device has no room for two
    for layer in layers:
        layer.compile(backend=BACKEND, dynamic=True, fullgraph=True, options=OPTIONS.get(BACKEND))
    began = time.monotonic()
    other_loss, other = _pass(model, batch)
    seconds = time.monotonic() - began
    norm, other_norm = _length(gradient), _length(other)
    worst = 0.0
    for mine, theirs in zip(gradient, other, strict=True):
        if mine is not None or theirs is not None:
            distance = (
                math.inf
                if mine is None or theirs is None
                else _length([theirs.cpu().double() - mine.double()])
            )
            worst = max(worst, _relative(distance, max(_length([mine]), NEARLY_ZERO * norm)))
    return {
        "loss": loss,
        "compiled_loss": other_loss,
        "gradient_norm": norm,
        "compiled_gradient_norm": other_norm,
        "off": {
            "loss": _relative(other_loss - loss, loss),
            "gradient_norm": _relative(other_norm - norm, norm),
            "gradient": worst,
        },
        "seconds": seconds,
    }


def _pass(model: "nn.Module", batch: "Batch") -> "tuple[float, list[Tensor | None]]":
    """Loss and gradient of the trained parameters, from generators that are put back."""
    import torch

    from finrepro.methods.layers.supervised import SupervisedLM

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = batch.input_ids.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        loss = SupervisedLM(model)(batch)
        # Not `backward`: nothing is added to a gradient, and no engine's hook runs.
        gradient = torch.autograd.grad(loss, trained, allow_unused=True)
    return float(loss.detach()), list(gradient)


def _length(tensors: "list[Tensor | None]") -> float:
    return math.hypot(
        *(float(each.detach().double().norm()) for each in tensors if each is not None)
    )


def _relative(distance: float, length: float) -> float:
    return 0.0 if distance == 0 else abs(distance) / abs(length) if length else math.inf


def _judged(found: dict[str, Any], dtype: str) -> list[dict[str, Any]]:
    """What every rank found. Raises `CellFailed` where one's is not to be trusted; on all ranks,
    since all see the same.
    """
    import torch.distributed as dist

    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, found)
    for rank, each in enumerate(ranks):
        if "error" in each:
            raise CellFailed(f"rank {rank}: the model could not be compiled: {each['error']}")
        if not math.isfinite(each["loss"] + each["gradient_norm"]):
            continue  # also as written: training says so
        for what, off in each["off"].items():
            allowed = TOLERANCES[dtype][what == "gradient"]
            if not off <= allowed:  # also a difference that is no number
                raise CellFailed(
                    f"rank {rank}: compiled code computes something else: {what} off by {off:.2g} of its length, {allowed:g} allowed "
                    f"(loss {each['loss']:.8g} as written, {each['compiled_loss']:.8g} compiled; "
                    f"gradient norm {each['gradient_norm']:.8g} and {each['compiled_gradient_norm']:.8g})."
                )
    return ranks
