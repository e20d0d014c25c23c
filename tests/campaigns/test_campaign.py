"""The main job as a user runs it: the same bits twice, nothing twice, nothing lost, and one crash
costs one cell.

Whole processes on the embedded data: `invoke reproduce --table 3 --quick`, narrowed to the GPT-2
miniature (one pretraining, two cells).
"""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from fixtures.evidence import evidence, results

from finrepro import PROJECT
from finrepro.evidence.manifest import damaged_files

pytestmark = pytest.mark.slow

BASE, FULL, QLORA = (
    "gpt2_127m_mini-none-full-tfns_text-s0",
    "gpt2_127m_mini-none-full-tfns-s0",
    "gpt2_127m_mini-nf4-lora_r8-tfns-s0",
)
WATCH = """
import sys
def hook(event, arguments):
    if event != "socket.connect" or not isinstance(arguments[1], tuple):
        return
    if not str(arguments[1][0]).startswith(("127.", "::1", "localhost")):
        with open({log!r}, "a") as file:
            file.write(repr(arguments[1]) + "\\n")
sys.addaudithook(hook)
"""


def start(store: Path, *options: str, **environment: str) -> "subprocess.Popen[str]":
    """Start the main job, without the environment's own settings."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("FINREPRO_STORE", "FINREPRO_DATA_DIR")
    }
    command = [
        sys.executable,
        "-m",
        "invoke",
        "reproduce",
        "--table",
        "3",
        "--scale",
        "smoke",
        "--quick",
    ]
    return subprocess.Popen(
        [*command, "--only", "gpt2*", "--jobs", "1", "--store", str(store), *options],
        cwd=PROJECT,
        env=kept | {"PYTHONPATH": str(PROJECT)} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def reproduce(store: Path, *options: str, code: int = 0, **environment: str) -> str:
    """Run the main job to its end; what it printed."""
    process = start(store, *options, **environment)
    output, _ = process.communicate(timeout=900)
    assert process.returncode == code, output[-3000:]
    return output


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A store filled from cold, and what the command printed."""
    store = tmp_path_factory.mktemp("first")
    watch = tmp_path_factory.mktemp("watch")
    (watch / "sitecustomize.py").write_text(WATCH.format(log=str(watch / "connections")))
    output = reproduce(store, PYTHONPATH=f"{watch}:{PROJECT}")
    assert not (watch / "connections").exists(), (watch / "connections").read_text()
    return store, output


def test_a_cold_run_fills_the_table(first: tuple[Path, str]) -> None:
    store, output = first
    found = results(store)
    assert set(found) == {BASE, FULL, QLORA}
    assert all(result["status"] == "done" for result in found.values())
    assert "SMOKE" in output and "(short)" in output and str(store) in output
    for suffix in ("md", "tex", "json"):
        assert "SMOKE" in (store / "results/tables/smoke" / f"table3-quick.{suffix}").read_text()
    for result in found.values():
        assert damaged_files(store / "results/runs" / result["run_id"]) == []
        assert result["costs"]["peak_memory_bytes"] > 10**8
        phases = {
            key: peak
            for key, peak in result["costs"].items()
            if key.startswith("peak_") and key != "peak_memory_bytes"
        }
        assert set(phases) == {
            f"peak_{each}_bytes"
            for each in ("data", "load", "backward", "step", "evaluate", "save")
        }
        assert max(phases.values()) == result["costs"]["peak_memory_bytes"]
        assert result["cell"]["attention"]["train"] in ("sdpa", "sdpa per segment")
        assert result["cell"]["layout"] == {"used": "padded", "seconds": {}}
        assert result["environment"]["source_digest"] and all(
            result["data"]["fingerprints"].values()
        )
    assert found[QLORA]["spec"]["base_run"] == found[BASE]["run_id"]


