"""Filling a model with its weights as they arrive: block by block, each linear layer quantized at
once, so that no host holds it whole.

The model is built without storage. Its parts are then filled in the model's own order, from the
files of a checkpoint or by the family's own initialisation, put on their device, quantized, and
handed to `finish` (at ZeRO-3 it keeps this rank's share). At any time one part is there in full
precision, beside what is already stored.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from finrepro.errors import EnvironmentFault
from finrepro.kinds import quantizer_of
from finrepro.methods.layers import isolated_attention
from finrepro.methods.layers.linear import is_conv1d, linear_layers
from finrepro.models import safetensors
from finrepro.runtime import memory
from finrepro.settings import Choice

# Tensors of old checkpoints that are no weights: GPT-2's causal mask, Llama's rotary frequencies,
# both computed from the configuration.
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
FULL_PRECISION = ("F64", "F32", "F16", "BF16")


@runtime_checkable
class Source(Protocol):
    """Where weights come from."""

    def fill(self, prefix: str, part: nn.Module, device: torch.device) -> None:
        """Give every parameter of `part`, which the model calls `prefix`, its value; those with
        storage are left alone.

        `device` is where the part will live: values may be put there at once, or left on the CPU.
        """


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The model of a transformers configuration: parameters without storage, buffers (rotary
    frequencies) computed.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_init_weights
    from transformers.utils import logging

    logging.disable_progress_bar()
    isolated_attention.register()
    with (
        torch.random.fork_rng(devices=[]),
        init_empty_weights(include_buffers=False),
        no_init_weights(),
    ):
        return AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation=isolated_attention.NAME
        )


def shapes(model: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every parameter of a `skeleton`, tied ones once."""
    tied = model.all_tied_weights_keys
    return {
        name: tuple(parameter.shape)
        for name, parameter in model.named_parameters()
        if name not in tied
    }


def parts(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) in the model's order: each block of its stack, and whatever stands before,
    between and behind it.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) or any(
            isinstance(inner, nn.ModuleList) for inner in child.modules()
        ):
            yield from parts(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", child


def stream(
    model: Any,
    source: Source,
    quantizer: Choice | None,
    device: torch.device,
    finish: Callable[[nn.Module], None] | None = None,
    prepare: Callable[[str], None] | None = None,
) -> int:
    """Fill a `skeleton` in place; the bytes of its parameters as stored, quantized layers with
    their scales.

    `prepare` is called with the name of each linear layer of the blocks when its weight is there
    and not yet quantized; it may change the weight's values. Tied weights are one parameter
    afterwards. Raises what the source and `prepare` raise.
    """
    tied: dict[str, str] = dict(model.all_tied_weights_keys)  # target -> source of the same tensor
    layers = list(linear_layers(model))
    rounds = quantizer is not None and quantizer_of(quantizer).linear is not None
    total = 0
    for prefix, part in parts(model):
        for target in [target for target in tied if target.startswith(f"{prefix}.")]:
            place(model, target, model.get_parameter(tied[target]))
        new = [parameter for parameter in part.parameters() if parameter.is_meta]
        source.fill(prefix, part, device)
        part.to(device)
        total += sum(parameter.numel() * parameter.element_size() for parameter in new)
        for name in [name for name in layers if name.startswith(f"{prefix}.")]:
            if prepare is not None:
                prepare(name)
            if not rounds:
                continue
            weight = model.get_submodule(name).weight
            total -= weight.numel() * weight.element_size()
            del weight
            assert quantizer is not None
            total += quantize_layer(model, name, quantizer)
            memory.release_freed()
        del new
        if finish is not None and any(True for _ in part.parameters()):
            finish(part)
            memory.release_freed()
    return total


def quantize_layer(model: Any, name: str, quantizer: Choice) -> int:
    """Replace one linear layer by its quantized form in place; the bytes of its weight as
    stored.
    """
    method, layer = quantizer_of(quantizer), model.get_submodule(name)
    assert method.linear is not None, "this quantizer leaves layers as they are"
    weight = layer.weight.detach()
    stored = method.encode(weight.T.contiguous() if is_conv1d(layer) else weight)
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, method.linear(stored, layer.bias))
    return method.stored_bytes(stored)


