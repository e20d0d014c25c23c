"""Law: a command answers with a table or with one line and its exit code - 2 usage, 3
environment, 1 Invoke's own - never a traceback.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from fixtures.process import environment, python

from finrepro import PROJECT
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.data.files import EMBEDDED
from finrepro.evidence.manifest import damaged_files
from finrepro.evidence.store import open_store

Invoke = Callable[..., "subprocess.CompletedProcess[str]"]
RUN = ("reproduce", "--table", "3")
PAPER = expand(Selection("3"), "paper")


def files(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def refused(answer: "subprocess.CompletedProcess[str]", code: int) -> str:
    """The one line on standard error of a command that ended with `code`."""
    assert answer.returncode == code, answer.stdout + answer.stderr
    assert "Traceback" not in answer.stdout + answer.stderr
    assert answer.stderr.count("\n") == 1 and answer.stderr.startswith("finrepro: "), answer.stderr
    return answer.stderr


USAGE = {
    "no table": (("reproduce",), "--table is needed, one of: 1, 2, 3"),
    "table": (("reproduce", "--table", "33"), "unknown table '33'"),
    "scale": ((*RUN, "--scale", "smok"), "Did you mean 'smoke'?"),
    "pattern": (
        (*RUN, "--scale", "smoke", "--only", "gpt9*"),
        "no cell of table 3 matches --only 'gpt9*'",
    ),
    "adapter": ((*RUN, "--scale", "smoke", "--only", "*-none-lora_r9-tfns-s0"), "Nearest: "),
    "seeds": ((*RUN, "--seeds", "0,x"), "--seeds '0,x'"),
    "weights": ((*RUN, "--weights", "random_"), "Did you mean 'random'?"),
    "jobs": ((*RUN, "--jobs", "0"), "--jobs '0'"),
    "jobs as a superscript": ((*RUN, "--jobs", "²"), "--jobs '²'"),
    "devices": (("cells", "--devices", "two"), "--devices 'two'"),
    "devices as a superscript": (("cells", "--devices", "²"), "--devices '²'"),
    "a corpus without a tokenizer": (
        ("data", "--prepare", "wikitext2"),
        "--prepare needs --tokenizer FOLDER and --out FOLDER",
    ),
    "two commands at once": (
        ("data", "--prepare", "wikitext2", "--verify", "folder"),
        "--prepare and --verify are two commands",
    ),
    "a variable that was not set": (("data", "--verify="), "--verify needs the folder"),
    "a fraction": (
        ("data", "--prepare", "x", "--tokenizer", "x", "--out", "x", "--validation", "x"),
        "--validation 'x'",
    ),
    "dataset": (("data", "--fetch", "fbp"), "Did you mean 'fpb'?"),
    "port": (("ui", "--port", "http"), "--port 'http'"),
    "port as a superscript": (("ui", "--port", "²"), "--port '²'"),
    "port out of range": (("ui", "--port", "65536"), "--port '65536'"),
    "no run": (("export",), "--run is needed"),
    "run": (("export", "--run", "0123456789ab"), "unknown run '0123456789ab': there is no run in"),
    "format": (("export", "--run", "0123456789ab", "--format", "merge"), "Did you mean 'merged'?"),
    "gpu": (("budget", "--gpu", "h20", "--hours", "1"), "Did you mean 'h200'?"),
    "hours": (("budget", "--gpu", "h100", "--hours", "-1"), "--hours '-1'"),
    "an option without cells": (("reproduce", "--table", "1", "--quick"), "--quick does not apply"),
    "the cells of a table without": (
        ("cells", "--table", "1", "--devices", "2"),
        "--devices does not apply",
    ),
    "bytes that are no UTF-8": ((*RUN, "--store", "/tmp/a\udcffb"), "its bytes are no UTF-8"),
    "a line break": ((*RUN, "--store", "a\nb"), "control characters and line breaks"),
    "a control character": ((*RUN, "--only", "a\x1b[31m"), "control characters and line breaks"),
    "a long name": (("cells", "--adapter", "a" * 250), "200 bytes at most"),
    "benchmark": (("bench", "--only", "nothing"), "unknown benchmark 'nothing'"),
}


@pytest.mark.parametrize("case", USAGE)
def test_a_wrong_request_is_one_line_and_exit_code_2(case: str, invoke: Invoke, tmp_path: Path):
    arguments, said = USAGE[case]
    assert said in refused(invoke(*arguments, FINREPRO_STORE=str(tmp_path / "store")), 2)
    assert set(files(tmp_path)) <= {"store/results/store.json"}, "something was written"


@pytest.mark.parametrize(
    "arguments", [(*RUN, "--colour"), ("reprodoce",), (*RUN, "--quick=maybe")], ids=" ".join
)
def test_what_invoke_rejects_ends_with_1_in_its_own_words(
    arguments: tuple[str, ...], invoke: Invoke, tmp_path: Path
):
    answer = invoke(*arguments, FINREPRO_STORE=str(tmp_path / "store"))
    assert answer.returncode == 1 and "Traceback" not in answer.stderr and answer.stderr.strip()
    assert not files(tmp_path)


def test_folders_that_are_not_there_or_cannot_be_are_one_line(invoke: Invoke, tmp_path: Path):
    for flag in ("--data-dir", "--models-dir"):
        assert flag in refused(invoke("cells", flag, str(tmp_path / "none")), 3)
        assert flag in refused(invoke("cells", flag, str(tmp_path / ("x" * 300))), 2)


@pytest.mark.parametrize(
    ("arguments", "store"),
    [
        (RUN, "/proc/finrepro"),
        (RUN, "/dev/null/below"),
        (("cells",), "/sys/finrepro"),
        (("record",), "/dev/null"),
        (("export", "--run", "0123456789ab"), "/proc/finrepro"),
        (("ui",), "/proc/finrepro"),
    ],
)
def test_a_store_that_cannot_be_written_is_one_line_and_exit_code_3(
    arguments: tuple[str, ...], store: str, invoke: Invoke
):
    assert store in refused(invoke(*arguments, "--store", store), 3)


def test_a_store_of_a_newer_version_is_one_line_and_exit_code_3(invoke: Invoke, tmp_path: Path):
    mark = open_store(tmp_path).results / "store.json"
    mark.write_text('{"format": 99}')
    before = files(tmp_path)
    assert "format 99" in refused(invoke(*RUN, "--store", str(tmp_path)), 3)
    assert files(tmp_path) == before


def test_a_store_in_use_is_one_line_and_exit_code_3(invoke: Invoke, tmp_path: Path):
    with open_store(tmp_path).lock():
        answer = invoke(*RUN, "--scale", "paper", "--store", str(tmp_path))
        assert "another command (process " in refused(answer, 3)


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the project to spoil."""
    for part in ("finrepro", "configs"):
        shutil.copytree(
            PROJECT / part,
            tmp_path / "project" / part,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    shutil.copy(PROJECT / "tasks.py", tmp_path / "project")
    return tmp_path / "project"


@pytest.mark.parametrize(
    ("name", "old", "new", "said"),
    [
        ("adapters", "r: 8", "r: [8", "adapters.yaml, line "),
        ("adapters", "r: 8", "r: '8'", "adapters.lora_r8.r"),
        ("adapters", "r: 8", "rank: 8", "unknown setting 'rank'"),
        ("tables/table3", "lr: 1.0e-3", "lr: 1e-3", "train.lr"),
        ("tables/table3", "report: table3", "report: table4", "unknown kind 'table4'"),
        ("models", "n_layer: 2,", "n_layer: off,", "architecture needs"),
    ],
)
def test_a_spoiled_configuration_is_one_line_and_exit_code_2(
    copy: Path, name: str, old: str, new: str, said: str
):
    path = copy / "configs" / f"{name}.yaml"
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new, 1))
    store = copy.parent / "store"
    answer = python("-m", "invoke", *RUN, "--scale", "smoke", cwd=copy, FINREPRO_STORE=str(store))
    assert said in refused(answer, 2)
    assert set(files(store)) <= {"results/store.json"}


