"""Building a cell's model: load, restructure, prepare, quantize, adapt, freeze - always in this
order, for every method alike.
"""

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from finrepro.catalogue.spec import Model, RunSpec
from finrepro.data.tokenizer_files import check_bounds, tokenizer_digest
from finrepro.errors import EnvironmentFault
from finrepro.kinds import adapter_of, quantizer_of
from finrepro.methods.calibration.cache import stored_in
from finrepro.methods.layers.linear import linear_layers
from finrepro.models import factorize, loading, safetensors
from finrepro.models.before_quantization import first_stage
from finrepro.runtime import ranks
from finrepro.runtime.zero3 import partition
from finrepro.settings import Choice
from finrepro.sizes.shapes import rank

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclass
class Built:
    """A model ready to be trained, and what it is made of."""

    model: nn.Module
    base_parameters: int
    trainable_parameters: int
    base_bytes: int  # as stored, after quantization; of the full base, also where it is sharded


def build(
    spec: RunSpec, base_folder: Path | None, device: torch.device, cache: Path | None = None
) -> Built:
    """The adapted model of a cell on `device`, in training mode, with exactly its adapter's
    parameters trainable.

    Without `base_folder` the base gets random weights from the cell's seed. `cache` is the folder
    where a quantizer keeps what it has searched, for the next cell on the same base. At ZeRO-3 on
    several ranks the base is sharded. Training mode is part of the contract: bitsandbytes' layers
    compute differently in evaluation mode on some CPUs.
    """
    model = skeleton(spec)
    base_parameters = sum(math.prod(shape) for shape in loading.shapes(model).values())
    split = spec.train.zero_stage == 3 and ranks.current().world_size > 1
    finish = partial(partition, device=device) if split else None
    first = first_stage(spec, model)
    with stored_in(cache):
        base_bytes = loading.stream(
            model, source(spec, model, base_folder), spec.quantizer, device, finish, first
        )
    model.requires_grad_(False)
    prepared = [first.prepared] if first else []
    adapted: Any = adapter_of(spec.adapter).apply(model, spec.seed, *prepared)
    if spec.train.activation_checkpointing:
        adapted.gradient_checkpointing_enable(
            gradient_checkpointing_kwargs={"use_reentrant": False}
        )
    adapted.train()
    trainable = sum(
        size(parameter) for parameter in adapted.parameters() if parameter.requires_grad
    )
    return Built(adapted, base_parameters, trainable, base_bytes)


def size(parameter: torch.Tensor) -> int:
    """Elements of a parameter, of the full one where it is sharded."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def configuration(model: Model) -> Any:
    """The transformers configuration of a catalogue entry."""
    from transformers import AutoConfig

    return AutoConfig.for_model(model.family, **model.architecture)


def skeleton(spec: RunSpec) -> Any:
    """The base model of a cell in its dtype, low-rank where its entry says so, without storage,
    without a cache, and with the name that exported files may tell.
    """
    model, low_rank = dense_skeleton(spec), spec.model.low_rank
    return model if low_rank is None else factorize.restructured(model, low_rank, rank(spec.model))


def dense_skeleton(spec: RunSpec) -> Any:
    """As `skeleton`, of the dense model of the same architecture."""
    model = loading.skeleton(configuration(spec.model), getattr(torch, spec.model.dtype))
    # What an exported file calls its base: a name, never a path on this machine.
    model.name_or_path = model.config._name_or_path = (
        spec.model.hub.id if spec.model.hub else spec.model.name
    )
    model.config.use_cache = False
    return model


def source(spec: RunSpec, model: Any, folder: Path | None) -> loading.Source:
    """Where the weights of a cell come from: `folder`, or the cell's seed; for a low-rank model
    decomposed, unless `folder` holds factors.

    The architecture is the catalogue's; the checkpoint gives the weights alone, since its own
    configuration may ask for dropout. Raises `EnvironmentFault` when the weights do not match the
    architecture: none is ever initialised in place of a missing one.
    """
    low_rank = spec.model.low_rank
    factored = low_rank is not None and not (folder and factorize.holds_factors(model, folder))
    filled = dense_skeleton(spec) if factored else model
    weights: loading.Source = (
        loading.Drawn(filled, spec.seed)
        if folder is None
        else loading.Checkpoint(filled, folder, spec.model.name)
    )
    return (
        factorize.Factored(filled, weights, low_rank, spec.seed)
        if factored and low_rank
        else weights
    )


def load(spec: RunSpec, folder: Path | None) -> Any:
    """The base model in full precision on the CPU, in training mode: from `folder`, or randomly
    initialised.

    Raises `EnvironmentFault` as `source` does, and when a file cannot be read.
    """
    model = skeleton(spec)
    loading.stream(model, source(spec, model, folder), None, torch.device("cpu"))
    return model


def quantize(model: Any, quantizer: Choice) -> None:
    """Replace every linear layer of the blocks by its quantized form, one at a time, in place."""
    if quantizer_of(quantizer).linear is not None:
        for name in linear_layers(model):
            loading.quantize_layer(model, name, quantizer)


def load_tokenizer(folder: Path, model: Model | None = None) -> "PreTrainedTokenizerFast":
    """The tokenizer saved in `folder`. Raises `EnvironmentFault` when there is none, or it has
    more tokens than `model` has rows for.
    """
    tokenizer = _saved_tokenizer(folder, tokenizer_digest(folder))
    rows = model.architecture["vocab_size"] if model else len(tokenizer)
    if model and len(tokenizer) > rows:
        raise safetensors.too_many_tokens(folder, model.name, len(tokenizer), rows)
    return tokenizer


@lru_cache(maxsize=8)
def _saved_tokenizer(folder: Path, digest: str | None) -> "PreTrainedTokenizerFast":
    """Read once a process: tokenizers 0.23 keeps 7 MB of every tokenizer that was used, which a
    cell's peak memory would count.
    """
    from transformers import AutoTokenizer

    check_bounds(folder)
    try:
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # whatever the libraries say of a damaged file
        reason = (
            str(error).splitlines()[0]
            if isinstance(error, OSError | ValueError)
            else f"{type(error).__name__} {error}"
        )
        raise EnvironmentFault(f"{folder}: cannot load the tokenizer: {reason}") from None
    ids = tokenizer("a")["input_ids"]
    if ids and ids[-1] == tokenizer.eos_token_id:
        raise EnvironmentFault(
            f"{folder}: the tokenizer appends {tokenizer.eos_token} to every text, so that nothing "
            "can follow a prompt: save it with add_eos_token=False."
        )
    return tokenizer
