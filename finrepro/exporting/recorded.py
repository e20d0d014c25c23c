"""A finished run in the store, checked against its manifest, and as much of its `RunSpec` as its
model is made of.

Settings are those that the result recorded, not today's catalogue; the catalogue gives the names
and the hub's address alone.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finrepro.catalogue import reader
from finrepro.catalogue.spec import DESCRIPTIVE, Evaluation, RunSpec, TrainSet
from finrepro.errors import EnvironmentFault, UsageError, unknown
from finrepro.evidence.manifest import Damaged
from finrepro.evidence.store import DONE, Store
from finrepro.kinds import adapter_of, choose, implementation
from finrepro.settings import build, plain, without
from finrepro.sizes.low_rank import not_exported

FORMATS = ("peft", "merged", "base")
RUN_ID = re.compile(r"[0-9a-f]{12}")


@dataclass(frozen=True)
class RecordedRun:
    """A finished run: its result.json, its folder, and its spec without the tasks, which no model
    is made of.

    `elsewhere` is a folder to be taken for its `weights/`.
    """

    result: dict[str, Any]
    folder: Path
    spec: RunSpec
    elsewhere: Path | None = None

    @property
    def run_id(self) -> str:
        """The run's id; that of `spec`, which lacks the tasks, is another."""
        return str(self.result["run_id"])

    @property
    def weights(self) -> Path:
        """What the run has trained."""
        return self.elsewhere or self.folder / "weights"

    @property
    def is_whole_model(self) -> bool:
        """Whether the weights are a model and not an adapter."""
        return adapter_of(self.spec.adapter).WHOLE_MODEL


def find_run(store: Store, run_id: str, export_format: str | None) -> RecordedRun:
    """The run of that id, to be exported in the format `export_format`, or with None to be loaded.

    Raises `UsageError` when there is none (with the nearest id), when it is not done, or does not
    go into the format; `EnvironmentFault` when its weights are missing or its settings are another
    version's; `Damaged` when a file is not the one that was sealed.
    """
    run_ids = sorted(
        path.name for path in (store.results / "runs").iterdir() if RUN_ID.fullmatch(path.name)
    )
    if run_id not in run_ids:
        if not run_ids:
            raise UsageError(f"unknown run '{run_id}': there is no run in {store.root}.")
        raise unknown("run", run_id, run_ids) if len(run_ids) <= 20 else _nearest(run_id, run_ids)
    folder, found = store.run_folder(run_id), store.found(run_id, weights=True)
    result = found.result
    if result is None:
        raise Damaged(f"run {run_id} is damaged, and is not exported: {', '.join(found.faults)}.")
    if result["status"] != DONE:
        raise UsageError(
            f"run {run_id} ({result['label']}) is {result['status']}: {result['reason']}."
        )
    if export_format and (reason := refusal(result["spec"], export_format)):
        raise UsageError(
            f"run {run_id} ({result['label']}) cannot be exported as {export_format}: {reason}."
        )
    if export_format not in (None, "base") and not any((folder / "weights").glob("*.safetensors")):
        raise EnvironmentFault(
            f"run {run_id} ({result['label']}) has no weights in {folder / 'weights'}."
        )
    return RecordedRun(result, folder, specified(result))


def _nearest(run_id: str, run_ids: list[str]) -> UsageError:
    """As `unknown`, without the list: a store may hold hundreds of runs."""
    text = str(unknown("run", run_id, run_ids)).partition(" Allowed:")[0]
    return UsageError(f"{text} `invoke cells` lists the ids of {len(run_ids)} runs.")


def refusal(spec: dict[str, Any], export_format: str) -> str | None:
    """Why a run's model, adapter or quantizer does not go into a format, with the formats that
    are possible; None if it does.
    """
    methods = [
        implementation("adapters", spec["adapter"]["kind"]),
        implementation("quantizers", spec["quantizer"]["kind"]),
    ]
    refused = not_exported(spec["quantizer"]["kind"]) if spec["model"].get("low_rank") else {}
    for method in methods:
        refused = method.NOT_EXPORTED | refused
    if export_format not in refused:
        return None
    possible = [name for name in FORMATS if name not in refused]
    return f"{refused[export_format]}; possible: {' or '.join(possible) or 'nothing'}"


def specified(result: dict[str, Any]) -> RunSpec:
    """The spec of a result. Raises `EnvironmentFault` when the model of that name is another by
    now, or this version has other settings.
    """
    cell, values = result["cell"], result["spec"]
    try:
        model = reader.model(cell["model"])
        adapter = choose("adapters", cell["adapter"], values["adapter"], "adapter")
        quantizer = choose("quantizers", cell["quantizer"], values["quantizer"], "quantizer")
        train = reader.train_settings(values["train"], "train")
        evaluation = build(Evaluation, values["evaluation"], "evaluation")
    except UsageError as error:
        raise EnvironmentFault(
            f"run {result['run_id']} was made with settings of another version: {error}"
        ) from None
    if without(plain(model), DESCRIPTIVE) != values["model"]:
        raise EnvironmentFault(
            f"run {result['run_id']} was made with another '{model.name}' than the catalogue's: "
            "use the version that made it (commit "
            f"{result['environment'].get('git_commit') or 'not recorded'})."
        )
    names = ("weights", "base_checkpoint", "base_run", "seed", "threads", "world_size")
    return RunSpec(
        label=result["label"],
        model=model,
        quantizer=quantizer,
        adapter=adapter,
        train_on=TrainSet(name=cell["train_on"], parts=()),
        tasks=(),
        train=train,
        evaluation=evaluation,
        **{name: values[name] for name in names},
    )
