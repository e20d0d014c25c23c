"""Law: the parts know only the parts below them, nothing heavy is loaded to list cells, and the
tree grows by new files alone.
"""

import ast
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from beartype.roar import BeartypeCallHintParamViolation
from fixtures.annotations import PLAIN
from fixtures.process import environment, python
from jaxtyping import TypeCheckError

from finrepro import PROJECT
from finrepro.catalogue import resolve
from finrepro.evaluation import metrics
from finrepro.evidence.manifest import file_digest
from finrepro.kinds import HOMES

SOURCES = sorted((PROJECT / "finrepro").rglob("*.py"))
FILES = [*SOURCES, PROJECT / "tasks.py"]
HEAVY = (
    "torch",
    "transformers",
    "peft",
    "deepspeed",
    "bitsandbytes",
    "mlflow",
    "datasets",
    "sklearn",
    "scipy",
)
# Where a library may be imported at all, also inside a function.
OWNERS = {
    "mlflow": ("tracking/",),
    "deepspeed": ("training/", "runtime/"),
    "peft": ("methods/adapters/", "exporting/"),
    "bitsandbytes": ("methods/quantizers/", "methods/calibration/", "methods/optimizers/"),
    "gguf": ("models/gguf_file.py",),
    "datasets": ("data/fetch.py", "data/preparing/hub.py"),
    "seqeval": ("evaluation/tasks/entities.py",),
    "sklearn": (),
}
SELECTING = (
    "--adapter --data-dir --devices --full --models-dir --only --quick --scale --seeds "
    "--store --table --weights"
)
COMMANDS = {
    "reproduce": f"{SELECTING} --jobs --keep --plan",
    "cells": SELECTING,
    "budget": "--gpu --gpus --hours --measure --mfu --model --price --sequence --store --tokens "
    "--unique-tokens",
    "data": "--data-dir --documents --fetch --field --on-error --out --prepare --tokenizer "
    "--validation --verify --workers",
    "record": "--rebuild --store",
    "export": "--data-dir --format --models-dir --out --run --store",
    "ui": "--host --port --store",
    "paper": "--store",
    "test": "--only --quick --slow",
    "check": "",
    "bench": "--only --store",
}


def name(path: Path) -> str:
    return (
        path.relative_to(PROJECT / "finrepro").as_posix()
        if path.is_relative_to(PROJECT / "finrepro")
        else path.name
    )


def imports(path: Path) -> set[str]:
    """First parts of everything that the file imports, anywhere in it but under TYPE_CHECKING."""
    found: set[str] = set()
    skipped: set[ast.AST] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if (
            isinstance(node, ast.If)
            and isinstance(node.test, ast.Name)
            and node.test.id == "TYPE_CHECKING"
        ):
            skipped |= {inner for statement in node.body for inner in ast.walk(statement)}
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


