"""The settings of a LoRA folder made elsewhere (`adapter_config.json`), each understood, without
meaning for a model that is only asked, or refused.

PEFT ignores keys that it does not know, rewrites the base's weights for some initialisations, and
believes every number. Here a field is in exactly one of three lists; a test holds them against the
fields that the installed PEFT has. PEFT gets the understood ones alone.
"""

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from finrepro import bounds
from finrepro.errors import EnvironmentFault

DEFAULT_RANK = 8  # PEFT's, where the file has no `r`
MAX_BYTES = 1_000_000  # of adapter_config.json; PEFT writes one to two thousand
MAX_ALPHA = 10_000  # the largest published ones are in the hundreds
MAX_PATTERN = 4096  # characters of a regular expression over the names of layers
# A repeated group that itself repeats takes a time that doubles with every letter of a name.
NESTED_REPEAT = re.compile(r"\([^()]*[+*}][^()]*\)[+*{]")
# Starting values that leave the base's weights alone; those of the adapter are in the folder.
HARMLESS_STARTS = ("gaussian", "eva", "orthogonal")
EXACT_SVD = "pissa"  # PEFT takes the same principal part from the base again when it loads
REWRITES = {
    "loftq": "it belongs to a LoftQ base, whose weights PEFT would make again",
    "pissa_niter": "PEFT would take another approximate SVD from the base than was trained on",
}
CONVERT = "save it with PEFT's path_initial_model_for_weight_conversion, as plain LoRA"


Check = Callable[[Any], bool]


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_rank(value: Any) -> bool:
    return _is_whole(value) and value > 0


def _is_alpha(value: Any) -> bool:
    is_number = _is_whole(value) or isinstance(value, float)
    return is_number and math.isfinite(value) and 0 < value <= MAX_ALPHA


def _is_flag(value: Any) -> bool:
    return isinstance(value, bool)


def _is_name(value: Any) -> bool:
    return isinstance(value, str) and bool(value)


def _is_pattern(value: Any) -> bool:
    """Whether it is a regular expression, short and without nested repetition."""
    if not _is_name(value) or len(value) > MAX_PATTERN or NESTED_REPEAT.search(value):
        return False
    try:
        re.compile(value)
    except (re.error, OverflowError, RecursionError):
        return False
    return True


def _is_layer(value: Any) -> bool:
    return _is_whole(value) and value >= 0


def _one_or_list(is_one: Check, is_listed: Check) -> Check:
    return lambda value: is_one(value) or (isinstance(value, list) and all(map(is_listed, value)))


def _by_pattern(is_value: Check) -> Check:
    """A check of a mapping from regular expressions to values."""
    return lambda value: (
        isinstance(value, dict)
        and all(map(_is_pattern, value))
        and all(map(is_value, value.values()))
    )


def _or_none(is_value: Check) -> Check:
    return lambda value: value is None or is_value(value)


