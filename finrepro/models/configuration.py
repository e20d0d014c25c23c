"""A checkpoint's config.json against the catalogue: whether it computes the same model, however it
is written. No torch.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finrepro.catalogue.spec import SIZES
from finrepro.errors import EnvironmentFault
from finrepro.models.safetensors import another, read_json

ROUNDING = 1e-7  # relative; a number that was kept in float32 is off by at most 6e-8
ALIASES = {"swish": "silu"}  # Transformers' names of one activation
# Configuration keys that decide what is computed. Dropout, token ids, the dtype and the longest
# context are the run's own settings.
COMPUTED = {
    "gpt2": (
        *SIZES["gpt2"],
        "n_inner",
        "activation_function",
        "layer_norm_epsilon",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
    ),
    "llama": (
        *SIZES["llama"],
        "head_dim",
        "hidden_act",
        "rms_norm_eps",
        "attention_bias",
        "mlp_bias",
        "tie_word_embeddings",
    ),
}


def compare_configuration(
    name: str, family: str, architecture: Mapping[str, Any], folder: Path
) -> None:
    """Compare config.json with the catalogue: the family, and every key of `architecture` that
    decides what is computed.

    A key that config.json leaves out is not compared, and one that is null stands for what the
    model's class makes of it. Raises `EnvironmentFault` naming the key and
    both values.
    """
    config = read_json(folder / "config.json")
    if config.get("model_type") != family:
        raise another(folder, name, "model_type", config.get("model_type"), family)
    if config.get("quantization_config"):
        raise EnvironmentFault(
            f"the checkpoint in {folder} is quantized already: {name} needs the original weights."
        )
    expected = {**architecture, **_derived(family, architecture)}
    derived = _derived(family, {**architecture, **config})
    for key in COMPUTED[family]:
        value = config.get(key)
        if value is None and key in config:
            value = derived.get(key)
        if value is not None and expected.get(key) is not None and not _same(value, expected[key]):
            raise another(folder, name, key, value, expected[key])
    if family == "llama" and isinstance(architecture.get("rope_parameters"), dict):
        rope = _rope(config)
        for key, value in sorted(architecture["rope_parameters"].items()):
            if not _same(rope.get(key), value):
                raise another(folder, name, f"rope_parameters.{key}", rope.get(key), value)


def _derived(family: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """What Transformers computes for the keys that a configuration has as null."""
    try:
        if family == "gpt2":
            values = {"n_inner": 4 * config["n_embd"]}
        else:
            heads = config["num_attention_heads"]
            values = {
                "num_key_value_heads": heads,
                "head_dim": config["hidden_size"] // heads,
            }
    except (KeyError, TypeError, ZeroDivisionError):  # the sizes themselves are compared
        return {}
    return {key: value for key, value in values.items() if config.get(key) is None}


def _same(value: Any, expected: Any) -> bool:
    """Whether two settings compute the same: equal, equal as float32, or names of one function."""
    numbers = [
        isinstance(each, int | float) and not isinstance(each, bool) for each in (value, expected)
    ]
    if all(numbers):
        return math.isclose(value, expected, rel_tol=ROUNDING)
    if isinstance(value, str) and isinstance(expected, str):
        return ALIASES.get(value, value) == ALIASES.get(expected, expected)
    return bool(value == expected)


def _rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Rotary settings as Transformers 5 writes them, also from the two keys of older versions, or
    with the base beside them.
    """
    if isinstance(config.get("rope_parameters"), dict):
        theta = config.get("rope_theta", 10000.0)
        return {"rope_theta": theta, "rope_type": "default", **config["rope_parameters"]}
    old = dict(config.get("rope_scaling") or {})
    kind = old.pop("rope_type", old.pop("type", "default"))
    return {"rope_theta": config.get("rope_theta", 10000.0), "rope_type": kind, **old}
