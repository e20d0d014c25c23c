"""Law: no process writes a store whose lock it does not hold: what a killed driver leaves behind
keeps the store locked until it is dead, and ends without writing, however early the driver went.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from fixtures.process import PROGRAMS, environment, python

from finrepro import PROJECT
from finrepro.campaigns.campaign import _Campaign, _interruptible
from finrepro.campaigns.display import Display
from finrepro.campaigns.preview import CampaignOptions, CampaignPlan
from finrepro.catalogue.selection import Selection
from finrepro.errors import EnvironmentFault, StoreGone
from finrepro.evidence import lock
from finrepro.evidence.place import Place
from finrepro.evidence.store import open_store

ONE, TWO = "gpt2_127m_mini-none-base-tfns-s0", "llama2_13b_mini-none-lora_r8-tfns-s0"


def killed_driver(store: Path, label: str, devices: int) -> list[psutil.Process]:
    """What a driver had begun when it was killed, stopped before it could do anything."""
    driver = subprocess.run(
        [sys.executable, PROGRAMS / "driver_program.py", store, label, str(devices)],
        cwd=PROJECT,
        env=os.environ | environment(PYTHONPATH=os.environ["PYTHONPATH"]),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    return [psutil.Process(int(number)) for number in driver.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize(("label", "devices"), [(ONE, 1), (TWO, 2)])
def test_what_a_killed_driver_began_keeps_the_lock_and_ends_without_writing(
    label: str, devices: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    store = open_store(tmp_path)
    orphans = killed_driver(tmp_path, label, devices)
    try:
        assert len(orphans) == devices
        monkeypatch.setattr(lock, "PATIENCE", 0.5)
        with pytest.raises(EnvironmentFault, match="is working in"), store.lock():
            pass
    finally:
        for orphan in orphans:
            orphan.send_signal(signal.SIGCONT)
    monkeypatch.setattr(lock, "PATIENCE", 60.0)
    with store.lock():  # waits until they are gone
        assert all(lock.is_dead(str(orphan.pid)) for orphan in orphans)
        assert not list((store.results / "runs").iterdir())


def test_a_lock_whose_holder_is_dead_is_waited_for_and_one_that_lives_is_named(tmp_path: Path):
    store = open_store(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "pass"]) as dead:
        pass
    began = time.monotonic()
    with store.lock() as descriptor:
        with pytest.raises(EnvironmentFault, match=f"process {os.getpid()}"), store.lock():
            pass
        assert time.monotonic() - began < 5
        heir = subprocess.Popen(
            [sys.executable, "-c", "import time; time.sleep(1)"], pass_fds=(descriptor,)
        )
        (store.results / ".lock").write_text(str(dead.pid))
    with store.lock():
        assert heir.wait(1) == 0, "it kept the store locked"


def test_cells_started_by_hand_share_a_store_and_keep_commands_out(tmp_path: Path):
    store = open_store(tmp_path)
    with (
        store.lock(shared=True),
        store.lock(shared=True),
        pytest.raises(EnvironmentFault, match="another command"),
        store.lock(),
    ):
        pass
    with store.lock():
        answer = python(
            *("-m", "finrepro.running.cell", "--table", "3", "--scale", "smoke", "--cell", ONE),
            *("--weights", "random", "--store", str(tmp_path)),
        )
        assert answer.returncode == 3 and f"(process {os.getpid()})" in answer.stderr


def test_a_lock_that_is_a_folder_is_one_line(tmp_path: Path):
    store = open_store(tmp_path)
    (store.results / ".lock").mkdir()
    with pytest.raises(EnvironmentFault, match="is a folder"), store.lock():
        pass


def test_a_pipe_that_nobody_reads_ends_a_process_and_is_no_failure():
    program = (
        "import sys\n"
        "from finrepro.running.events import emit_outcome, emitter\n"
        "emit = emitter(sys.stdout)\n"
        "def run():\n"
        "    sys.stdin.read()\n"
        "    try:\n"
        "        emit({'event': 'phase'})\n"
        "    except BaseException as error:\n"
        "        print('sealed', error, file=sys.stderr)\n"
        "    return {'status': 'done', 'reason': None}\n"
        "sys.exit(emit_outcome(emit, run))\n"
    )
    cell = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=PROJECT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert cell.stdout is not None and cell.stdin is not None and cell.stderr is not None
    cell.stdout.close()
    cell.stdin.close()
    assert (cell.wait(60), cell.stderr.read()) == (130, "")
    cell.stderr.close()


@pytest.mark.parametrize("how", ["renamed", "removed", "another in its place"])
def test_a_store_that_is_gone_is_one_line_and_is_not_made_again(how: str, tmp_path: Path):
    store = open_store(tmp_path / "store")
    with store.lock() as descriptor:
        store.check_lock(descriptor)
        if how == "removed":
            shutil.rmtree(store.root)
        else:
            store.root.rename(tmp_path / "elsewhere")
        if how == "another in its place":
            with open_store(store.root).lock():
                pass
        with pytest.raises(StoreGone, match="was renamed or removed") as gone:
            store.check_lock(descriptor)
        assert "\n" not in str(gone.value)
        if how != "another in its place":
            with pytest.raises(StoreGone), store.new_run("0123456789ab"):
                pass
            assert not store.root.exists()


def test_an_interrupt_that_a_library_swallows_still_stops_the_campaign(tmp_path: Path):
    place = Place(open_store(tmp_path))
    plan = CampaignPlan(Selection("3"), "smoke", "asked for", place, 1, (), ())
    with pytest.raises(KeyboardInterrupt), _interruptible() as noted, place.store.lock() as held:
        campaign = _Campaign(plan, CampaignOptions(), Display(quiet=True), held, noted)
        with contextlib.suppress(KeyboardInterrupt):  # as a callback in C does
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(1)
        campaign._check()