def place(model: Any, name: str, parameter: nn.Parameter) -> None:
    """Make `parameter` the one that `model` calls `name`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, parameter)


class Drawn:
    """Random weights: the family's own initialisation, in Transformers' own order, under a private
    generator state.

    They are drawn on the CPU, so that a seed means the same bits whatever the device.
    """

    def __init__(self, model: Any, seed: int) -> None:
        self._initialise = model._init_weights
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._state = torch.get_rng_state()

    def fill(self, prefix: str, part: nn.Module, device: torch.device) -> None:  # noqa: ARG002  (as in `Source`)
        """As in `Source`, but on the CPU: whoever asked moves it. A block is initialised after
        its layers: GPT-2's rescales two of them.
        """
        if not any(parameter.is_meta for parameter in part.parameters()):
            return
        for name, parameter in list(part.named_parameters()):
            place(part, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.set_rng_state(self._state)
            part.apply(self._initialise)
            self._state = torch.get_rng_state()


class Checkpoint:
    """The safetensors of a folder. Names are those of the hub: with the model's own prefix or
    without.

    Raises `EnvironmentFault`, before any tensor is read, when a tensor is missing, unexpected, of
    another shape or not in full precision.
    """

    def __init__(self, model: Any, folder: Path, name: str) -> None:
        safetensors.compare_configuration(
            name, model.config.model_type, model.config.to_dict(), folder
        )
        self._folder, self._name = folder, name
        self._entries: dict[
            str, tuple[str, safetensors.Entry]
        ] = {}  # the model's name -> the file's name, and where it is
        found = {
            key: each
            for key, each in safetensors.tensors(folder).items()
            if not key.endswith(NOT_WEIGHTS)
        }
        prefix, tied = f"{model.base_model_prefix}.", dict(model.all_tied_weights_keys)
        for key, shape in shapes(model).items():
            twins = [target for target, kept in tied.items() if kept == key]
            names = [
                each
                for each in dict.fromkeys((key, key.removeprefix(prefix), *twins))
                if each in found
            ]
            if not names:
                raise EnvironmentFault(
                    f"the checkpoint in {folder} is not {name}: it has no tensor {key}."
                )
            entry = found[names[0]]
            if entry.shape != shape:
                raise safetensors.another(
                    folder, name, f"the shape of {names[0]}", list(entry.shape), list(shape)
                )
            if entry.dtype not in FULL_PRECISION:
                raise safetensors.another(
                    folder,
                    name,
                    f"the dtype of {names[0]}",
                    entry.dtype,
                    " or ".join(FULL_PRECISION),
                )
            for twin in names[1:]:
                self._expect_equal(names[0], entry, twin, found[twin])
            self._entries[key] = names[0], entry
            for each in names:
                del found[each]
        if found:
            extra = min(found)
            raise EnvironmentFault(
                f"the checkpoint in {folder} is not {name}: "
                f"unexpected tensor {extra} of shape {list(found[extra].shape)}."
            )

    def fill(self, prefix: str, part: nn.Module, device: torch.device) -> None:
        """As in `Source`. The files are mapped and let go with each part: their pages count as
        this process's memory while they are.
        """
        from safetensors import SafetensorError, safe_open

        with ExitStack() as opened:
            handles: dict[Path, Any] = {}
            for name, parameter in list(part.named_parameters()):
                if not parameter.is_meta:
                    continue
                key, entry = self._entries[f"{prefix}.{name}"]
                value = torch.empty_like(parameter, device=device)
                try:
                    if entry.path not in handles:
                        handles[entry.path] = opened.enter_context(
                            safe_open(entry.path, framework="pt")
                        )
                    value.copy_(
                        handles[entry.path].get_tensor(key)
                    )  # also casts to the model's dtype
                except (OSError, SafetensorError, RuntimeError) as error:
                    raise EnvironmentFault(
                        f"{entry.path}: cannot read {key}: {str(error).splitlines()[0]}"
                    ) from None
                place(part, name, nn.Parameter(value))

    def _expect_equal(
        self, key: str, entry: safetensors.Entry, twin: str, other: safetensors.Entry
    ) -> None:
        """Tensors that are one in the model must be one in the file: `EnvironmentFault` if two
        values are given.
        """
        if entry.shape != other.shape or not torch.equal(_read(entry, key), _read(other, twin)):
            raise EnvironmentFault(
                f"the checkpoint in {self._folder} is not {self._name}: "
                f"{key} and {twin} differ, {self._name} ties them."
            )


def _read(entry: safetensors.Entry, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(entry.path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor.clone()
