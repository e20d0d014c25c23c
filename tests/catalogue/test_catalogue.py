"""Law: every entry of configs/ resolves, says where it comes from, and describes the real thing
that it names.
"""

import json
import re

import pytest
from fixtures.process import one_line

from finrepro import PROJECT
from finrepro.catalogue import reader
from finrepro.catalogue.resolve import base_of
from finrepro.catalogue.spec import Hub, Model
from finrepro.errors import UsageError
from finrepro.kinds import kind_module, kinds
from finrepro.settings import plain
from finrepro.sizes.shapes import linear_parameters

ENTRIES = {
    name: tuple(reader.entries(name))
    for name in ("models", "adapters", "quantizers", "optimizers", "datasets", "tasks")
}
MODELS, ADAPTERS, QUANTIZERS, OPTIMIZERS, DATASETS, TASKS = ENTRIES.values()


@pytest.mark.parametrize("name", ENTRIES)
def test_no_catalogue_is_empty(name: str):
    assert ENTRIES[name]


@pytest.mark.parametrize("name", MODELS)
def test_every_model_resolves_and_says_what_it_is(name: str):
    model = reader.model(name)
    assert model.name == name
    if model.scale == "paper":
        trained_here = model.hub is None and (model.low_rank is None or model.low_rank.of is None)
        assert isinstance(model.pretrain, str) == trained_here and (
            trained_here or model.pretrain is None
        )
        assert (model.hub is None) == (model.compared_with is not None), (
            "a model of no hub is trained from scratch"
        )
    elif model.scale == "open":
        assert model.package is not None and model.hub is None and base_of(name) is None
    else:
        assert model.miniature_of in MODELS and model.hub is None and base_of(name) is not None
        original = reader.model(model.miniature_of)
        assert model.family == original.family and (model.low_rank is None) == (
            original.low_rank is None
        )
        size, _, variant = name.replace("_deep_mini", "_mini").partition("_mini")
        assert original.name.startswith(size + variant.partition("_r")[0])
        assert model.parameters < original.parameters / (100 if original.hub else 45)
        assert reader.pretraining(reader.origin(model)).train_on.name in TASKS


def test_a_chat_or_instruct_model_is_its_base_with_other_weights():
    variants = [
        model
        for model in map(reader.model, MODELS)
        if model.variant != "base" and model.package is None  # whose base is not in the catalogue
    ]
    assert len(variants) == 4
    for each in variants:
        base = reader.model(each.name.removesuffix(f"_{each.variant}"))
        assert base.variant == "base" and each.architecture == base.architecture
        assert each.hub is not None and base.hub is not None and each.hub.id != base.hub.id


def test_the_miniatures_keep_their_families_order_of_size():
    sizes = {
        reader.model(name).miniature_of: reader.model(name).parameters
        for name in MODELS
        if name == f"{reader.model(name).miniature_of}_mini"
    }
    for smaller, larger in (
        ("gpt2_127m", "gpt2_1_5b"),
        ("llama2_7b", "llama2_13b"),
        ("llama3_1_8b", "llama3_1_70b"),
    ):
        assert sizes[smaller] < sizes[larger]


def test_every_real_model_has_a_miniature():
    real = {
        name for name in MODELS if reader.model(name).hub and reader.model(name).variant == "base"
    }
    assert len(real) == 6
    small = {reader.model(name).miniature_of for name in MODELS} - {None}
    assert real <= small and all(reader.model(name).compared_with for name in small - real)


