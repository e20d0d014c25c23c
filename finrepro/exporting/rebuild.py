"""The model of a finished run, made again: its base as it was stored, and what it has trained on
top.
"""

import dataclasses
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from finrepro.catalogue.spec import RunSpec
from finrepro.data.tokenizer_files import tokenizer_digest, version_of
from finrepro.errors import EnvironmentFault
from finrepro.evidence.place import Place
from finrepro.exporting.layout import changed_base
from finrepro.exporting.recorded import RecordedRun
from finrepro.kinds import adapter_of, quantizer_of
from finrepro.methods.adapters.peft_folder import (
    WEIGHTS,
    check_every_tensor_is_finite,
    check_every_tensor_is_used,
)
from finrepro.methods.layers.linear import is_conv1d, linear_layers
from finrepro.models import loading
from finrepro.models.build import build, load_tokenizer, skeleton, source
from finrepro.running.base import base_facts, open_base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PROMPTS = (
    "What is the sentiment of this news? Operating profit rose to EUR 13.1 mn from EUR 8.7 mn in "
    "the same quarter a year ago.",
    "$TSLA shares fall 4 % in early trading; analysts cut their price target.\nSentiment:",
    "The",
)


@dataclass(frozen=True)
class StartingPoint:
    """What a run started from: the folder of its base (None: weights from its seed, or none
    needed), and its tokenizer.
    """

    folder: Path | None
    tokenizer: "PreTrainedTokenizerFast"


def starting_point(recorded: RecordedRun, place: Place, export_format: str) -> StartingPoint:
    """Find the base as for training, and hold it against what the run recorded of it.

    A run that has trained a whole model needs its base for the tokenizer alone, and not where the
    tokenizer lies with the weights. Raises `EnvironmentFault` when something is missing, or is not
    what the run was trained on.
    """
    spec, data = recorded.spec, recorded.result["data"]
    if recorded.is_whole_model and export_format != "base" and tokenizer_digest(recorded.weights):
        return StartingPoint(None, load_tokenizer(recorded.weights))
    folder, tokenizer, _ = open_base(spec, place)
    facts, recorded_facts = base_facts(spec, place.store, folder), data.get("base") or {}
    for key in ("run_id", "weights", "files"):
        if key in recorded_facts and facts.get(key) != recorded_facts[key]:
            raise EnvironmentFault(
                f"run {recorded.run_id} was trained on another base than the one that is here "
                f"({folder}): '{key}' is not what its result.json says."
            )
    digest = (data.get("tokenizer") or {}).get("sha256")
    if folder is not None and digest and tokenizer_digest(folder, version_of(digest)) != digest:
        raise EnvironmentFault(
            f"{folder}: the tokenizer is not the one that run {recorded.run_id} used."
        )
    return StartingPoint(folder, tokenizer)


@contextmanager
def on_its_base(recorded: RecordedRun) -> Iterator[RecordedRun]:
    """The run with its adapter as it stands on the base that it was trained on, where its file
    is for another one.
    """
    if changed_base(recorded.spec) is None:
        yield recorded
        return
    with tempfile.TemporaryDirectory() as folder:
        weights = adapter_of(recorded.spec.adapter).on_own_base(recorded.weights, Path(folder))
        yield dataclasses.replace(recorded, elsewhere=weights)


def base_model(recorded: RecordedRun, start: StartingPoint, device: torch.device) -> Any:
    """The frozen base, as the run stored it; of a run that has trained a whole model, the
    untrained one.
    """
    spec = recorded.spec
    if changed_base(spec):
        return stripped(build(spec, start.folder, device).model)
    model = skeleton(spec)
    loading.stream(model, source(spec, model, start.folder), spec.quantizer, device)
    return model.requires_grad_(False).eval()


def trained_model(recorded: RecordedRun, base: Any, device: torch.device) -> Any:
    """The run's model: `base` with the run's adapter on it, or the whole model that the run has
    trained (`base` is not looked at).
    """
    if recorded.is_whole_model:
        model = skeleton(recorded.spec)
        loading.stream(model, source(recorded.spec, model, recorded.weights), None, device)
        return model.requires_grad_(False).eval()
    return adapted(recorded.spec, base, recorded.weights).eval()


def adapted(spec: RunSpec, base: Any, folder: Path) -> Any:
    """`base` with the adapter in `folder` on it, by the method's own reader or by PEFT's."""
    read = adapter_of(spec.adapter).read
    return read(base, folder) if read else read_peft(base, folder)


def read_peft(base: Any, folder: Path) -> Any:
    """`base` with a PEFT folder on it. Raises `EnvironmentFault` when tensors are missing or
    left over.
    """
    import peft

    device = next(base.parameters()).device
    with quiet_peft():
        model = peft.PeftModel.from_pretrained(
            base, folder, is_trainable=False, torch_device=str(device)
        )
    check_every_tensor_is_used(model, folder)
    check_every_tensor_is_finite(folder / WEIGHTS)
    return model.eval()


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without what PEFT says of an adapter that fits a layer which lies the other way round, and
    of keys, which are checked here.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
        warnings.filterwarnings("ignore", message="Found missing adapter keys")
        warnings.filterwarnings(
            "ignore", message="Specified to not"
        )  # VeRA's matrices, drawn again from their key
        warnings.filterwarnings(
            "ignore", message=".*rank_pattern keys did not match.*lora_E"
        )  # PEFT's own words for AdaLoRA
        yield


def stripped(model: Any) -> Any:
    """The base inside an adapted model: every layer that wraps another (`base_layer`) gives way
    to it, in place.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    for name, module in list(inner.named_modules()):
        if isinstance(getattr(module, "base_layer", None), nn.Module):
            inner.set_submodule(name, module.base_layer)
    vars(inner).pop("peft_config", None)  # PEFT's mark of a model that has an adapter
    return inner.requires_grad_(False).eval()


def densify(spec: RunSpec, model: Any) -> Any:
    """Replace each quantized layer by a plain one with the weight that it stands for, one at a
    time, in place.
    """
    weight_of = quantizer_of(spec.quantizer).weight
    if weight_of is None:
        return model
    plain = skeleton(spec)
    for name, layer in linear_layers(model).items():
        weight, dense = (
            weight_of(layer).to(getattr(torch, spec.model.dtype)),
            plain.get_submodule(name),
        )
        tensors = {
            "weight": weight.T.contiguous() if is_conv1d(dense) else weight,
            "bias": layer.bias,
        }
        for key, value in tensors.items():
            setattr(
                dense,
                key,
                value if value is None else nn.Parameter(value.detach(), requires_grad=False),
            )
        model.set_submodule(name, dense)
    return model


def encoded_prompts(tokenizer: "PreTrainedTokenizerFast") -> list[list[int]]:
    """Token ids of the prompts that models are compared on."""
    return [list(ids) for ids in tokenizer(list(PROMPTS))["input_ids"]]


@torch.no_grad()
def logits(model: Any, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The logits of every position of each prompt, (tokens, vocabulary), in float32 on the CPU."""
    device = next(model.parameters()).device
    outputs = [
        model.eval()(input_ids=torch.tensor([list(ids)], device=device), use_cache=False)
        for ids in prompts
    ]
    return [output.logits[0].float().cpu() for output in outputs]