def test_the_contracts_of_import_linter_hold(tmp_path: Path):
    tool = Path(sys.executable).parent / "lint-imports"
    if not tool.is_file():
        pytest.fail("lint-imports is not installed: it is part of requirements/dev.lock")
    command = [str(tool), "--cache-dir", str(tmp_path)]
    answer = subprocess.run(
        command, cwd=PROJECT, env=environment(), capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stdout
    assert " 0 broken" in answer.stdout


@pytest.mark.parametrize("library", OWNERS)
def test_a_library_is_imported_only_where_it_belongs(library: str):
    found = {name(path) for path in SOURCES if library in imports(path)}
    assert {path for path in found if not path.startswith(OWNERS[library])} == set()
    assert found or not OWNERS[library], f"nobody imports {library}: is the scan broken?"


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_is_short_enough_to_be_read(path: Path):
    assert len(path.read_text(encoding="utf-8")) <= 12_000


@pytest.mark.parametrize("path", FILES, ids=name)
def test_a_file_says_what_it_is_and_evaluates_its_annotations(path: Path):
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no docstring"
    assert "from __future__ import annotations" not in text, (
        "jaxtyping and pydantic read the annotations"
    )


def test_in_these_tests_every_call_is_held_to_its_annotations():
    for module in PLAIN:
        text = PROJECT.joinpath(*module.split(".")).with_suffix(".py").read_text()
        assert "TYPE_CHECKING" not in text, f"beartype cannot check {module}: leave it to jaxtyping"
    with pytest.raises(BeartypeCallHintParamViolation):
        resolve.foreign_adapter(3)  # type: ignore[arg-type]
    for wrong in (lambda: file_digest("name"), lambda: metrics.accuracy(np.zeros(3))):  # type: ignore[arg-type]
        with pytest.raises(TypeCheckError):
            wrong()


def test_no_file_is_named_after_nothing():
    assert not {path.name for path in SOURCES} & {"utils.py", "helpers.py", "common.py", "misc.py"}


@cache  # Invoke takes a task's help away when it is asked for its options
def commands() -> dict[str, Any]:
    sys.path.insert(0, str(PROJECT))
    import tasks

    return {context.name: context for context in tasks.namespace.to_contexts()}


def test_the_commands_and_their_options_are_the_listed_ones():
    found = {
        command: " ".join(
            sorted({f"--{argument.name.replace('_', '-')}" for argument in context.args.values()})
        )
        for command, context in commands().items()
    }
    assert found == {name: " ".join(sorted(options.split())) for name, options in COMMANDS.items()}


def test_every_command_and_every_option_says_what_it_does():
    import tasks

    for command, context in commands().items():
        assert tasks.namespace[command].__doc__, command
        for argument in context.args.values():
            assert argument.help, f"{command} --{argument.name}"


@pytest.mark.parametrize(
    "arguments",
    [
        ("--list",),
        ("--help", "reproduce"),
        ("cells",),
        ("cells", "--scale", "paper"),
        ("reproduce", "--table", "3", "--plan"),
        ("reproduce", "--table", "1"),
        ("budget", "--gpu", "h200", "--gpus", "8", "--hours", "24"),
        ("data",),
    ],
    ids=" ".join,
)
def test_listing_and_planning_load_nothing_heavy(arguments: tuple[str, ...], tmp_path: Path):
    answer = python("-X", "importtime", "-m", "invoke", *arguments, FINREPRO_STORE=str(tmp_path))
    assert answer.returncode == 0, answer.stderr[-2000:]
    loaded = {
        line.rpartition("|")[2].strip().split(".")[0]
        for line in answer.stderr.splitlines()
        if "|" in line
    }
    assert "invoke" in loaded, "the list of imports could not be read"
    assert not loaded & set(HEAVY)


# Growth: what is added is found without an edit of what is there.


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the project to add to."""
    for part in ("finrepro", "configs"):
        shutil.copytree(
            PROJECT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(PROJECT / "tasks.py", tmp_path)
    return tmp_path


def listed(folder: Path, *arguments: str) -> str:
    answer = python("-m", "invoke", *arguments, cwd=folder, FINREPRO_STORE=str(folder / "store"))
    assert answer.returncode == 0, answer.stderr
    return answer.stdout


def add(path: Path, entries: dict[str, Any]) -> None:
    path.write_text(path.read_text() + "\n" + yaml.safe_dump(entries))


ADAPTER = '''"""Only biases are trained (BitFit)."""
from finrepro.settings import settings
@settings
class Config:
    """No settings but one."""
    also_norms: bool
def supports(model, quantizer, zero_stage, config):
    """Refuses Llama, to see a reason."""
    return "has no biases" if model.family == "llama" else None
def trainable_parameters(model, config):
    """Some."""
    return 1
def apply(model, config, seed):
    """Only biases learn."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias"))
    return model
def export(model, folder):
    """Them."""
