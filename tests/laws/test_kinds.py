"""Law: a kind fulfils its contract, or is refused by name as soon as it is met."""

import ast
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from fixtures.planted import plant
from fixtures.process import one_line

from finrepro import PROJECT, contracts, kinds
from finrepro.catalogue import reader
from finrepro.errors import UsageError
from finrepro.kinds import (
    CONTRACTS,
    HOMES,
    adapter_of,
    choose,
    computed_report_of,
    implementation,
    kind_module,
    members,
    report_of,
)
from finrepro.methods.adapters import full, lora

COMPUTED = {"table1"}  # tables without cells
KINDS = [(package, kind) for package in HOMES for kind in kinds.kinds(package)]

CONFIG = """
from finrepro.settings import settings
@settings
class Config:
    strength: int
"""
# The least that a module of each kind has to define.
WHOLE = {
    "adapters": CONFIG
    + """
def supports(model, quantizer, zero_stage): ...
def trainable_parameters(model, config): return config.strength
def apply(model, config, seed): return model, config.strength, seed
def export(model, folder): ...
""",
    "quantizers": CONFIG
    + """
linear = None
def encode(weight, config): return weight, config.strength
def decode(stored): return stored
def stored_bytes(stored): return 1
def layer_bytes(config, inputs, outputs, dtype_bits): return inputs * outputs
""",
    "optimizers": CONFIG + "def build(named_parameters, lr, config): return named_parameters, lr\n",
    "datasets": CONFIG + "def read(contents, name, config): return {}\n",
    "tasks": CONFIG
    + """
def prompt(example, config): ...
def target(example, config): ...
def choices(example, config): ...
def parse(output, example, config): ...
def cluster(example): ...
def constant_answers(config): return ()
def constant(answer, example, config): ...
def tally(rows, config): ...
def score(sums, config): ...
""",
    "report": "def build(rows, scale, published=()): ...\n",
}
# A mistake of each kind: what is written instead of what, and what the error has to say.
MISTAKES = [
    ("adapters", "def export(", "def exprot(", "'exprot' is no name of it; did you mean 'export'"),
    ("adapters", "def export(model, folder): ...", "", "it has no 'export(model, folder)'"),
    ("adapters", "class Config", "class Settings", "it has no 'Config'"),
    (
        "adapters",
        "def export(",
        "def before_step(view, config, step): ...\ndef export(",
        "'before_step(view, config, step)' has to be 'before_step(view, step, max_steps)'",
    ),
    (
        "adapters",
        "def export(",
        "def befor_step(view, step, max_steps): ...\ndef export(",
        "did you mean 'before_step'",
    ),
    ("adapters", "def export(", "whole_model = True\ndef export(", "did you mean 'WHOLE_MODEL'"),
    ("adapters", "def export(", "def WHOLE_MODEL(): ...\ndef export(", "has to be a constant"),
    ("adapters", "def export(", "lr_scale = 2.0\ndef export(", "'lr_scale' has to be a function"),
    ("quantizers", "linear = None", "", "it has no 'linear(stored, bias)'"),
    ("quantizers", "linear = None", "def linear(stored): ...", "'linear(stored)' has to be"),
    ("quantizers", "def decode(stored)", "def decode(codes)", "has to be 'decode(stored)'"),
    ("optimizers", "def build(", "def bulid(", "did you mean 'build'"),
    ("datasets", "def read(", "def neded(split): ...\ndef read(", "did you mean 'needed'"),
    ("datasets", "contents, name, config", "name, contents, config", "read(contents, name)"),
    ("tasks", "def tally(", "def taly(", "did you mean 'tally'"),
    ("tasks", "def tally(", "def new_token(config): ...\ndef tally(", "did you mean 'new_tokens'"),
    ("report", "def build(rows, scale", "def build(rows, size", "build(rows, scale, published)"),
    ("report", "def build(", "def panel(rows): ...\ndef build(", "did you mean 'panels'"),
]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """`home(package, source)`: a module `planted` in the folder of that kind, for as long as the
    test lasts.
    """

    def add(package: str, source: str) -> None:
        (tmp_path / "planted.py").write_text(f'"""A planted kind."""\n{source}')
        parent = sys.modules[kind_module(package, kinds.kinds(package)[0]).__package__ or ""]
        monkeypatch.setattr(parent, "__path__", [*parent.__path__, str(tmp_path)])
        sys.modules.pop(f"{HOMES[package]}.planted", None)
        kinds.kinds.cache_clear()

    yield add
    monkeypatch.undo()
    kinds.kinds.cache_clear()
    for package in HOMES.values():
        sys.modules.pop(f"{package}.planted", None)


@pytest.mark.parametrize(("package", "kind"), KINDS)
def test_every_kind_fulfils_its_contract(package: str, kind: str):
    contract = "computed report" if kind in COMPUTED else package
    assert CONTRACTS[contract] in implementation(package, kind, contract=contract).__mro__


