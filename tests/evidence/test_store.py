"""Law: a result is whole or absent, whatever kills its writer; what was changed afterwards is
found; what cannot be served is one line.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fixtures.process import environment, one_line, python

from finrepro import PROJECT
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import EnvironmentFault
from finrepro.evidence import provenance, store
from finrepro.evidence.files import read_lines, write_json, write_lines
from finrepro.evidence.manifest import damaged_files
from finrepro.evidence.result import header, seal_unfinished
from finrepro.evidence.store import Store, open_store


def some_spec() -> RunSpec:
    return expand(Selection("3", only="gpt2_127m_mini-none-full-tfns-s0"), "smoke")[0].spec


def seal_done(place: Store, spec: RunSpec, **changes: object) -> Path:
    """A finished result without weights, written as a cell writes it."""
    with place.new_run(spec.run_id) as target:
        write_lines(target / "loss.jsonl", [{"step": 1, "loss": 1.5}])
        (target / "weights").mkdir()
        (target / "weights" / "model.safetensors").write_bytes(os.urandom(1000))
        result = header(spec, store.DONE, None, time.time()) | changes
        write_json(target / "result.json", result)
    return place.run_folder(spec.run_id)


def files(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def test_a_sealed_result_is_whole_and_sha256sum_agrees(tmp_path: Path):
    folder = seal_done(open_store(tmp_path), some_spec())
    assert damaged_files(folder) == []
    checked = subprocess.run(
        ["sha256sum", "-c", "manifest.sha256"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
    assert checked.stdout.count(": OK") == len(files(folder)) - 1 == 3


@pytest.mark.parametrize("name", ["result.json", "loss.jsonl", "weights/model.safetensors"])
@pytest.mark.parametrize("damage", ["changed", "truncated", "missing", "extra"])
def test_every_damage_of_a_result_is_found_by_name(tmp_path: Path, name: str, damage: str):
    folder = seal_done(open_store(tmp_path), some_spec())
    path = folder / name
    if damage == "changed":
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # a zero may have been there
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    else:
        path = path.with_name("planted")
        path.write_text("x")
    assert damaged_files(folder) == [path.relative_to(folder).as_posix()]


def test_a_missing_and_a_mangled_manifest_are_damage(tmp_path: Path):
    folder = seal_done(open_store(tmp_path), some_spec())
    manifest = folder / "manifest.sha256"
    text = manifest.read_text()
    manifest.write_text(text.splitlines(keepends=True)[0])
    assert len(damaged_files(folder)) == 2
    manifest.write_bytes(b"\xff\xfe not a manifest")
    assert damaged_files(folder)
    manifest.unlink()
    assert damaged_files(folder) == ["manifest.sha256"]


def test_an_error_while_a_result_is_written_leaves_nothing(tmp_path: Path):
    place = open_store(tmp_path)
    before = files(tmp_path)
    with pytest.raises(ZeroDivisionError), place.new_run("0" * 12) as target:
        (target / "result.json").write_text("{}")
        _ = 1 / 0
    assert files(tmp_path) == before and not list((place.results / "runs").iterdir())


def test_an_error_while_a_result_is_written_again_keeps_the_old_one(tmp_path: Path):
    place, spec = open_store(tmp_path), some_spec()
    before = files(seal_done(place, spec))
    with pytest.raises(ZeroDivisionError), place.new_run(spec.run_id) as target:
        (target / "result.json").write_text("{}")
        _ = 1 / 0
    assert files(place.run_folder(spec.run_id)) == before


def test_a_new_result_takes_the_place_of_the_old_one_whole(tmp_path: Path):
    place, spec = open_store(tmp_path), some_spec()
    seal_unfinished(spec, place, store.FAILED, "broken", time.time(), "Traceback ...")
    assert place.state(spec) == store.FAILED
    folder = seal_done(place, spec)
    assert place.state(spec) == store.DONE and "error.txt" not in files(folder)
    assert [path.name for path in (place.results / "runs").iterdir()] == [spec.run_id]


HALF_WRITTEN = """
import sys, time
from pathlib import Path
from finrepro.evidence.store import open_store
with open_store(Path(sys.argv[1])).new_run("f" * 12) as target:
    (target / "result.json").write_text("{")
    print("half", flush=True)
    time.sleep(600)