'''


def test_a_new_adapter_is_a_file_and_an_entry(copy: Path):
    whole = ("cells", "--scale", "smoke", "--full", "--seeds", "0")
    before = listed(copy, *whole)
    (copy / "finrepro" / "methods" / "adapters" / "bitfit.py").write_text(ADAPTER)
    add(
        copy / "configs" / "adapters.yaml", {"bitfit_norms": {"kind": "bitfit", "also_norms": True}}
    )
    after = listed(copy, *whole)
    lines = {
        line.split()[0]: line for line in after.splitlines() if "bitfit" in line and "-s0" in line
    }
    assert "gpt2_127m_mini-none-bitfit_norms-tfns-s0" in lines
    assert (
        "refused" in lines["llama3_1_8b_mini-nf4-bitfit_norms-fpb-s0"]
        and "has no biases" in lines["llama3_1_8b_mini-nf4-bitfit_norms-fpb-s0"]
    )
    assert "gpt2_127m_mini-none-bitfit_norms-tfns-s0" in listed(
        copy, "cells", "--scale", "smoke"
    )  # the table runs it
    ids = dict(re.findall(r"^(\S+-s0) +([0-9a-f]{12})", before, re.MULTILINE))
    assert (
        ids
        and ids.items()
        <= dict(re.findall(r"^(\S+-s0) +([0-9a-f]{12})", after, re.MULTILINE)).items()
    )


def test_a_new_model_adapter_setting_and_dataset_are_entries_alone(copy: Path):
    configs = copy / "configs"
    models = yaml.safe_load((configs / "models.yaml").read_text())
    add(configs / "models.yaml", {"gpt2_355m": models["gpt2_127m"] | {"parameters": 354823168}})
    add(
        configs / "adapters.yaml",
        {
            "lora_r16": yaml.safe_load((configs / "adapters.yaml").read_text())["lora_r8"]
            | {"r": 16}
        },
    )
    datasets = yaml.safe_load((configs / "datasets.yaml").read_text())
    add(configs / "datasets.yaml", {"more": datasets["tfns"] | {"title": "More tweets"}})
    tasks = yaml.safe_load((configs / "tasks.yaml").read_text())
    add(configs / "tasks.yaml", {"more": tasks["tfns"] | {"dataset": "more"}})
    path = configs / "tables" / "table3.yaml"
    table = yaml.safe_load(path.read_text())
    table["paper"]["axes"] = {
        "model": ["gpt2_355m"],
        "quantizer": ["nf4"],
        "adapter": ["lora_r16"],
        "train_on": ["more"],
        "seed": [0],
    }
    table["paper"] |= {"default": [], "overrides": []}
    path.write_text(yaml.safe_dump(table))
    assert "gpt2_355m-nf4-lora_r16-more-s0" in listed(copy, "cells", "--scale", "paper")
    assert "More tweets" in listed(copy, "data")


def test_a_new_table_is_a_report_and_its_file(copy: Path):
    report = (copy / "finrepro" / "reporting" / "tables" / "table3.py").read_text()
    (copy / "finrepro" / "reporting" / "tables" / "little_data.py").write_text(report)
    table = yaml.safe_load((copy / "configs" / "tables" / "table3.yaml").read_text())
    (copy / "configs" / "tables" / "table8.yaml").write_text(
        yaml.safe_dump(table | {"title": "Little data", "report": "little_data"})
    )
    assert "Table 8" in listed(copy, "reproduce", "--table", "8", "--plan")


@pytest.mark.parametrize(
    "package", ["adapters", "quantizers", "optimizers", "tasks", "datasets", "report"]
)
def test_a_new_kind_is_discovered_in_every_package(copy: Path, package: str):
    (copy.joinpath(*HOMES[package].split(".")) / "brand_new.py").write_text('"""New."""\n')
    answer = python("-c", f"from finrepro.kinds import kinds; print(*kinds('{package}'))", cwd=copy)
    assert "brand_new" in answer.stdout.split(), answer.stderr


def test_the_scan_of_imports_sees_imports_inside_functions_and_not_those_for_types(tmp_path: Path):
    """The planted mutant of the laws above."""
    path = tmp_path / "x.py"
    path.write_text(
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import peft\n"
        "def f():\n    import mlflow.tracking\n"
    )
    assert imports(path) == {"typing", "mlflow"}