@pytest.mark.parametrize("package", HOMES)
def test_the_least_that_a_kind_defines_is_enough(package: str, home: Any):
    home(package, WHOLE[package])
    assert implementation(package, "planted")


@pytest.mark.parametrize(("package", "correct", "mistake", "words"), MISTAKES)
def test_a_mistake_in_a_kind_is_one_line_with_file_name_and_nearest_match(
    package: str, correct: str, mistake: str, words: str, home: Any
):
    assert correct in WHOLE[package]
    home(package, WHOLE[package].replace(correct, mistake))
    with pytest.raises(UsageError) as refused:
        if package == "report":
            report_of("planted")
        else:
            choose(package, "x", {"kind": "planted", "strength": 3}, f"{package}.x")
    message = one_line(refused.value)
    assert words in message and f"{HOMES[package].replace('.', '/')}/planted.py" in message


def test_a_helper_may_have_any_name_that_is_not_nearly_one_of_the_contract(home: Any):
    helpers = "def export_factors(model): ...\ndef _exprot(): ...\nLAYERS = 3\nstate_of = len\n"
    home("adapters", WHOLE["adapters"] + helpers)
    assert implementation("adapters", "planted")


def test_a_report_of_the_other_sort_is_refused():
    with pytest.raises(UsageError, match="has to be 'build"):
        report_of("table1")
    with pytest.raises(UsageError, match="has to be 'build"):
        computed_report_of("table3")


def test_settings_are_bound_wherever_a_function_takes_them(home: Any):
    home("adapters", WHOLE["adapters"])
    bound = adapter_of(choose("adapters", "x", {"kind": "planted", "strength": 3}, "adapters.x"))
    model: Any = object()
    assert bound.trainable_parameters(model) == bound.config.strength == 3
    assert bound.apply(model, 7) == bound.apply(model, seed=7) == (model, 3, 7)


def test_what_a_kind_leaves_out_has_the_contracts_default(home: Any):
    home("adapters", WHOLE["adapters"])
    bound = adapter_of(choose("adapters", "x", {"kind": "planted", "strength": 3}, "adapters.x"))
    model: Any = object()
    assert bound.exported_parameters(model, 10) == 3
    assert bound.lr_scale("x") == bound.lr_factor(0, 10) == 1
    assert bound.prepare is bound.extra_loss is bound.read is None
    assert not bound.WHOLE_MODEL and not bound.RESETS_MOMENTS and bound.NOT_EXPORTED == {}


def test_two_entries_of_one_kind_keep_their_own_settings():
    eight, sixteen = (
        adapter_of(choose("adapters", "x", dict(entry) | {"r": r}, "adapters.x"))
        for entry in (reader.entry("adapters", "lora_r8", "adapter"),)
        for r in (8, 16)
    )
    model = reader.model("gpt2_127m")
    assert 2 * eight.trainable_parameters(model) == sixteen.trainable_parameters(model)


def test_every_name_of_a_contract_is_documented():
    source = inspect.getsource(contracts)
    for contract in CONTRACTS.values():
        assert inspect.getdoc(contract)
        for name, member in members(contract).items():
            function = getattr(contract, name, None)
            assert name in source and (
                member.parameters is None or function is None or function.__doc__
            )


def test_contracts_and_what_binds_them_import_no_torch():
    from fixtures.process import python

    script = "import sys, json, finrepro.kinds; print(json.dumps(sorted(sys.modules)))"
    loaded = json.loads(python("-c", script).stdout)
    assert "finrepro.contracts" in loaded
    assert not {"torch", "finrepro.catalogue", "finrepro.methods"} & set(loaded)


def test_what_a_test_plants_is_what_runs_and_is_gone_after_it():
    choice = reader.adapter("full")
    with pytest.MonkeyPatch.context() as patch:
        plant(patch, full, own_base=lambda quantizer: f"{quantizer.name}, planted")
        assert adapter_of(choice).own_base(choice) == "full, planted"
    assert adapter_of(choice).own_base(choice) is None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora, "lr_scale", lambda *_: 5.0)
        assert adapter_of(reader.adapter("lora_r8")).lr_scale("x") == 5
    assert adapter_of(reader.adapter("lora_r8")).lr_scale("x") == 1


def test_no_caller_looks_a_name_of_a_kind_up_by_a_string():
    """What a kind has is a member of its contract, which mypy knows."""
    names = {name for contract in CONTRACTS.values() for name in members(contract)}
    looked_up = [
        (path.relative_to(PROJECT).as_posix(), node.lineno)
        for path in sorted((PROJECT / "finrepro").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id in ("getattr", "hasattr")
        and isinstance(node.args[1], ast.Constant)
        and node.args[1].value in names
    ]
    assert looked_up == []


def test_a_planted_module_is_not_left_behind():
    assert "planted" not in kinds.kinds("adapters")
    assert isinstance(kind_module("adapters", "full"), ModuleType)
