"""`torch.compile` for training, and the proof that it changes nothing but the time: before the
first step of every process the loss and the gradient of the run's first micro-batch are computed
from the same weights in eager mode and compiled, and compared.

Each decoder layer is compiled by itself, as one graph, so that all layers share it ("regional
compilation" in torch's documentation), with dynamic batch sizes: a new batch is no new graph.
Embeddings, output head and loss stay eager. The compiled layers lie inside of the engine's wrapper.
Evaluation is eager: nothing stays compiled.

Tolerances are relative differences. In float32 compiled code adds in another order: on the
miniatures the loss was off by at most 2e-7 and a parameter's gradient by 3e-6. In bfloat16 it is
told to round where eager mode does, and was off by at most 2e-5 and 1.2e-2; by default it rounds
less often (1.1e-3 and 4e-2). Measured on CPUs alone: docs/methods.md.
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
# The same random numbers and roundings as in eager mode. Passed to the backend, because torch's own
# settings hold for one thread, and a GPU's backward pass is compiled in another.
OPTIONS = {"inductor": {"fallback_random": True, "emulate_precision_casts": True}}
# The most graphs of a layer: few are needed, whatever the batches (tested), and torch's own limit
# of 8 counts those of all layers.
GRAPHS = 64
# By dtype: the loss and the gradient's norm; the gradient itself, the worst parameter's.
TOLERANCES = {"float32": (1e-5, 1e-4), "bfloat16": (5e-3, 5e-2)}
# A parameter's gradient whose norm is below this share of the whole gradient's is compared with
# that share.
NEARLY_ZERO = 1e-3


def expect_compiler(spec: "RunSpec", device: "torch.device") -> None:
    """Raise `EnvironmentFault` where a cell asks for compiled training and the device has no
    compiler here.
    """
    if not (spec.train.compile and spec.train.max_steps):
        return
    if device.type == "cuda":
        from torch.utils._triton import has_triton

        if not has_triton():
            raise EnvironmentFault(
                "'compile: true' needs the package triton and a GPU that it supports: install it, "
                "or train without."
            )
        return
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        raise EnvironmentFault(
            "'compile: true' needs a C++ compiler on a CPU, and none was found: install g++, or "
            "train without."
        ) from None


@contextmanager
def compiled(
    model: "nn.Module", batch: "Batch", dtype: str, record: Callable[[dict[str, Any]], None]
) -> Iterator[None]:
    """Inside, the model's decoder layers are compiled, after a proof on `batch`, which is on the
    model's device; all ranks call it.

    `record` is called with the proof (`Proof` of finrepro.evidence.schema_cell). Weights, buffers,
    gradients and generators are as before. Raises `CellFailed` on every rank when the compiled loss
    or gradient of any rank is too far off, or compilation fails.
    """
    import torch

    from finrepro.methods.layers.supervised import backbone_and_head

    backbone, _ = backbone_and_head(model)
    layers = next(part for part in backbone.modules() if isinstance(part, torch.nn.ModuleList))
    with ExitStack() as until_the_end:
        # Numbers of the model's configuration (epsilon, scale) are constants.
        until_the_end.enter_context(
            torch._dynamo.config.patch(recompile_limit=GRAPHS, specialize_float=True)
        )
        torch._dynamo.reset()  # the graphs of an earlier cell
        until_the_end.callback(torch._dynamo.reset)
        until_the_end.callback(_make_eager, layers)
        try:
            comparison = _compare(model, layers, batch)
        except Exception as error:  # whatever dynamo, a backend or a compiler say
            message = " ".join(str(error).split())[:200]
            comparison = {"error": f"{type(error).__name__}: {message}"}
        record(
            {
                "backend": BACKEND,
                "tolerance": dict(zip(("loss", "gradient"), TOLERANCES[dtype], strict=True)),
                "ranks": _checked(comparison, dtype),
            }
        )
        yield


def _make_eager(layers: "nn.ModuleList") -> None:
    for layer in layers:
        layer._compiled_call_impl = None


def _compare(model: "nn.Module", layers: "nn.ModuleList", batch: "Batch") -> dict[str, Any]:
    """Loss and gradient in eager mode and compiled, their differences, and the seconds of the
    compiled pass, most of which the compiler takes.
    """
    loss, gradient = _pass(model, batch)
    # On the host: a device may have no room for two.
    gradient = [None if tensor is None else tensor.cpu() for tensor in gradient]
    for layer in layers:
        layer.compile(backend=BACKEND, dynamic=True, fullgraph=True, options=OPTIONS.get(BACKEND))
    began = time.monotonic()
    compiled_loss, compiled_gradient = _pass(model, batch)
    seconds = time.monotonic() - began
    norm, compiled_norm = _norm(gradient), _norm(compiled_gradient)
    largest = 0.0
    for eager, compiled in zip(gradient, compiled_gradient, strict=True):
        if eager is not None or compiled is not None:
            distance = (
                math.inf
                if eager is None or compiled is None
                else _norm([compiled.cpu().double() - eager.double()])
            )
            largest = max(largest, _relative(distance, max(_norm([eager]), NEARLY_ZERO * norm)))
    return {
        "loss": loss,
        "compiled_loss": compiled_loss,
        "gradient_norm": norm,
        "compiled_gradient_norm": compiled_norm,
        "off": {
            "loss": _relative(compiled_loss - loss, loss),
            "gradient_norm": _relative(compiled_norm - norm, norm),
            "gradient": largest,
        },
        "seconds": seconds,
    }


def _pass(model: "nn.Module", batch: "Batch") -> "tuple[float, list[Tensor | None]]":
    """Loss and gradient of the trained parameters; the generators are as before."""
    import torch

    from finrepro.methods.layers.supervised import SupervisedLM

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    device = batch.input_ids.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        loss = SupervisedLM(model)(batch)
        # Not `backward`: nothing is added to a gradient, and no engine's hook runs.
        gradient = torch.autograd.grad(loss, trained, allow_unused=True)
    return float(loss.detach()), list(gradient)


def _norm(tensors: "list[Tensor | None]") -> float:
    norms = (float(tensor.detach().double().norm()) for tensor in tensors if tensor is not None)
    return math.hypot(*norms)


def _relative(distance: float, length: float) -> float:
    return 0.0 if distance == 0 else abs(distance) / abs(length) if length else math.inf


def _checked(comparison: dict[str, Any], dtype: str) -> list[dict[str, Any]]:
    """The comparisons of all ranks. Raises `CellFailed` where one is beyond the tolerance; on all
    ranks, since all have the same list.
    """
    import torch.distributed as dist

    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, comparison)
    for rank, result in enumerate(ranks):
        if "error" in result:
            raise CellFailed(f"rank {rank}: the model could not be compiled: {result['error']}")
        if not math.isfinite(result["loss"] + result["gradient_norm"]):
            continue  # eager as well: training reports it
        for quantity, off in result["off"].items():
            allowed = TOLERANCES[dtype][quantity == "gradient"]
            if not off <= allowed:  # also a difference that is no number
                raise CellFailed(
                    f"rank {rank}: compiled code computes something else: {quantity} off by "
                    f"{off:.2g} of its length, {allowed:g} allowed (loss {result['loss']:.8g} "
                    f"eager, {result['compiled_loss']:.8g} compiled; gradient norm "
                    f"{result['gradient_norm']:.8g} and {result['compiled_gradient_norm']:.8g})."
                )
    return ranks