_layers = (_or_none(_one_or_list(_is_pattern, _is_name)), "names of layers, or a pattern of them")
_flag = (_is_flag, "true or false")
# What decides the adapted model and is done by PEFT inside of the layers: a check, and in words
# what is allowed.
UNDERSTOOD: dict[str, tuple[Check, str]] = {
    "task_type": (lambda value: value in (None, "CAUSAL_LM"), "CAUSAL_LM"),
    "r": (_is_rank, "a whole number above 0"),
    "lora_alpha": (_is_alpha, f"a number above 0, at most {MAX_ALPHA}"),
    "target_modules": _layers,
    "exclude_modules": _layers,
    "fan_in_fan_out": _flag,
    "bias": (lambda value: value in ("none", "all", "lora_only"), "none, all or lora_only"),
    "use_rslora": _flag,
    "use_dora": _flag,
    "lora_bias": _flag,
    "modules_to_save": (
        _or_none(lambda value: isinstance(value, list) and all(map(_is_name, value))),
        "names of modules",
    ),
    "layers_to_transform": (_or_none(_one_or_list(_is_layer, _is_layer)), "numbers of layers"),
    "layers_pattern": (_or_none(_one_or_list(_is_pattern, _is_pattern)), "patterns of names"),
    "rank_pattern": (_by_pattern(_is_rank), "patterns with whole numbers above 0"),
    "alpha_pattern": (
        _by_pattern(_is_alpha),
        f"patterns with numbers above 0, at most {MAX_ALPHA}",
    ),
}
# Looked at, and not handed on as they are.
ALSO_UNDERSTOOD = ("peft_type", "init_lora_weights", "base_model_name_or_path")
# Of training, of how values were found that are in the folder, or records of where it was made.
MEANINGLESS = frozenset(
    {
        "auto_mapping",
        "corda_config",
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_dropout",
        "lora_ga_config",
        "megatron_core",  # of megatron_config, which is refused
        "peft_version",
        "qalora_group_size",  # of use_qalora, which is refused
        "revision",  # the base is the catalogue's, at its own revision
        "runtime_config",  # PEFT ignores what a file says
    }
)
# What acts outside of the layers, changes the base, or is not known to be computed alike: only
# None, false or empty.
REFUSED = {
    "alora_invocation_tokens": "an activated LoRA works in PEFT's wrapper, which scoring bypasses",
    "arrow_config": "routing between adapters needs the other adapters",
    "ensure_weight_tying": "adapters shared between tied layers are not supported",
    "kasa_config": "KaSA rewrites the base's weights",
    "layer_replication": "it repeats layers: the base is another model",
    "megatron_config": "layers of Megatron are not supported",
    "monteclora_config": "MonteCLoRA is random when it is asked",
    "target_parameters": "adapters on bare parameters are not supported",
    "trainable_token_indices": "trained tokens beside the embedding are not supported",
    "use_bdlora": "block-diagonal LoRA is not supported",
    "use_qalora": "QA-LoRA works on GPTQ's layers alone",
    "velora_config": "VeLoRA is not supported",
}


def read(path: Path) -> dict[str, Any]:
    """The content of an `adapter_config.json`. Raises `EnvironmentFault` for what is no JSON
    object, or too large or too deep for one of PEFT's.
    """
    try:
        values = bounds.read_json(path, MAX_BYTES)
    except (OSError, ValueError) as error:
        raise EnvironmentFault(f"{path}: cannot be read: {error}.") from None
    if not isinstance(values, dict):
        raise EnvironmentFault(f"{path}: a JSON object is expected, not a {type(values).__name__}.")
    return values


def check(values: Mapping[str, Any], path: Path) -> None:
    """Raises `EnvironmentFault`, naming the key of `path`, unless every setting is understood or
    has no meaning here.
    """
    for key, value in values.items():
        if key in ALSO_UNDERSTOOD or key in MEANINGLESS:
            continue
        if key in UNDERSTOOD:
            is_allowed, words = UNDERSTOOD[key]
            if not is_allowed(value):
                raise _refusal(path, key, value, f"allowed: {words}")
        elif value:
            raise _refusal(path, key, value, REFUSED.get(key, "this PEFT does not know the key"))
    _check_start(values.get("init_lora_weights", True), path)


def _check_start(start: Any, path: Path) -> None:
    if start is None or isinstance(start, bool) or start in (*HARMLESS_STARTS, EXACT_SVD):
        return
    named = start if isinstance(start, str) else ""
    reason = REWRITES.get(re.sub(r"_niter_.*", "_niter", named), "PEFT may rewrite the base for it")
    raise _refusal(path, "init_lora_weights", start, f"{reason}; {CONVERT}")


def _refusal(path: Path, key: str, value: Any, reason: str) -> EnvironmentFault:
    return EnvironmentFault(f"{path}: {shown(key)} is {shown(value)}: {reason}.")


def shown(value: Any) -> str:
    """A value as Python writes it, on one line and not longer than that."""
    return _cut(repr(value), 60)


def printable(name: str) -> str:
    """A name of a file's, on one line and not longer than that."""
    return _cut(name if name.isprintable() else repr(name), 200)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[:length]}..."


def largest_rank(values: Mapping[str, Any]) -> int:
    """The largest rank that checked settings ask for."""
    return max(values.get("r", DEFAULT_RANK), *values.get("rank_pattern", {}).values(), 1)


def for_peft(values: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of `peft.LoraConfig`: what is understood, and a start that costs nothing where
    the folder's tensors replace it.
    """
    is_exact = values.get("init_lora_weights") == EXACT_SVD
    understood = {key: values[key] for key in UNDERSTOOD if key in values}
    return {**understood, "init_lora_weights": EXACT_SVD if is_exact else True}
