"""An adapter made elsewhere, scored on its base: a PEFT folder with LoRA weights, such as FinGPT's
v3.2 and v3.3 or FinLoRA's.

Read strictly: safetensors alone (a pickle runs code when it is read), every setting is understood
(`methods/peft_settings.py`), every tensor is used and none is missing, and the base is the one that
`adapter_config.json` names. The rule: the name there has the last part of the model's hub id, the
present one or a former one (a mirror's "x/Llama-2-13b-hf" is "meta-llama/Llama-2-13b-hf"), or is
the catalogue's name, as an id or a path, in any letter case. A mirror under another name is
refused; if it is the same model, its hub id can be written into `base_model_name_or_path`. Adapters
that act outside the layers (prompt tuning, activated LoRA) are refused because scoring bypasses
PEFT's wrapper.
"""

import hashlib
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro.catalogue.hub_names import is_called, nearest, plain_name
from finrepro.data import lfs
from finrepro.errors import EnvironmentFault
from finrepro.evidence.manifest import file_digest
from finrepro.methods import peft_settings
from finrepro.settings import Choice, settings

if TYPE_CHECKING:
    from torch import nn

NOT_EXPORTED = dict.fromkeys(
    ("peft", "merged", "base"),
    "its adapter was made elsewhere, and its own folder is what others load",
)
MAX_NAME = 512  # characters of what a folder calls its base
DTYPES = ("F64", "F32", "F16", "BF16")
A_FACTOR = re.compile(r"\.lora_(embedding_)?A(\.|$)")  # of shape (rank, features)
SETTINGS, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"


@settings
class Config:
    """`sha256` is over the digests of the folder's two files, `base_model` what the folder says
    it was trained on.
    """

    path: str
    sha256: str
    base_model: str


def from_folder(path: Path) -> dict[str, Any]:
    """The settings of the adapter in a folder; nothing is loaded.

    Raises `EnvironmentFault` in one line when there is no such folder, or it is no PEFT folder,
    holds a pickle, is truncated or empty, is not LoRA, or names no base.
    """
    if not _is_folder(path):
        raise EnvironmentFault(f"{path}: there is no such adapter folder.")
    if not (path / SETTINGS).is_file():
        raise EnvironmentFault(f"{path}: not a PEFT folder: it has no {SETTINGS}.")
    values = peft_settings.read(path / SETTINGS)
    kind, base = (values.get(key) for key in ("peft_type", "base_model_name_or_path"))
    if kind != "LORA":
        raise EnvironmentFault(
            f"{path}: an adapter of type {peft_settings.shown(kind)}; "
            "only LORA (with its variants) can be scored here."
        )
    if not isinstance(base, str) or not 0 < len(base) <= MAX_NAME:
        raise EnvironmentFault(
            f"{path / SETTINGS}: base_model_name_or_path is {'no name' if base else 'empty'}: "
            "write the hub id of the model that the adapter was trained on."
        )
    peft_settings.check(values, path / SETTINGS)
    _check_weights(path, peft_settings.largest_rank(values))
    return {"path": str(path.resolve()), "sha256": _digest(path), "base_model": base}


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:  # a name that is too long
        return False


def _check_weights(path: Path, largest_rank: int) -> None:
    """Raises `EnvironmentFault` unless the folder has a safetensors file that is complete, of
    tensors in floating point, none of them empty, some of the largest rank of the settings.

    A rank that no tensor has would be allocated in every layer before the shapes are compared.
    """
    from safetensors import SafetensorError, safe_open

    if not (path / WEIGHTS).is_file():
        if (path / PICKLE).is_file():
            raise EnvironmentFault(
                f"{path}: holds only a pickle ({PICKLE}), which runs code when it is read: "
                f"save it again with PEFT, which writes {WEIGHTS}."
            )
        raise EnvironmentFault(f"{path}: not a PEFT folder: it has no {WEIGHTS}.")
    try:
        if lfs.is_pointer(path / WEIGHTS):
            raise EnvironmentFault(f"{path / WEIGHTS}: {lfs.ADVICE}.")
        with safe_open(path / WEIGHTS, framework="numpy") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            shapes = {name: part.get_shape() for name, part in slices.items()}
            dtypes = {name: part.get_dtype() for name, part in slices.items()}
    except (SafetensorError, OSError) as error:
        raise EnvironmentFault(
            f"{path / WEIGHTS}: damaged: {str(error).splitlines()[0]}."
        ) from None
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty or not shapes:
        raise EnvironmentFault(
            f"{path / WEIGHTS}: "
            f"{peft_settings.printable(empty[0]) if empty else 'the file'} is empty: "
            "was it saved under ZeRO-3 without gathering?"
        )
    for name, dtype in dtypes.items():
        if dtype not in DTYPES:
            raise EnvironmentFault(
                f"{path / WEIGHTS}: {peft_settings.printable(name)} is {dtype}; "
                f"allowed: {', '.join(DTYPES)}."
            )
    ranks = [shape[0] for name, shape in shapes.items() if A_FACTOR.search(name)]
    if largest_rank > max(ranks, default=0):
        raise EnvironmentFault(
            f"{path / SETTINGS}: asks for rank {largest_rank}, "
            f"the largest in {WEIGHTS} is {max(ranks, default=0)}."
        )