"""


def test_a_writer_killed_in_the_middle_leaves_no_result_and_the_next_command_sweeps(tmp_path: Path):
    child = subprocess.Popen(
        [sys.executable, "-c", HALF_WRITTEN, str(tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "half\n"
    child.kill()
    child.wait()
    child.stdout.close()
    place = open_store(tmp_path)
    assert place.result("f" * 12) is None and not place.run_folder("f" * 12).exists()
    assert list((place.results / "runs").iterdir()), "the kill came too late to show anything"
    with place.lock():
        assert list((place.results / "runs").iterdir()) == []


WRITER = """
import sys
from pathlib import Path
from finrepro.catalogue.cells import expand
from finrepro.catalogue.selection import Selection
from finrepro.evidence import files, store
from finrepro.evidence.result import header
place = store.open_store(Path(sys.argv[1]))
spec = expand(Selection("3", only="gpt2_127m_mini-none-full-tfns-s0"), "smoke")[0].spec
result = header(spec, store.FAILED, "none", 0.0)
for round in range(10**9):
    with place.new_run(spec.run_id) as target:
        for name in "abcdef":
            (target / name).write_text(f"{round} " * 2000)
        files.write_json(target / "result.json", result | {"reason": str(round)})
    if not round:
        print("ready", flush=True)