@pytest.mark.slow
def test_a_truncated_data_file_fails_its_cells_in_one_line_and_the_table_is_printed(copy: Path):
    path = copy / EMBEDDED.relative_to(PROJECT) / "tfns" / "sent_valid.csv"
    path.write_bytes(path.read_bytes()[:-1000])
    store = copy.parent / "store"
    answer = python(
        "-m", "invoke", *RUN, "--quick", "--scale", "smoke", cwd=copy, FINREPRO_STORE=str(store)
    )
    assert answer.returncode == 4 and "Traceback" not in answer.stdout + answer.stderr
    states = [json.loads(path.read_text()) for path in store.glob("results/runs/*/result.json")]
    assert states and {each["status"] for each in states} == {"failed"}
    named = [each["reason"] for each in states if not each["reason"].startswith("its base ")]
    assert named and all("sha256" in reason and "sent_valid.csv" in reason for reason in named)
    assert (store / "results" / "tables" / "smoke" / "table3-quick.md").is_file()


def test_a_plan_prints_every_cell_and_runs_nothing(invoke: Invoke, tmp_path: Path):
    answers = [
        invoke(*RUN, "--plan", "--scale", "smoke", "--jobs", jobs, FINREPRO_STORE=str(tmp_path))
        for jobs in ("1", "3")
    ]
    assert [answer.returncode for answer in answers] == [0, 0] and answers[0].stderr == ""
    listings = [re.sub(r"About .* min", "", answer.stdout) for answer in answers]
    assert listings[0] == listings[1], "--jobs is no part of a cell"
    assert "gpt2_127m_mini-none-full-tfns-s0" in answers[0].stdout and "Plan: " in answers[0].stdout
    assert "full fine-tuning cannot train weights stored as nf4" in answers[0].stdout
    assert set(files(tmp_path)) == {"results/store.json"}