def test_losses_fall_and_weights_move(first: tuple[Path, str]) -> None:
    store, _ = first
    for label, result in results(store).items():
        lines = (store / "results/runs" / result["run_id"] / "loss.jsonl").read_text().splitlines()
        losses = [json.loads(line)["loss"] for line in lines]
        tenth = max(1, len(losses) // 10)
        assert all(json.loads(line)["grad_norm"] > 0 for line in lines), label
        assert sum(losses[-tenth:]) < 0.9 * sum(losses[:tenth]), label
    from safetensors.numpy import load_file

    folder = store / "results/runs" / results(store)[QLORA]["run_id"] / "weights"
    tensors = load_file(folder / "adapter_model.safetensors")
    assert tensors and all(
        abs(value).max() > 0 for name, value in tensors.items() if "lora_B" in name
    ), "B starts at zero"


def test_running_again_computes_nothing(
    first: tuple[Path, str],
) -> None:
    store, _ = first
    before = {path: path.stat().st_mtime_ns for path in store.glob("results/runs/*/*")}
    output = reproduce(store)
    assert "0 to run" in output
    assert {path: path.stat().st_mtime_ns for path in store.glob("results/runs/*/*")} == before
    assert len(list(store.glob("results/campaigns/*.json"))) == 1, (
        "a call that did nothing is no campaign"
    )


def workers(process: "subprocess.Popen[str]") -> list[psutil.Process]:
    found = []
    for child in psutil.Process(process.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has just ended
            if "finrepro.running.worker" in child.cmdline():
                found.append(child)
    return found


def wait_for(
    condition: Callable[[], bool], process: "subprocess.Popen[str]", every: float = 0.2
) -> None:
    """Wait until the condition holds; the process must not end before."""
    end = time.monotonic() + 600
    while not condition():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < end
        time.sleep(every)


def under_way(
    store: Path, begun: Callable[["subprocess.Popen[str]"], bool]
) -> Iterator[tuple[Path, "subprocess.Popen[str]"]]:
    """A campaign some way into its first cell after the base."""
    process = start(store)
    wait_for(lambda: begun(process), process)
    time.sleep(2.5)
    yield store, process
    if process.poll() is None:
        process.kill()
        process.communicate()


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Path, "subprocess.Popen[str]"]]:
    """A campaign that began with nothing and whose base is finished."""
    yield from under_way(tmp_path, lambda _: BASE in results(tmp_path))


@pytest.fixture
def going_on(
    first: tuple[Path, str], tmp_path: Path
) -> Iterator[tuple[Path, "subprocess.Popen[str]"]]:
    """A campaign that found its base, the run that takes longest, in the store."""
    run = results(first[0])[BASE]["run_id"]
    shutil.copytree(first[0] / "results/runs" / run, tmp_path / "results/runs" / run)
    yield from under_way(tmp_path, lambda process: any(map(reads_tokens, workers(process))))


def reads_tokens(worker: psutil.Process) -> bool:
    """Whether a worker has come to its cell: before, it has no use for tokenizers."""
    return any("tokenizers" in each.path for each in worker.memory_maps())


def test_killed_and_run_again_ends_like_an_uninterrupted_run(
    first: tuple[Path, str], running: tuple[Path, "subprocess.Popen[str]"]
) -> None:
    """This is also the second cold store: every score, loss and file equal."""
    store, process = running
    children = workers(process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(children, timeout=10)
    assert children and not alive, "a worker must not outlive its driver"
    kept = results(store)[BASE]
    draw = random.Random(0)
    for _ in range(4):  # and again, each time when its worker has just begun
        process = start(store)
        wait_for(lambda process=process: bool(workers(process)), process, every=0.01)
        time.sleep(draw.uniform(0, 0.5))
        process.kill()
        process.communicate()
    output = reproduce(store)
    assert not (store / "results/superseded").exists()
    assert results(store)[BASE] == kept, "the finished run is kept"
    assert "1 already done" in output or "2 to run" in output
    assert evidence(store) == evidence(first[0])
    assert not list(store.glob("results/runs/.*")), "nothing half-written is left"


def test_stopped_by_a_signal_and_run_again_ends_like_an_uninterrupted_run(
    first: tuple[Path, str], going_on: tuple[Path, "subprocess.Popen[str]"]
) -> None:
    store, process = going_on
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in output, output[-3000:]
    assert "Run the same command again" in output
    reproduce(store)
    assert evidence(store) == evidence(first[0])


def test_a_crashed_worker_costs_one_cell(going_on: tuple[Path, "subprocess.Popen[str]"]) -> None:
    store, process = going_on
    children = workers(process)
    assert children
    for worker in children:
        worker.kill()
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 4 and "Traceback" not in output, output[-3000:]
    states = {label: result["status"] for label, result in results(store).items()}
    assert sorted(states.values()) == ["done", "done", "failed"], states
    failed = next(result for result in results(store).values() if result["status"] == "failed")
    assert "SIGKILL" in failed["reason"]
    assert failed["label"] in (store / "results/tables/smoke/table3-quick.md").read_text()
    assert "failed" in (store / "results/tables/smoke/table3-quick.md").read_text()