"""


def test_a_writer_killed_at_any_moment_leaves_a_whole_result_or_none(tmp_path: Path):
    whole = 0
    for number, delay in enumerate((0.0, 0.003, 0.011, 0.017, 0.05, 0.083)):
        root = tmp_path / str(number)
        child = subprocess.Popen(
            [sys.executable, "-c", WRITER, str(root)],
            env=environment(),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
        time.sleep(delay)
        child.kill()
        child.wait()
        child.stdout.close()
        place = open_store(root)
        with place.lock():
            left = [path.name for path in (place.results / "runs").iterdir()]
        assert left in ([], [some_spec().run_id])
        if left:
            whole += 1
            folder = place.run_folder(some_spec().run_id)
            rounds = {
                path.read_text().split()[0] for path in folder.iterdir() if len(path.name) == 1
            }
            assert damaged_files(folder) == [] and rounds == {
                json.loads((folder / "result.json").read_text())["reason"]
            }
    assert whole > 0


def test_a_result_that_was_changed_is_damaged_and_set_aside(tmp_path: Path):
    place, spec = open_store(tmp_path), some_spec()
    path = seal_done(place, spec) / "result.json"
    whole = path.read_text()
    for text in (
        "",
        "{",
        whole[:-20],
        "[]",
        "3",
        "null",
        "{}",
        '{"status": "done"}',
        "\x00",
        '"text"',
    ):
        path.write_text(text)
        assert place.state(spec) == store.DAMAGED and place.result(spec.run_id) is None, text
    path.write_bytes(b"\xff\xfe")
    assert place.state(spec) == store.DAMAGED
    path.write_text(whole.replace('"done"', '"failed"'))
    assert place.state(spec) == store.DAMAGED
    path.write_text(whole)
    assert place.state(spec) == store.DONE
    path.write_text("{")
    weights = (path.parent / "weights" / "model.safetensors").read_bytes()
    seal_done(place, spec)
    assert place.state(spec) == store.DONE
    (aside,) = (place.results / "damaged").iterdir()
    assert (aside / "weights" / "model.safetensors").read_bytes() == weights


def test_a_result_of_other_source_or_packages_is_stale_and_one_of_these_is_not(tmp_path: Path):
    place, spec = open_store(tmp_path), some_spec()
    assert place.state(spec) == store.MISSING
    here = provenance.environment()
    for changes, state in (
        ({}, store.DONE),
        (
            {"git_commit": "0" * 40, "hardware": {}},
            store.DONE,
        ),  # another machine, another commit, the same source
        ({"source_digest": "0" * 64}, store.STALE),
        ({"lock_digest": "0" * 64}, store.STALE),
    ):
        seal_done(place, spec, environment=here | changes)
        assert place.state(spec) == state, changes


def test_a_result_that_did_not_finish_has_its_own_state(tmp_path: Path):
    place, spec = open_store(tmp_path), some_spec()
    for status in (store.FAILED, store.DIVERGED, store.SKIPPED):
        seal_unfinished(spec, place, status, "the reason", time.time())
        assert place.state(spec) == status
        result = place.result(spec.run_id)
        assert result is not None and result["reason"] == "the reason" and result["scores"] == []


def test_a_result_says_what_it_is_and_where_it_comes_from(tmp_path: Path):
    place, spec = open_store(tmp_path), some_spec()
    seal_done(place, spec)
    result = place.result(spec.run_id)
    assert result is not None
    assert (result["run_id"], result["label"], result["status"]) == (
        spec.run_id,
        spec.label,
        "done",
    )
    assert result["spec"] == json.loads(json.dumps(spec.canonical()))
    made_by = result["environment"]
    assert {
        "git_commit",
        "git_dirty",
        "source_digest",
        "lock_digest",
        "packages",
        "hardware",
        "python",
    } <= set(made_by)
    assert made_by["packages"]["torch"] and made_by["hardware"]["cores"]
    assert result["started"] <= result["ended"]


def test_the_spec_of_a_result_hashes_to_its_run_id(tmp_path: Path):
    import hashlib

    place, spec = open_store(tmp_path), some_spec()
    seal_done(place, spec)
    result = place.result(spec.run_id)
    assert result is not None
    text = json.dumps(result["spec"], sort_keys=True, separators=(",", ":"))
    assert hashlib.sha256(text.encode()).hexdigest()[:12] == spec.run_id


def test_a_store_is_made_where_it_is_asked_for_and_opened_again(tmp_path: Path):
    first = open_store(tmp_path / "a" / "b")
    assert open_store(tmp_path / "a" / "b") == first and first.root.is_absolute()
    assert json.loads((first.results / "store.json").read_text()) == {"format": store.FORMAT}


def test_a_store_of_a_newer_version_is_refused_and_left_as_it_is(tmp_path: Path):
    mark = open_store(tmp_path).results / "store.json"
    mark.write_text('{"format": 2, "more": true}')
    before = files(tmp_path)
    with pytest.raises(EnvironmentFault, match="newer finrepro") as refused:
        open_store(tmp_path)
    assert one_line(refused.value) and refused.value.exit_code == 3
    assert files(tmp_path) == before


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"version": 1}', "\x00"])
def test_a_damaged_mark_of_a_store_is_one_line(tmp_path: Path, text: str):
    mark = open_store(tmp_path).results / "store.json"
    mark.write_text(text)
    with pytest.raises(EnvironmentFault) as refused:
        open_store(tmp_path)
    assert str(mark) in one_line(refused.value)


UNUSABLE = [
    "a file",
    "inside a file",
    "results is a file",
    "a name that is too long",
    "a loop of links",
    "/proc",
    "/dev/null",
]


@pytest.mark.parametrize("case", UNUSABLE)
def test_a_place_that_cannot_hold_a_store_is_one_line(tmp_path: Path, case: str):
    (tmp_path / "file").write_text("x")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "results").write_text("x")
    root = {
        "a file": tmp_path / "file",
        "inside a file": tmp_path / "file" / "below",
        "results is a file": tmp_path / "half",
        "a name that is too long": tmp_path / ("x" * 300),
        "a loop of links": tmp_path / "loop",
        "/proc": Path("/proc/finrepro"),
        "/dev/null": Path("/dev/null/store"),
    }[case]
    before = files(tmp_path)
    with pytest.raises(EnvironmentFault) as refused:
        open_store(root)
    assert str(root) in one_line(refused.value) and "--store" in str(refused.value)
    assert files(tmp_path) == before


REFUSED = """
import os, sys
from pathlib import Path
from finrepro.errors import EnvironmentFault
from finrepro.evidence.store import open_store
if os.getuid() == 0:
    os.setuid(65534)  # root may write everywhere