def _digest(path: Path) -> str:
    """sha256 over the digests of what decides the numbers, in the format of `sha256sum`, sorted
    by name.
    """
    lines = [f"{file_digest(path / name)}  {name}\n" for name in sorted([SETTINGS, WEIGHTS])]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def supports(model: Any, quantizer: Choice, zero_stage: int, config: Config) -> str | None:
    """None for every quantizer and ZeRO stage, or that the adapter is another model's."""
    if is_called(model, config.base_model):
        return None
    written = peft_settings.printable(config.base_model)
    reason = (
        f"the adapter '{Path(config.path).name}' is for {written}, "
        f"not for {model.hub.id if model.hub else model.name}"
    )
    near = nearest(config.base_model)
    if near is None or plain_name(near) == plain_name(config.base_model):
        return reason
    return (
        f"{reason}; nearest in the catalogue: {near}; if that is the same model, write it into "
        f"base_model_name_or_path of the adapter's {SETTINGS}"
    )


def trainable_parameters(model: Any, config: Config) -> int:
    """Trained parameters of a catalogue entry: none, it was trained elsewhere."""
    return 0


def apply(model: "nn.Module", config: Config, seed: int) -> "nn.Module":
    """The model with the adapter in place, frozen.

    Raises `EnvironmentFault` when the files are no longer those that were planned with, or do not
    fit the model's layers.
    """
    import peft
    import torch

    path = Path(config.path)
    if from_folder(path)["sha256"] != config.sha256:
        raise EnvironmentFault(
            f"{path}: the adapter's files have changed since the cell was planned."
        )
    settings_of_peft = peft_settings.for_peft(peft_settings.read(path / SETTINGS))
    device = str(next(model.parameters()).device)
    try:
        with warnings.catch_warnings():
            # An adapter from a quantized GPT-2 fits the plain one and the other way round; a
            # missing key is found below. Nothing is merged here, and PEFT, too, trained without
            # the patterns that match no layer.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            warnings.filterwarnings("ignore", message="`lora_bias=True` was passed")
            warnings.filterwarnings("ignore", message=".*did not match any targeted module")
            adapted = peft.PeftModel.from_pretrained(
                model, path, config=peft.LoraConfig(**settings_of_peft), torch_device=device
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever PEFT and torch say of settings and tensors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [
            type(error).__name__
        ]
        raise EnvironmentFault(
            f"{path}: the adapter does not fit the model: {' '.join(lines[:2])}"
        ) from None
    check_every_tensor_is_used(adapted, path)
    check_every_tensor_is_finite(path / WEIGHTS)
    return adapted.requires_grad_(False)


def check_every_tensor_is_used(adapted: Any, path: Path) -> None:
    """Raises `EnvironmentFault` when the file lacks a tensor of the adapted model or holds one
    that the model has no place for.

    The base's embedding or head may lie beside the adapter: PEFT saves them with it where they are
    adapted or resized, and puts them in the base's place when it loads.
    """
    import peft
    from safetensors import safe_open

    with warnings.catch_warnings():
        # PEFT takes the biases of `lora_bias`, of one dimension, for tensors of lost shards.
        warnings.filterwarnings("ignore", message=".*LoRA tensor.* have invalid shape")
        parameters = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    along = {
        f"{name}.weight"
        for module in (adapted.get_input_embeddings(), adapted.get_output_embeddings())
        for name, inner in adapted.named_modules()
        if inner is getattr(module, "base_layer", module)
    }
    with safe_open(path / WEIGHTS, framework="numpy") as file:
        tensors = set(file.keys())
    for fault, names in (
        ("lacks", parameters - tensors),
        ("holds, without a place for it,", tensors - parameters - along),
    ):
        if names:
            raise EnvironmentFault(
                f"{path / WEIGHTS}: {fault} {peft_settings.printable(min(names))} "
                f"and {len(names) - 1} more."
            )


def check_every_tensor_is_finite(path: Path) -> None:
    """Raises `EnvironmentFault` when a tensor of the file holds NaN or an infinity."""
    from safetensors import safe_open

    from finrepro.runtime.finite import is_finite

    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - no mapping
            if not is_finite(file.get_tensor(name)):
                raise EnvironmentFault(f"{path}: {name} holds NaN or an infinity.")


def export(model: "nn.Module", folder: Path) -> None:
    """Writes nothing: the result has the adapter's digest, and its files stay where they are."""