def test_cells_lists_label_run_id_state_and_reason(invoke: Invoke):
    answer = invoke(
        "cells",
        "--scale",
        "smoke",
        "--full",
        "--seeds",
        "0",
        "--only",
        "gpt2_127m_mini-*",
        HF_HOME="/nowhere",
    )
    rows = {line.split()[0]: line for line in answer.stdout.splitlines() if "-s0 " in line}
    assert answer.returncode == 0 and len(rows) == 7 * 14 * 9 + 1, "the base as well"
    assert "not run" in rows["gpt2_127m_mini-none-full-tfns-s0"]
    assert (
        "skipped" in rows["gpt2_127m_mini-none-full-fpb-s0"]
        and "--data-dir" in rows["gpt2_127m_mini-none-full-fpb-s0"]
    )
    assert "refused" in rows["gpt2_127m_mini-nf4-full-tfns-s0"]


@pytest.fixture(scope="module")
def at_paper_scale(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple["subprocess.CompletedProcess[str]", Path]:
    """The table at paper scale where there are neither weights nor data."""
    store = tmp_path_factory.mktemp("paper") / "store"
    answer = python(
        "-m",
        "invoke",
        *RUN,
        "--scale",
        "paper",
        FINREPRO_STORE=str(store),
        HF_HOME=str(store / "hub"),
    )
    return answer, store


def test_without_weights_the_paper_table_prints_with_reasons_and_ends_with_0(at_paper_scale):
    answer, store = at_paper_scale
    assert answer.returncode == 0 and answer.stderr == "", answer.stderr
    assert "weights of openai-community/gpt2 not found" in answer.stdout
    table = json.loads((store / "results" / "tables" / "paper" / "table3.json").read_text())
    cells = [cell for line in table["lines"] for cell in line["evidence"].get("cells", [])]
    assert sorted(cell["label"] for cell in cells) == sorted(cell.label for cell in PAPER)
    assert {cell["state"] for cell in cells} == {"skipped"}
    assert all(cell["reason"] and not cell["scores"] for cell in cells)
    assert "SMOKE" not in table["caption"]
    assert {path.suffix for path in (store / "results" / "tables" / "paper").iterdir()} == {
        ".json",
        ".md",
        ".tex",
    }


def test_every_skipped_cell_is_on_record_and_is_no_run_in_mlflow(at_paper_scale, invoke: Invoke):
    _, store = at_paper_scale
    place = open_store(store)
    folders = list((place.results / "runs").iterdir())
    assert len(folders) == len(PAPER) and not [
        name for folder in folders for name in damaged_files(folder)
    ]
    (campaign,) = place.campaigns()
    assert campaign["status"] == "finished" and len(campaign["cells"]) == len(PAPER)
    answer = invoke("record", "--store", str(store))
    assert answer.returncode == 0 and answer.stdout == f"{len(PAPER)} results, 0 damaged\n"
    assert not (store / "mlruns" / "mlflow.db").exists(), "nothing ran"


def test_one_skipped_cell_by_itself_ends_with_3(at_paper_scale, invoke: Invoke):
    _, store = at_paper_scale
    only = ("--only", "gpt2_127m-nf4-lora_r8-tfns-s0")
    answer = invoke(
        *RUN, "--scale", "paper", *only, "--store", str(store), HF_HOME=str(store / "hub")
    )
    assert answer.returncode == 3 and "Traceback" not in answer.stderr
    assert "weights of openai-community/gpt2 not found" in answer.stdout


def test_a_tampered_result_is_found_and_ends_with_4(at_paper_scale, invoke: Invoke, tmp_path: Path):
    shutil.copytree(at_paper_scale[1] / "results", tmp_path / "results")
    folder = next((tmp_path / "results" / "runs").iterdir())
    (folder / "result.json").write_text(
        (folder / "result.json").read_text().replace("skipped", "done")
    )
    answer = invoke("record", "--store", str(tmp_path))
    assert answer.returncode == 4
    assert (
        answer.stdout == f"damaged: {folder.name}: result.json\n{len(PAPER)} results, 1 damaged\n"
    )


def test_data_lists_licences_and_the_way_to_what_is_missing(invoke: Invoke, tmp_path: Path):
    answer = invoke("data", HF_HOME=str(tmp_path))
    assert answer.returncode == 0 and re.search(r"licence: +CC BY-NC-SA 3.0", answer.stdout)
    assert "here (embedded)" in answer.stdout and "invoke data --fetch fpb" in answer.stdout


def test_a_fetch_without_network_is_one_line_and_exit_code_3(invoke: Invoke, tmp_path: Path):
    assert "could not fetch" in refused(invoke("data", "--fetch", "fpb", HF_HOME=str(tmp_path)), 3)
    assert not [path for path in files(tmp_path) if "finrepro" in path]


def test_record_of_an_empty_store_has_nothing_to_say(invoke: Invoke, tmp_path: Path):
    answer = invoke("record", "--store", str(tmp_path))
    assert (answer.returncode, answer.stdout, answer.stderr) == (0, "0 results, 0 damaged\n", "")


@pytest.mark.slow
def test_a_store_may_have_a_name_with_spaces_and_umlauts(invoke: Invoke, tmp_path: Path):
    store = tmp_path / "mein Ordner ü #1"
    answer = invoke(
        *RUN,
        "--scale",
        "smoke",
        "--weights",
        "random",
        "--only",
        "gpt2_127m_mini-none-base-tfns-s0",
        "--store",
        str(store),
    )
    assert answer.returncode == 0, answer.stderr
    assert (
        len(list((store / "results" / "runs").iterdir())) == 1
        and (store / "mlruns" / "mlflow.db").is_file()
    )
    assert {path.name for path in tmp_path.iterdir()} == {store.name}, "the view lies elsewhere"


def test_a_port_that_is_taken_is_one_line_and_exit_code_3(invoke: Invoke):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"port {port} of 127.0.0.1 is in use" in refused(invoke("ui", "--port", port), 3)


@pytest.mark.parametrize("size", ["600k", pytest.param("2m", marks=pytest.mark.slow)])
def test_a_full_disk_is_one_line_and_exit_code_3(size: str, invoke: Invoke, tmp_path: Path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        shutil.which("mount")
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(disk)],
            capture_output=True,
            check=False,
        ).returncode
    )
    if not mounted:
        pytest.skip("a small file system is needed, and this process may not mount one")
    try:
        store = disk / "store"
        answer = invoke(*RUN, "--scale", "paper", "--store", str(store), HF_HOME=str(tmp_path))
        assert "no space left" in refused(answer, 3)
        folders = list((store / "results" / "runs").iterdir())
        assert folders and not [name for folder in folders for name in damaged_files(folder)], (
            "half-written"
        )
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_the_help_of_a_command_needs_no_store_and_no_environment(tmp_path: Path):
    answer = subprocess.run(
        [*python_command(), "--help", "reproduce"],
        cwd=PROJECT,
        env=environment(FINREPRO_STORE="/proc/none"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0 and "--models-dir" in answer.stdout


def python_command() -> list[str]:
    import sys

    return [sys.executable, "-m", "invoke"]