try:
    open_store(Path(sys.argv[1]))
except EnvironmentFault as error:
    print(error)
"""


def test_a_store_that_is_not_writable_is_one_line(tmp_path: Path):
    folder = tmp_path / "locked"
    folder.mkdir(mode=0o555)
    for parent in (tmp_path, *tmp_path.parents):
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | 0o055)
    answer = python("-c", REFUSED, str(folder))
    assert answer.stderr == "" and answer.stdout.count("\n") == 1
    assert "not writable" in answer.stdout and "--store" in answer.stdout


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a quarter of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    command = [mount or "mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if mount is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("a small file system is needed, and this process may not mount one")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_line_and_nothing_half_written(tiny_disk: Path):
    place, spec = open_store(tiny_disk), some_spec()
    kept = files(seal_done(place, spec))
    with (
        pytest.raises(EnvironmentFault, match="no space left") as refused,
        place.new_run("f" * 12) as target,
    ):
        (target / "predictions.jsonl").write_bytes(b"x" * 400_000)
    assert one_line(refused.value) and refused.value.exit_code == 3
    assert [path.name for path in (place.results / "runs").iterdir()] == [spec.run_id]
    assert (
        files(place.run_folder(spec.run_id)) == kept
        and damaged_files(place.run_folder(spec.run_id)) == []
    )


def test_a_disk_that_is_already_full_refuses_a_new_store_in_one_line(tiny_disk: Path):
    with pytest.raises(OSError, match="No space left"):
        (tiny_disk / "ballast").write_bytes(b"x" * 400_000)
    with pytest.raises(EnvironmentFault, match="no space left"):
        open_store(tiny_disk / "store")


HOLDER = """
import sys, time
from pathlib import Path
from finrepro.evidence.store import open_store
with open_store(Path(sys.argv[1])).lock():
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_second_command_on_a_store_is_refused_by_name_until_the_first_is_gone(tmp_path: Path):
    child = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None and child.stdout.readline() == "held\n"
    place = open_store(tmp_path)
    with pytest.raises(EnvironmentFault, match=f"process {child.pid}") as refused, place.lock():
        pass
    assert "--store" in one_line(refused.value)
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    with place.lock():
        assert (place.results / ".lock").read_text().split() == [str(os.getpid())]


def test_text_and_json_are_replaced_whole(tmp_path: Path):
    path = tmp_path / "value.json"
    write_json(path, {"loss": 2.5, "text": "ü\u2028"})
    write_json(path, {"loss": 1.5})
    assert list(tmp_path.iterdir()) == [path]
    assert json.loads(path.read_text()) == {"loss": 1.5}
    rows = [{"loss": 1e300, "text": "a\nb\u2028c"}, {}]
    write_lines(tmp_path / "rows.jsonl", rows)
    assert read_lines(tmp_path / "rows.jsonl") == rows
    assert read_lines(tmp_path / "none.jsonl") == []


def test_the_digest_of_the_source_sees_what_computes_and_not_what_shows():
    root = PROJECT / "finrepro"
    names = {path.relative_to(root).as_posix() for path in root.rglob("*.py")}
    inside = {name for name in names if name.startswith(provenance.COMPUTES)}
    assert {
        "training/loop.py",
        "evaluation/evaluate.py",
        "models/build.py",
        "data/files.py",
        "evaluation/metrics.py",
        "methods/adapters/lora.py",
        "evaluation/tasks/classification.py",
    } <= inside
    shows = (
        "reporting/",
        "campaigns/",
        "tracking/",
        "evidence/",
        "budget/",
        "planning/",
        "exporting/",
    )
    assert not [name for name in inside if name.startswith(shows)]
    assert all(any(name.startswith(part) for name in names) for part in provenance.COMPUTES), "gone"
