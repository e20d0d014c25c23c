"""Streamed loading: a model is filled with its weights block by block, each linear layer quantized
at once, so that no host holds the full-precision model.

The model is built on the meta device. Its modules are then filled in the model's own order, from
the files of a checkpoint or by the family's own initialisation, moved to their device, quantized,
and passed to `finish` (which shards them at ZeRO-3). At any time one block is in full precision.
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
from finrepro.models.configuration import compare_configuration
from finrepro.runtime import memory
from finrepro.runtime.finite import is_finite
from finrepro.settings import Choice

# Tensors of old checkpoints that are no weights: GPT-2's causal mask, Llama's rotary frequencies,
# both computed from the configuration.
NOT_WEIGHTS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
FULL_PRECISION = ("F64", "F32", "F16", "BF16")


@runtime_checkable
class Source(Protocol):
    """Where weights come from."""

    def fill(self, prefix: str, module: nn.Module, device: torch.device) -> None:
        """Give every meta parameter of `module`, the model's submodule `prefix`, its value.

        `device` is the module's final one: values may be put there at once, or left on the CPU.
        """


def skeleton(config: Any, dtype: torch.dtype) -> Any:
    """The model of a transformers configuration: parameters on the meta device, buffers (rotary
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


def in_order(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """(name, module) in the model's order: each block of its stack, and each module before or
    after the stack.
    """
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) or any(
            isinstance(inner, nn.ModuleList) for inner in child.modules()
        ):
            yield from in_order(child, f"{prefix}{name}.")
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

    `prepare` is called with the name of each linear layer of the blocks when its weight is loaded
    and not yet quantized; it may change the weight's values. Tied weights are one parameter
    afterwards. Raises what the source and `prepare` raise.
    """
    tied: dict[str, str] = dict(model.all_tied_weights_keys)  # target -> source of the same tensor
    layers = list(linear_layers(model))
    is_quantized = quantizer is not None and quantizer_of(quantizer).linear is not None
    total = 0
    for prefix, module in in_order(model):
        for target in [target for target in tied if target.startswith(f"{prefix}.")]:
            place(model, target, model.get_parameter(tied[target]))
        new = [parameter for parameter in module.parameters() if parameter.is_meta]
        source.fill(prefix, module, device)
        module.to(device)
        total += sum(parameter.numel() * parameter.element_size() for parameter in new)
        for name in [name for name in layers if name.startswith(f"{prefix}.")]:
            if prepare is not None:
                prepare(name)
            if not is_quantized:
                continue
            weight = model.get_submodule(name).weight
            total -= weight.numel() * weight.element_size()
            del weight
            assert quantizer is not None
            total += quantize_layer(model, name, quantizer)
            memory.release_freed()
        del new
        if finish is not None and any(True for _ in module.parameters()):
            finish(module)
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
    """Set the parameter `name` of `model`, a dotted path, to this one."""
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

    def fill(self, prefix: str, module: nn.Module, device: torch.device) -> None:  # noqa: ARG002
        """As in `Source`; the values stay on the CPU. A block is initialised after its layers:
        GPT-2's rescales two of them.
        """
        if not any(parameter.is_meta for parameter in module.parameters()):
            return
        for name, parameter in list(module.named_parameters()):
            place(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.set_rng_state(self._state)
            module.apply(self._initialise)
            self._state = torch.get_rng_state()


class Checkpoint:
    """The safetensors of a folder. Names are those of the hub: with the model's own prefix or
    without.

    Raises `EnvironmentFault`, before any tensor is read, when a tensor is missing, unexpected, of
    another shape or not in full precision; when it is read, if it is not finite.
    """

    def __init__(self, model: Any, folder: Path, name: str) -> None:
        compare_configuration(name, model.config.model_type, model.config.to_dict(), folder)
        self._folder, self._name = folder, name
        # the model's name of a parameter -> its name in the checkpoint, and where it is
        self._entries: dict[str, tuple[str, safetensors.Entry]] = {}
        unused = {
            key: entry
            for key, entry in safetensors.tensors(folder).items()
            if not key.endswith(NOT_WEIGHTS)
        }
        prefix, tied = f"{model.base_model_prefix}.", dict(model.all_tied_weights_keys)
        for key, shape in shapes(model).items():
            twins = [target for target, source in tied.items() if source == key]
            names = [
                name_in_file
                for name_in_file in dict.fromkeys((key, key.removeprefix(prefix), *twins))
                if name_in_file in unused
            ]
            if not names:
                raise EnvironmentFault(
                    f"the checkpoint in {folder} is not {name}: it has no tensor {key}."
                )
            entry = unused[names[0]]
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
                self._expect_equal(names[0], entry, twin, unused[twin])
            self._entries[key] = names[0], entry
            for name_in_file in names:
                del unused[name_in_file]
        if unused:
            extra = min(unused)
            raise EnvironmentFault(
                f"the checkpoint in {folder} is not {name}: "
                f"unexpected tensor {extra} of shape {list(unused[extra].shape)}."
            )

    def fill(self, prefix: str, module: nn.Module, device: torch.device) -> None:
        """As in `Source`. The files are mapped anew for each module, since mapped pages count as
        this process's memory.
        """
        from safetensors import SafetensorError, safe_open

        with ExitStack() as opened:
            handles: dict[Path, Any] = {}
            for name, parameter in list(module.named_parameters()):
                if not parameter.is_meta:
                    continue
                key, entry = self._entries[f"{prefix}.{name}"]
                value = torch.empty_like(parameter, device=device)
                try:
                    if entry.path not in handles:
                        handles[entry.path] = opened.enter_context(
                            safe_open(entry.path, framework="pt")
                        )
                    # also casts to the model's dtype
                    value.copy_(handles[entry.path].get_tensor(key))
                except (OSError, SafetensorError, RuntimeError) as error:
                    raise EnvironmentFault(
                        f"{entry.path}: cannot read {key}: {str(error).splitlines()[0]}"
                    ) from None
                if not is_finite(value):  # also a number too large for the model's dtype
                    reason = f"{key} holds NaN or an infinity as {value.dtype}"
                    raise EnvironmentFault(f"{entry.path}: {reason}.")
                place(module, name, nn.Parameter(value))

    def _expect_equal(
        self, key: str, entry: safetensors.Entry, twin: str, twin_entry: safetensors.Entry
    ) -> None:
        """Raises `EnvironmentFault` when two tensors that the model ties differ in the file."""
        if entry.shape != twin_entry.shape or not torch.equal(
            _read(entry, key), _read(twin_entry, twin)
        ):
            raise EnvironmentFault(
                f"the checkpoint in {self._folder} is not {self._name}: "
                f"{key} and {twin} differ, {self._name} ties them."
            )


def _read(entry: safetensors.Entry, key: str) -> Tensor:
    from safetensors import safe_open

    with safe_open(entry.path, framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
        return tensor.clone()
