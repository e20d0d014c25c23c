"""The package from Python: light to import, typed, and the same as the commands."""

import ast
import importlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from fixtures import results
from fixtures.process import environment, one_line, python

import finrepro
from finrepro import PROJECT, api
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.errors import EnvironmentFault, UsageError
from finrepro.evidence import files, store
from finrepro.evidence.place import Place
from finrepro.evidence.result import header

SCORE = results.score("tfns", "accuracy", 0.7)
DOCUMENT = PROJECT / "docs" / "python.md"


def test_the_import_loads_nothing_that_is_not_used():
    program = (
        "import sys; before = set(sys.modules); import finrepro; print(*set(sys.modules) - before)"
    )
    loaded = {name.partition(".")[0] for name in python("-c", program).stdout.split()}
    assert "finrepro" in loaded, "the list of modules could not be read"
    assert not loaded & {"torch", "pandas", "numpy", "pydantic", "yaml", "invoke", "rich"}


def test_every_name_of_the_door_is_a_function_with_its_types():
    tree = ast.parse((PROJECT / "finrepro" / "__init__.py").read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    (block,) = guarded.body
    assert isinstance(block, ast.ImportFrom) and block.module == "finrepro.api"
    assert sorted(alias.name for alias in block.names) == finrepro.__all__, "what checkers see"
    for name in finrepro.__all__:
        function = getattr(finrepro, name)
        assert function is getattr(api, name) and function.__doc__
        assert "return" in function.__annotations__
    assert set(finrepro.__all__) <= set(dir(finrepro))
    with pytest.raises(AttributeError, match="no attribute 'reprodoce'"):
        finrepro.reprodoce  # noqa: B018


def test_no_folder_of_the_package_takes_the_place_of_a_function():
    for path in (PROJECT / "finrepro").iterdir():
        if path.suffix == ".py" or (path / "__init__.py").is_file():
            assert path.stem not in finrepro.__all__
    importlib.import_module("finrepro.budgeting.command")
    assert callable(finrepro.budget)


def test_commands_know_the_door_alone():
    allowed = ("finrepro.api", "finrepro.arguments", "finrepro.commands", "finrepro.errors")
    paths = [PROJECT / "tasks.py", *(PROJECT / "finrepro" / "commands").glob("*.py")]
    modules = {
        name
        for path in paths
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("finrepro")
        for name in (
            [f"finrepro.{alias.name}" for alias in node.names]
            if node.module == "finrepro"
            else [str(node.module)]
        )
    }
    names = {name for name in modules if not name.startswith(allowed)}
    assert names <= {"finrepro.PROJECT", "finrepro.__version__"}
    assert "finrepro.api" in modules, "the scan of imports is broken"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"table": 33}, "unknown table '33'"),
        ({"table": 3, "seeds": [1, 1]}, "--seeds '1,1'"),
        ({"table": 3, "seeds": [-1]}, "--seeds '-1'"),
        ({"table": 3, "jobs": 0}, "--jobs '0'"),
        ({"table": 3, "devices": 0}, "--devices '0'"),
        ({"table": 1, "quick": True}, "--quick does not apply"),
        ({"table": 1, "jobs": 2}, "--jobs does not apply"),
    ],
    ids=str,
)
@pytest.mark.parametrize("function", [finrepro.plan, finrepro.reproduce])
def test_a_wrong_value_is_one_line(
    function: Any, arguments: dict[str, Any], message: str, tmp_path: Path
):
    with pytest.raises(UsageError) as refused:
        function(**arguments, store=tmp_path)
    assert message in one_line(refused.value)
    assert not (tmp_path / "results" / "tables" / "paper").exists()


def test_a_folder_that_is_not_there_is_one_line(tmp_path: Path):
    for arguments in ({"data_dir": tmp_path / "none"}, {"models_dir": str(tmp_path / "none")}):
        with pytest.raises(EnvironmentFault) as fault:
            finrepro.cells(3, store=tmp_path, **arguments)
        assert "none is not a folder" in one_line(fault.value)