@pytest.mark.parametrize("name", [name for name in MODELS if reader.model(name).compared_with])
def test_a_model_is_compared_with_a_dense_one_of_its_scale_and_purpose(name: str):
    model = reader.model(name)
    dense = reader.model(str(model.compared_with))
    assert dense.compared_with is None and dense.low_rank is None and dense.scale == model.scale
    assert (
        dense.parameters > model.parameters
        and dense.architecture["vocab_size"] == model.architecture["vocab_size"]
    )


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_adapter_resolves(name: str):
    assert reader.adapter(name).kind in kinds("adapters")


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_quantizer_resolves_with_every_setting_written_out(name: str, dtype: str):
    choice = reader.quantizer(name, dtype)
    settings = vars(choice.config)
    assert "model" not in settings.values(), "the compute dtype has to be written out"
    if "compute_dtype" in settings:
        assert settings["compute_dtype"] == dtype
    written = set(reader.entries("quantizers")[name]) - {"kind"}
    assert {key for key in settings if not key.startswith("_")} == written, (
        "a library's default decides"
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_resolves_with_every_setting_written_out(name: str):
    choice = reader.optimizer(name)
    assert choice.kind in kinds("optimizers")
    assert set(vars(choice.config)) == set(reader.entries("optimizers")[name]) - {"kind"}, (
        "a default decides"
    )


def test_training_settings_name_an_optimizer_or_spell_it_out():
    values = dict(reader.table("3").smoke.train)
    named = reader.train_settings({**values, "optimizer": "adamw"}, "test.train")
    entry = reader.entries("optimizers")["adamw"]
    spelled = reader.train_settings({**values, "optimizer": entry}, "test.train")
    assert plain(named) == plain(spelled) and plain(named)["optimizer"] == {**entry}


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_resolves_with_a_licence_and_whole_digests(name: str):
    config = reader.dataset(name).config
    assert config.licence.strip() and config.title.strip()
    for file in config.files.values():
        unknown = file.sha256 is None and file.rows is None
        assert unknown or (re.fullmatch(r"[0-9a-f]{64}", file.sha256) and file.rows > 0)


@pytest.mark.parametrize("name", TASKS)
def test_every_task_resolves_with_each_of_its_templates(name: str):
    for template in reader.entries("tasks")[name].get("templates", {"": ""}):
        resolved = reader.task(name, template)
        assert resolved.dataset.name in DATASETS
        assert kind_module("tasks", resolved.task.kind).__name__.endswith(resolved.task.kind)
        if template:
            assert list(resolved.task.config.templates) == [template], (
                "other wordings would enter the hash"
            )


def hubs() -> list[Hub]:
    models = [reader.model(name).hub for name in MODELS]
    return [
        hub
        for hub in [*models, *(reader.dataset(name).config.hub for name in DATASETS)]
        if hub is not None
    ]


@pytest.mark.parametrize("hub", hubs(), ids=lambda hub: hub.id)
def test_a_revision_is_a_whole_commit_or_null_and_says_how_it_is_known(hub: Hub):
    assert hub.revision is None or re.fullmatch(r"[0-9a-f]{40}", hub.revision)
    assert hub.source.strip()
    assert re.fullmatch(r"[\w.-]+/[\w.-]+", hub.id)


def closed_form(model: Model) -> int:
    """Parameters of the family, from its published architecture, counted apart from the planner."""
    a = model.architecture
    if model.family == "gpt2":
        width, depth = a["n_embd"], a["n_layer"]
        block = (3 * width + width + 4 * width + width) + 2 * (2 * width)  # biases and layer norms
        return (
            linear_parameters(model)
            + depth * block
            + (a["vocab_size"] + a["n_positions"]) * width
            + 2 * width
        )
    width, depth = a["hidden_size"], a["num_hidden_layers"]
    embeddings = a["vocab_size"] * width * (1 if a["tie_word_embeddings"] else 2)
    return linear_parameters(model) + embeddings + (2 * depth + 1) * width


@pytest.mark.parametrize("name", MODELS)
def test_the_number_of_parameters_follows_from_the_architecture(name: str):
    model = reader.model(name)
    assert closed_form(model) == model.parameters


def test_lora_on_every_linear_layer_of_llama_has_the_published_number_of_parameters():
    from finrepro.catalogue.cells import expand
    from finrepro.catalogue.selection import Selection

    (cell,) = expand(Selection("3", only="llama3_1_8b-none-lora_r8-tfns-s0"), "paper")
    assert (
        kind_module("adapters", cell.spec.adapter.kind).trainable_parameters(
            cell.spec.model, cell.spec.adapter.config
        )
        == 20_971_520
    )  # half of PEFT's 41,943,040 at r = 16


@pytest.mark.parametrize(
    ("read", "name", "near"),
    [
        (reader.model, "gpt2_128m", "gpt2_127m"),
        (reader.adapter, "lora_r", "lora_r8"),
        (reader.optimizer, "adamv", "adamw"),
        (reader.dataset, "tfn", "tfns"),
        (reader.task, "fbp", "fpb"),
        (lambda name: reader.quantizer(name, "float32"), "nf3", "nf4"),
    ],
)
def test_an_unknown_name_gets_the_nearest_and_all_allowed_ones(read, name: str, near: str):
    with pytest.raises(UsageError) as refused:
        read(name)
    message = one_line(refused.value)
    assert (
        f"'{name}'" in message and f"Did you mean '{near}'?" in message and "Allowed: " in message
    )


def test_an_unknown_table_and_template_are_refused():
    with pytest.raises(UsageError, match=r"unknown table '99'.*Allowed: 1, 2, 3, 5\."):
        reader.table("99")
    with pytest.raises(UsageError, match=r"unknown template 'shrt'.*'short'"):
        reader.task("tfns", "shrt")


def test_every_table_file_is_a_table_with_a_report_and_says_what_it_costs():
    for name in reader.tables():
        table = reader.table(name)
        assert hasattr(kind_module("report", table.report), "build")
        head = (PROJECT / "configs" / "tables" / f"{name}.yaml").read_text().split("\n\n")[0]
        assert all(f"# {word}:" in head for word in ("command", "cost", "expect"))
        assert f"--table {name.removeprefix('table')}" in head


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_zero_stage_has_its_settings(stage: int):
    settings = reader.deepspeed_config(stage)
    assert json.loads(json.dumps(settings)) == settings
    assert settings["zero_optimization"]["stage"] == stage


def test_a_broken_zero_file_is_one_line(configs):
    (configs / "deepspeed" / "zero1.json").write_text('{"zero_optimization": ')
    with pytest.raises(UsageError) as refused:
        reader.deepspeed_config(1)
    assert "zero1.json" in one_line(refused.value)
