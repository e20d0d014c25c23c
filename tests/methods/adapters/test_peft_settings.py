"""The settings of adapters made elsewhere. The law: every field that the installed PEFT has is
understood, without meaning, or refused; what is understood is computed as plain PEFT computes it,
within 1e-5 of the logits."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from fixtures.foreign import computes_as_plain_peft, edit, saved, scored_logits
from fixtures.model import MINIATURES, assert_close, broken, process  # noqa: F401

from finrepro.errors import EnvironmentFault
from finrepro.methods import peft_settings
from finrepro.methods.adapters import peft_folder

GPT2, LLAMA = MINIATURES
TYPES = {"LORA": peft.LoraConfig}  # every type of adapter that a folder may be of


def is_sorted_into_one_list(config: type[Any]) -> None:
    lists = (
        set(peft_settings.UNDERSTOOD) | set(peft_settings.ALSO_UNDERSTOOD),
        set(peft_settings.MEANINGLESS),
        set(peft_settings.REFUSED),
    )
    fields = {field.name for field in dataclasses.fields(config)}
    assert fields == set().union(*lists), fields ^ set().union(*lists)
    assert sum(map(len, lists)) == len(fields), "a field stands in two lists"


@pytest.mark.parametrize("config", TYPES.values(), ids=TYPES)
def test_every_field_of_the_installed_peft_is_in_one_list(config: type[Any]) -> None:
    is_sorted_into_one_list(config)
    newer = dataclasses.make_dataclass("Newer", [("use_nola", bool, False)], bases=(config,))
    broken(is_sorted_into_one_list, newer)


# For every field that is understood: settings that use it, and the miniature to try them on.
GIVEN: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "task_type": [(LLAMA, {"task_type": "CAUSAL_LM"})],
    "r": [(LLAMA, {"r": 3})],
    "lora_alpha": [(LLAMA, {"lora_alpha": 3}), (LLAMA, {"lora_alpha": 0.5})],
    "target_modules": [
        (LLAMA, {"target_modules": "all-linear"}),
        (LLAMA, {"target_modules": r".*layers\.0.*\.(up|down)_proj"}),
        (LLAMA, {"target_modules": None}),
        (LLAMA, {"target_modules": ["q_proj", "embed_tokens"]}),
        (LLAMA, {"target_modules": ["q_proj", "lm_head"]}),
        (GPT2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ],
    "exclude_modules": [(LLAMA, {"target_modules": "all-linear", "exclude_modules": ["v_proj"]})],
    "fan_in_fan_out": [(GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": True})],
    "bias": [
        (GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}),
        (GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "lora_only"}),
    ],
    "use_rslora": [(LLAMA, {"use_rslora": True})],
    "use_dora": [
        (LLAMA, {"use_dora": True}),
        (GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "use_dora": True}),
        (LLAMA, {"use_dora": True, "target_modules": ["embed_tokens", "v_proj"]}),
    ],
    "lora_bias": [
        (GPT2, {"target_modules": ["c_attn"], "fan_in_fan_out": True, "lora_bias": True})
    ],
    "modules_to_save": [
        (LLAMA, {"modules_to_save": ["lm_head"]}),
        (LLAMA, {"modules_to_save": ["embed_tokens", "lm_head"]}),
        (LLAMA, {"modules_to_save": ["norm"]}),
    ],
    "layers_to_transform": [
        (LLAMA, {"layers_to_transform": [1]}),
        (LLAMA, {"layers_to_transform": 0}),
    ],
    "layers_pattern": [(LLAMA, {"layers_to_transform": [1], "layers_pattern": "layers"})],
    "rank_pattern": [(LLAMA, {"rank_pattern": {r"layers\.1\..*v_proj": 7}})],
    "alpha_pattern": [(LLAMA, {"alpha_pattern": {"q_proj": 1}, "use_rslora": True})],
    "init_lora_weights": [
        (LLAMA, {"init_lora_weights": start})
        for start in (False, "gaussian", "orthogonal", "pissa")
    ],
    "peft_type": [(LLAMA, {})],
    "base_model_name_or_path": [(LLAMA, {})],
}
CASES = [(name, *case) for name, cases in GIVEN.items() for case in cases]


def test_every_field_that_is_understood_is_tried() -> None:
    assert set(GIVEN) == {*peft_settings.UNDERSTOOD, *peft_settings.ALSO_UNDERSTOOD}


@pytest.mark.parametrize(("model", "settings"), [case[1:] for case in CASES], ids=str)
def test_what_is_understood_is_computed_as_plain_peft_computes_it(
    model: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    folder = saved(model, settings, tmp_path / "adapter")
    computes_as_plain_peft(model, folder)


def test_the_law_sees_a_setting_that_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(LLAMA, {"use_rslora": True}, tmp_path / "adapter")
    kept = {name: check for name, check in peft_settings.UNDERSTOOD.items() if name != "use_rslora"}
    monkeypatch.setattr(peft_settings, "UNDERSTOOD", kept)
    monkeypatch.setattr(peft_settings, "MEANINGLESS", peft_settings.MEANINGLESS | {"use_rslora"})
    broken(computes_as_plain_peft, LLAMA, folder)


def test_what_has_no_meaning_may_be_anything_and_changes_nothing(tmp_path: Path) -> None:
    folder = saved(LLAMA, {}, tmp_path / "adapter")
    plain = scored_logits(LLAMA, folder)
    for junk in ({"a": [1, "2", None]}, "x", 7, None):
        edit(folder, **dict.fromkeys(peft_settings.MEANINGLESS, junk))
        assert torch.equal(scored_logits(LLAMA, folder), plain), junk


@pytest.mark.parametrize("value", [True, 1, "yes", [0], {"k": None}, float("nan")], ids=repr)
@pytest.mark.parametrize("key", [*sorted(peft_settings.REFUSED), "use_a_method_of_next_year"])
def test_what_is_not_understood_is_refused_when_it_means_something(
    key: str, value: Any, tmp_path: Path
) -> None:
    with pytest.raises(EnvironmentFault, match=key) as caught:
        peft_settings.check({key: value}, tmp_path)
    assert "\n" not in str(caught.value)
    for nothing in (None, False, [], {}, "", 0):
        peft_settings.check({key: nothing}, tmp_path)


@pytest.mark.parametrize(
    ("start", "says"),
    [
        ("pissa_niter_4", "another approximate SVD"),
        ("pissa_niter_16", "path_initial_model_for_weight_conversion"),
        ("loftq", "LoftQ base"),
        ("olora", "may rewrite the base"),
        ("corda", "may rewrite the base"),
        ("lora_ga", "may rewrite the base"),
        ("mica", "may rewrite the base"),
        (7, "may rewrite the base"),
        ([], "may rewrite the base"),
    ],
)
def test_a_start_that_rewrites_the_base_is_refused(start: Any, says: str, tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=says):
        peft_settings.check({"init_lora_weights": start}, tmp_path)


@pytest.mark.parametrize("key", ["r", "lora_alpha"])
@pytest.mark.parametrize(
    "value", [0, -1, 1e9, float("inf"), float("nan"), "8", None, True, [8]], ids=repr
)
def test_ranks_and_alphas_that_no_adapter_has_are_refused(
    key: str, value: Any, tmp_path: Path
) -> None:
    pattern = {"r": "rank_pattern", "lora_alpha": "alpha_pattern"}[key]
    for values in ({key: value}, {pattern: {"q_proj": value}}):
        with pytest.raises(EnvironmentFault, match="above 0"):
            peft_settings.check(values, tmp_path)


def test_a_rank_that_no_tensor_has_is_refused_before_a_layer_is_made(tmp_path: Path) -> None:
    folder = saved(LLAMA, {"r": 4}, tmp_path / "adapter")
    for change in ({"r": 10**9}, {"rank_pattern": {"q_proj": 10**9}}):
        edit(folder, **change)
        with pytest.raises(EnvironmentFault, match="asks for rank 1000000000, the largest in"):
            peft_folder.from_folder(folder)
        edit(folder, r=4, rank_pattern={})


def test_the_embedding_and_the_head_may_lie_beside_the_adapter(tmp_path: Path) -> None:
    """PEFT saves them by itself where they are adapted or the vocabulary was touched."""
    folder = saved(
        LLAMA, {"target_modules": ["q_proj", "lm_head"]}, tmp_path / "adapter", embedding=True
    )
    computes_as_plain_peft(LLAMA, folder)
    untouched = saved(LLAMA, {}, tmp_path / "untouched", embedding=True)
    computes_as_plain_peft(LLAMA, untouched)
    assert_close(scored_logits(LLAMA, untouched), scored_logits(LLAMA, saved(LLAMA, {}, tmp_path)))


def test_the_settings_of_folders_on_the_hub_are_understood(tmp_path: Path) -> None:
    """Those of PEFT 0.4 (FinGPT) and 0.14 (FinLoRA), as far as they are known."""
    old = (
        '{"auto_mapping": null, "base_model_name_or_path": "x", "bias": "none", '
        '"fan_in_fan_out": false, "inference_mode": true, "init_lora_weights": true, '
        '"layers_pattern": null, "layers_to_transform": null, "lora_alpha": 32, '
        '"lora_dropout": 0.1, "modules_to_save": null, "peft_type": "LORA", "r": 8, '
        '"revision": null, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}'
    )
    peft_settings.check(json.loads(old), tmp_path)
    newer = json.loads(old) | {
        "alpha_pattern": {},
        "rank_pattern": {},
        "loftq_config": {},
        "megatron_core": "megatron.core",
        "megatron_config": None,
        "use_dora": False,
        "use_rslora": False,
        "lora_bias": False,
        "eva_config": None,
        "exclude_modules": None,
        "layer_replication": None,
        "enable_lora": None,
        "merge_weights": False,
    }
    peft_settings.check(newer, tmp_path)