def test_cells_and_the_plan_are_those_of_the_commands(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    selected = {"scale": "smoke", "quick": True, "store": tmp_path}
    steps = finrepro.cells(3, **selected)
    labels = [cell.label for cell in expand(Selection("3", quick=True), "smoke")]
    assert [step.spec.label for step in steps if not step.is_base] == labels
    assert {step.state for step in steps} == {"not run"}
    plan = finrepro.plan("table3", **selected)
    assert plan.steps == steps and (plan.scale, plan.why) == ("smoke", "asked for")
    plan.show()
    printed = capsys.readouterr().out
    typed = python(
        "-m", "invoke", "cells", "--scale", "smoke", "--quick", FINREPRO_STORE=str(tmp_path)
    )
    assert typed.stdout == printed and labels[0] in printed


def test_a_table_of_sizes_is_made_and_comes_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    reproduced = finrepro.reproduce(1, store=tmp_path, quiet=True)
    assert capsys.readouterr().out == ""
    assert reproduced.table.name == "table1" and reproduced.states == {}
    assert (reproduced.folder / "table1.md").is_file()
    reproduced.show()
    assert str(reproduced.folder) in capsys.readouterr().out
    assert finrepro.cells(1, store=tmp_path) == ()


def test_a_campaign_without_weights_gives_states_and_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    label = "gpt2_127m-nf4-lora_r8-tfns-s0"
    reproduced = finrepro.reproduce(3, "paper", only=label, store=tmp_path, quiet=True)
    assert reproduced.states == {label: "skipped"} and reproduced.scale == "paper"
    assert capsys.readouterr().out == ""
    (campaign,) = store.open_store(tmp_path).campaigns()
    assert campaign["command"] == f"reproduce --table 3 --scale paper --only {label}"


def seal(place: Place, label: str, **changes: Any) -> str:
    (cell,) = expand(Selection("3", only=label), "smoke")
    result = header(cell.spec, store.DONE, None, time.time()) | changes
    with place.store.new_run(cell.spec.run_id) as target:
        files.write_json(target / "result.json", result)
    return cell.spec.run_id


def test_results_are_a_frame_of_scores_that_hides_nothing(place: Place):
    older = header(expand(Selection("3"), "smoke")[0].spec, store.DONE, None, 0.0)["environment"]
    scores = [SCORE, SCORE | {"metric": "f1_macro"}]
    finished = seal(place, "gpt2_127m_mini-none-full-tfns-s0", scores=scores)
    stale = seal(
        place,
        "gpt2_127m_mini-none-base-tfns-s0",
        scores=[SCORE],
        environment=older | {"source_digest": "0" * 64},
    )
    failed = seal(
        place, "gpt2_127m_mini-nf4-lora_r8-tfns-s0", status=store.FAILED, reason="out of memory"
    )
    (place.store.results / "runs" / "0123456789ab").mkdir()  # nothing that can be read
    frame = finrepro.results(place.store.root)
    assert frame.groupby("run_id").state.first().to_dict() == {
        finished: "done",
        stale: "stale",
        failed: "failed",
        "0123456789ab": "damaged",
    }
    rows = frame.set_index(["run_id", "metric"])
    assert rows.loc[(finished, "accuracy"), "value"] == 0.7
    assert len(frame) == 5 and set(frame.scale.dropna()) == {"smoke"}
    (lost,) = frame[frame.run_id == failed].to_dict("records")
    assert lost["reason"] == "out of memory" and lost["value"] != lost["value"], "not a number"
    assert finrepro.results(place.store.root / "empty").empty


def test_a_budget_and_the_check_of_a_store_are_values(
    place: Place, capsys: pytest.CaptureFixture[str]
):
    root = place.store.root
    answer = finrepro.budget(gpu="h200", gpus=8, hours=24.0, store=root)
    written = json.loads(answer.path.with_name(f"{answer.path.name}.json").read_text())
    assert written == json.loads(json.dumps(answer.values))
    run_id = seal(place, "gpt2_127m_mini-none-full-tfns-s0")
    assert finrepro.record(store=root).damaged == {}
    (place.store.run_folder(run_id) / "result.json").write_text("{}")
    checked = finrepro.record(store=root)
    assert checked.damaged == {run_id: ["result.json"]} and checked.results == 1
    assert capsys.readouterr().out == "", "a function prints nothing unless it is asked to"


def lines_of_the_document() -> str:
    (code,) = re.findall(r"```python\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    return str(code)


def test_the_document_shows_about_ten_lines_and_every_function():
    assert len(lines_of_the_document().splitlines()) <= 12
    for name in finrepro.__all__:
        assert f"`{name}(" in DOCUMENT.read_text(), name


@pytest.mark.slow
def test_the_lines_of_the_document_run_as_they_stand(tmp_path: Path):
    program = tmp_path / "lines.py"
    program.write_text(lines_of_the_document())
    answer = subprocess.run(
        [sys.executable, str(program)],
        cwd=tmp_path,
        env=environment(PYTHONPATH=str(PROJECT)),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert re.search(r"torch.Size\(\[1, \d+, \d+\]\)", answer.stdout), answer.stdout
    # The base is a miniature that no hub has: it goes along, beside the adapter.
    assert (tmp_path / "adapter" / "adapter" / "adapter_config.json").is_file()
    assert "gpt2_127m_mini-nf4-lora_r8-tfns-s0" in answer.stdout and "f1_" in answer.stdout
    frame = finrepro.results(tmp_path / "store")
    assert set(frame.state) == {"done"} and len(set(frame.run_id)) == 3
    assert {path.name for path in tmp_path.iterdir()} == {"lines.py", "store", "adapter"}
