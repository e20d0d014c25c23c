"""The main job in the image, as a reader of the paper would start it: confined, offline, from
nothing.
"""

import hashlib
import json
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytestmark = pytest.mark.container

QUICK = ("invoke", "reproduce", "--table", "3", "--quick")


class Campaign(NamedTuple):
    store: Path
    done: subprocess.CompletedProcess[str]

    @property
    def results(self) -> dict[str, dict[str, Any]]:
        """The finished runs, by run id."""
        runs = {
            path.parent.name: json.loads(path.read_text())
            for path in self.store.glob("results/runs/*/result.json")
        }
        return {run_id: result for run_id, result in runs.items() if result["status"] == "done"}


@pytest.fixture(scope="session")
def quick(run: Any, new_store: Any) -> Campaign:
    store = new_store()
    return Campaign(store, run(*QUICK, options=("-v", f"{store}:/srv/finrepro")))


def test_quick_run_succeeds_without_network_or_rights(quick: Campaign) -> None:
    assert quick.done.returncode == 0, quick.done.stdout[-4000:] + quick.done.stderr[-4000:]


def test_quick_run_covers_every_architecture_and_quantizer(quick: Campaign) -> None:
    labels = [result["label"] for result in quick.results.values()]
    cells = [
        found.groups()
        for label in labels
        if (found := re.match(r"(gpt2|llama)\w*-([a-z0-9]+)-", label))
    ]
    assert {architecture for architecture, _ in cells} == {"gpt2", "llama"}, labels
    assert {quantizer for _, quantizer in cells} >= {"none", "nf4"}, labels


def test_every_manifest_verifies(quick: Campaign) -> None:
    manifests = list(quick.store.glob("results/runs/*/manifest.sha256"))
    assert len(manifests) >= len(quick.results) > 0
    for manifest in manifests:
        named = set()
        for line in manifest.read_text().splitlines():
            digest, name = re.fullmatch(r"([0-9a-f]{64}) [ *](.+)", line).groups()  # type: ignore[union-attr]
            assert hashlib.sha256((manifest.parent / name).read_bytes()).hexdigest() == digest, (
                f"{manifest}: {name}"
            )
            named.add(name)
        assert "result.json" in named, manifest


def test_mlflow_store_is_written(quick: Campaign) -> None:
    assert (quick.store / "mlruns/mlflow.db").stat().st_size > 0


def test_second_run_computes_nothing_again(run: Any, quick: Campaign) -> None:
    def state() -> dict[str, tuple[int, str]]:
        files = (path for path in quick.store.glob("results/runs/**/*") if path.is_file())
        return {
            str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in files
        }

    before = state()
    again = run(*QUICK, options=("-v", f"{quick.store}:/srv/finrepro"), timeout=60)
    assert again.returncode == 0, again.stdout[-4000:] + again.stderr[-4000:]
    assert before and state() == before


def test_any_user_gets_the_same_scores_in_a_store_of_its_own(
    run: Any, new_store: Any, quick: Campaign
) -> None:
    """Of one model: the others take as long again and go the same way."""
    store = new_store()
    command = (*QUICK, "--only", "gpt2*")
    other = Campaign(
        store, run(*command, options=("--user", "4242:4242", "-v", f"{store}:/srv/finrepro"))
    )
    assert other.done.returncode == 0, other.done.stdout[-4000:] + other.done.stderr[-4000:]
    assert {path.stat().st_uid for path in store.glob("results/runs/*")} == {4242}

    def scores(campaign: Campaign) -> dict[str, Any]:
        return {run_id: result["scores"] for run_id, result in campaign.results.items()}

    mine, first = scores(other), scores(quick)
    assert len(mine) > 1 and mine == {run_id: first[run_id] for run_id in mine}


def test_literal_command_without_a_mount(run: Any) -> None:
    """`docker run finrepro invoke reproduce --table 3`, with nothing but the network taken away,
    and of one model in every quantizer: the whole table takes longer than all else here together
    (`docs/log.md` says when it was last made).
    """
    command = ("invoke", "reproduce", "--table", "3", "--only", "llama3_1_8b_mini-*-base-tfns-*")
    done = run(*command, confined=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "/srv/finrepro" in done.stdout + done.stderr, "it has to say where its results lie"
    assert re.search(r"\bSMOKE\b", done.stdout), done.stdout[-4000:]


def test_the_computed_table_and_the_one_of_pretraining(run: Any) -> None:
    """Table 1 needs nothing, and the shortest pretraining runs from text to a loss in eight and
    four bits.
    """
    assert "H1:" in run("invoke", "reproduce", "--table", "1", confined=False).stdout
    done = run("invoke", "reproduce", "--table", "2", "--quick", confined=False, timeout=900)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "gpt2_1_5b_deep_mini_lr" in done.stdout and "SMOKE" in done.stdout
