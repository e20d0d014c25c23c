"""Building a cell's model: load, quantize, adapt, freeze - always in this order, for every method alike."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finrepro.errors import EnvironmentFault
from finrepro.layers import isolated_attention
from finrepro.layers.linear import is_conv1d, linear_layers
from finrepro.schema import Choice
from finrepro.spec import Model, RunSpec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Built:
    """A model ready to be trained, and what it is made of."""

    model: nn.Module
    base_parameters: int
    trainable_parameters: int
    base_bytes: int  # as stored, after quantization


def build(spec: RunSpec, base_folder: Path | None, device: torch.device) -> Built:
    """The adapted model of a cell on `device`, in training mode, with exactly its adapter's parameters trainable.

    Without `base_folder` the base gets random weights from the cell's seed.
    Training mode is part of the contract: bitsandbytes' layers compute differently in evaluation mode on some CPUs.
    """
    model: Any = load(spec, base_folder)
    base_parameters = sum(parameter.numel() for parameter in model.parameters())
    quantize(model, spec.quantizer)
    model = model.to(device)
    base_bytes = sum(stored_bytes(parameter) for parameter in model.parameters())
    model.requires_grad_(False)
    model = spec.adapter.module("adapters").apply(model, spec.adapter.config, spec.seed)
    if spec.train.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return Built(model, base_parameters, trainable, base_bytes)


def configuration(model: Model) -> Any:
    """The transformers configuration of a catalogue entry."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model.family, **model.architecture)


def load(spec: RunSpec, folder: Path | None) -> Any:
    """The base model in its dtype: from `folder`, or randomly initialised under a private generator state.

    The catalogue says what the model is, not the checkpoint's own configuration, which may ask for dropout; it gives the weights alone.
    Raises `EnvironmentFault` when they cannot be read, or are not those of this architecture: no weight is ever made up.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    isolated_attention.register()
    dtype = getattr(torch, spec.model.dtype)
    config = configuration(spec.model)
    kwargs = {"dtype": dtype, "attn_implementation": isolated_attention.NAME}
    if folder is None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(spec.seed)
            model: Any = AutoModelForCausalLM.from_config(config, **kwargs)
    else:
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                config=config,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                **kwargs,
            )
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise EnvironmentFault(f"{folder}: cannot load the model: {str(error).splitlines()[0]}") from None
        for what in ("missing_keys", "unexpected_keys"):
            if found[what]:
                raise EnvironmentFault(
                    f"{folder}: not the weights of {spec.model.name}: {len(found[what])} {what.replace('_', ' ')}, "
                    f"among them {min(found[what])}."
                )
    # What an exported file calls its base: a name, never a path on this machine.
    model.name_or_path = model.config._name_or_path = spec.model.hub.id if spec.model.hub else spec.model.name
    model.config.use_cache = False
    return model


def quantize(model: Any, quantizer: Choice) -> None:
    """Replace every linear layer of the blocks by its quantized form, one at a time, in place."""
    module = quantizer.module("quantizers")
    if module.linear is None:
        return
    for name, layer in linear_layers(model).items():
        weight = layer.weight.detach()
        stored = module.encode(weight.T.contiguous() if is_conv1d(layer) else weight, quantizer.config)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module.linear(stored, layer.bias))


def stored_bytes(parameter: torch.Tensor) -> int:
    """Bytes of a parameter as it lies in memory, a quantized one with its scales."""
    state = getattr(parameter, "quant_state", None)
    size = parameter.numel() * parameter.element_size()
    if state is None:
        return size
    scales = [state.absmax, *([state.state2.absmax] if state.nested else [])]
    return size + sum(scale.numel() * scale.element_size() for scale in scales)


def load_tokenizer(folder: Path) -> "PreTrainedTokenizerFast":
    """The tokenizer saved in `folder`. Raises `EnvironmentFault` when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, json.JSONDecodeError) as error:
        raise EnvironmentFault(f"{folder}: cannot load the tokenizer: {str(error).splitlines()[0]}") from None
