"""An adapter made elsewhere, scored on its base: a PEFT folder with LoRA weights, such as FinGPT's
v3.2 and v3.3 or FinLoRA's.

Read strictly: safetensors alone (a pickle runs code when it is read), every tensor of the file is
used and none is missing, and the base is the one that `adapter_config.json` names. The rule: the
name there is the model's hub id or has its last part (a mirror's "x/Llama-2-13b-hf" is
"meta-llama/Llama-2-13b-hf"), or is the catalogue's name. A mirror under another name is refused;
if it is the same model, its hub id can be written into `base_model_name_or_path`. Adapters that act
outside the layers (prompt tuning) are refused because scoring bypasses PEFT's wrapper.
"""

import hashlib
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro.errors import EnvironmentFault
from finrepro.evidence import strict_json
from finrepro.evidence.manifest import file_digest
from finrepro.settings import Choice, settings

if TYPE_CHECKING:
    from torch import nn

NOT_EXPORTED = dict.fromkeys(
    ("peft", "merged", "base"),
    "its adapter was made elsewhere, and its own folder is what others load",
)
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
    if not path.is_dir():
        raise EnvironmentFault(f"{path}: there is no such adapter folder.")
    if not (path / SETTINGS).is_file():
        raise EnvironmentFault(f"{path}: not a PEFT folder: it has no {SETTINGS}.")
    try:
        values = strict_json.loads((path / SETTINGS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise EnvironmentFault(f"{path / SETTINGS}: cannot be read: {error}.") from None
    kind, base = (
        (values.get(key) for key in ("peft_type", "base_model_name_or_path"))
        if isinstance(values, dict)
        else ("", "")
    )
    if kind != "LORA":
        raise EnvironmentFault(
            f"{path}: an adapter of type {kind!r}; "
            "only LORA (with its variants) can be scored here."
        )
    if not isinstance(base, str) or not base:
        raise EnvironmentFault(
            f"{path / SETTINGS}: base_model_name_or_path is empty: "
            "write the hub id of the model that the adapter was trained on."
        )
    _check_weights(path)
    return {"path": str(path.resolve()), "sha256": _digest(path), "base_model": base}


def _check_weights(path: Path) -> None:
    """Raises `EnvironmentFault` unless the folder has a safetensors file that is complete and
    without empty tensors.
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
        with safe_open(path / WEIGHTS, framework="numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise EnvironmentFault(
            f"{path / WEIGHTS}: damaged: {str(error).splitlines()[0]}."
        ) from None
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty or not shapes:
        raise EnvironmentFault(
            f"{path / WEIGHTS}: {empty[0] if empty else 'the file'} is empty: "
            "was it saved under ZeRO-3 without gathering?"
        )


def _digest(path: Path) -> str:
    """sha256 over the digests of what decides the numbers, in the format of `sha256sum`, sorted
    by name.
    """
    lines = [f"{file_digest(path / name)}  {name}\n" for name in sorted([SETTINGS, WEIGHTS])]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _last(name: str) -> str:
    return name.rstrip("/").rpartition("/")[2]


def supports(model: Any, quantizer: Choice, zero_stage: int, config: Config) -> str | None:
    """None for every quantizer and ZeRO stage, or that the adapter is another model's."""
    names = [model.name, *([model.hub.id, _last(model.hub.id)] if model.hub else [])]
    if config.base_model in names or _last(config.base_model) in names:
        return None
    base = model.hub.id if model.hub else model.name
    return (
        f"the adapter '{Path(config.path).name}' is for {config.base_model}, not for {base}; "
        f"if they are the same model, write {base} into base_model_name_or_path of its {SETTINGS}"
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

    path = Path(config.path)
    _check_weights(path)
    if _digest(path) != config.sha256:
        raise EnvironmentFault(
            f"{path}: the adapter's files have changed since the cell was planned."
        )
    device = str(next(model.parameters()).device)
    try:
        with warnings.catch_warnings():
            # An adapter from a quantized GPT-2 fits the plain one and the other way round; a
            # missing key is found below.
            warnings.filterwarnings("ignore", message="fan_in_fan_out is set to")
            warnings.filterwarnings("ignore", message="Found missing adapter keys")
            adapted = peft.PeftModel.from_pretrained(
                model, path, is_trainable=False, torch_device=device
            )
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
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
    """
    import peft
    from safetensors import safe_open

    parameters = set(peft.get_peft_model_state_dict(adapted, save_embedding_layers=False))
    with safe_open(path / WEIGHTS, framework="numpy") as file:
        tensors = set(file.keys())
    for fault, names in (
        ("lacks", parameters - tensors),
        ("holds, without a place for it,", tensors - parameters),
    ):
        if names:
            raise EnvironmentFault(
                f"{path / WEIGHTS}: {fault} {min(names)} and {len(names) - 1} more."
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
