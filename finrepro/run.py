"""The walk of one cell, from its spec to its sealed result. `python -m finrepro.run` runs one cell and is idempotent."""

import argparse
import json
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro import catalogue, data, provenance, runtime, store, weights
from finrepro.cells import Selection, find
from finrepro.errors import CellFailed, EnvironmentFault, FinreproError
from finrepro.manifest import file_digest
from finrepro.result import header, seal_unfinished
from finrepro.spec import RunSpec
from finrepro.store import Store

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

STAND_IN_TEXT, STAND_IN_VOCABULARY = "tfns_text", 8192

Report = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Place:
    """Where a cell works: its store, and where data and weights may be found."""

    store: Store
    data_dir: Path | None = None
    models_dir: Path | None = None


def run_cell(spec: RunSpec, place: Place, report: Report, stop_requested: Callable[[], bool]) -> dict[str, Any]:
    """Walk one cell and seal its result; the content of result.json.

    A defect or a divergence is sealed too, as `failed` or `diverged` with its reason. Raises `EnvironmentFault` (nothing is written) and
    `Interrupted` (a checkpoint is).
    """
    from finrepro.train import Diverged, Interrupted

    started = time.time()
    try:
        return walk(spec, place, report, stop_requested, started)
    except (EnvironmentFault, Interrupted):
        raise
    except Diverged as error:
        status, reason = store.DIVERGED, str(error)
    except Exception as error:  # whatever it is, it costs one cell: its traceback goes into the result
        status, reason = store.FAILED, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if not runtime.ranks().is_main:
        return {"status": status, "reason": reason}
    return seal_unfinished(spec, place.store, status, reason, started, traceback.format_exc())


def walk(
    spec: RunSpec, place: Place, report: Report, stop_requested: Callable[[], bool], started: float
) -> dict[str, Any]:
    """setup -> data -> model -> train -> evaluate -> record, read from top to bottom."""
    device = runtime.setup(spec.seed, spec.threads)

    from finrepro.checkpoint import Control
    from finrepro.evaluate import evaluate
    from finrepro.model import build
    from finrepro.monitor import Monitor
    from finrepro.tokens import encode, tokenizer_digest
    from finrepro.train import train

    report({"event": "phase", "phase": "data"})
    dataset = data.load(spec.train_on.dataset, place.data_dir)
    folder, tokenizer, origin = base(spec, place)
    made_from = base_facts(spec, place, folder)
    task, config = spec.train_on.task.module("tasks"), spec.train_on.task.config
    pairs = [(task.prompt(example, config), task.target(example, config)) for example in dataset.splits["train"]]
    encoded = encode(tokenizer, pairs, spec.train.max_seq_len, end=True)

    report({"event": "phase", "phase": "model"})
    built = build(spec, folder, device)

    report({"event": "phase", "phase": "train"})
    checkpoints = place.store.checkpoints(spec.run_id)
    with Monitor() as monitor:
        made_by = json.dumps([provenance.source_digest(), provenance.lock_digest(), made_from])
        trained = train(built.model, encoded, spec, device, Control(report, stop_requested, checkpoints, made_by))

        report({"event": "phase", "phase": "evaluate"})
        began = time.monotonic()
        scores, rows, num_scored = [], [], 0
        for each in spec.tasks:
            loaded = dataset if each.dataset == spec.train_on.dataset else data.load(each.dataset, place.data_dir)
            examples = loaded.splits[spec.evaluation.split]
            if runtime.ranks().is_main:
                place.store.log_scoring(spec, each.task.name)
            evaluated = evaluate(
                built.model, tokenizer, each, examples, spec.evaluation, spec.train.max_seq_len, partial(scored, report)
            )
            scores += evaluated.scores if spec.weights != "random" else []
            rows += evaluated.rows
            num_scored += len(examples)
        evaluation_seconds = time.monotonic() - began

    report({"event": "phase", "phase": "record"})
    if not runtime.ranks().is_main:
        return {"status": store.DONE, "reason": None}
    with place.store.new_run(spec.run_id) as target:
        (target / "weights").mkdir()
        spec.adapter.module("adapters").export(built.model, target / "weights")
        if spec.weights == "scratch":
            tokenizer.save_pretrained(target / "weights")
        store.write_lines(target / "loss.jsonl", trained.losses)
        store.write_lines(target / "predictions.jsonl", rows)
        store.write_lines(target / "system.jsonl", monitor.samples)
        files = sorted((target / "weights").glob("*.safetensors"))
        result = header(spec, store.DONE, None, started) | {
            "scores": scores,
            "costs": {
                "total_params": built.base_parameters,
                "trainable_params": built.trainable_parameters,
                "base_bytes": built.base_bytes,
                "trained_file_bytes": sum(path.stat().st_size for path in files),
                "peak_memory_bytes": runtime.peak_memory_bytes(device),
                "train_seconds": trained.seconds,
                "train_tokens": trained.tokens,
                "supervised_tokens": trained.supervised_tokens,
                "useful_token_share": trained.tokens / trained.computed_tokens if trained.computed_tokens else None,
                "tokens_per_second": trained.tokens / trained.seconds if trained.seconds else None,
                "final_loss": trained.losses[-1]["loss"] if trained.losses else None,
                "evaluation_seconds": evaluation_seconds,
                "evaluated_examples": num_scored,
            },
            "data": {
                "fingerprints": dataset.fingerprints,
                "overlap": dataset.overlap,
                "origin": dataset.origin,
                "base": made_from,
                "tokenizer": {"origin": origin, "sha256": tokenizer_digest(folder or target / "weights")},
                "times_scored": place.store.times_scored(spec),
                "files": {role: file.sha256 for role, file in spec.train_on.dataset.config.files.items()},
            },
        }
        store.write_json(target / "result.json", result)
    shutil.rmtree(checkpoints, ignore_errors=True)
    return result


def scored(report: Report, done: int, total: int) -> None:
    """Report how far an evaluation is."""
    report({"event": "phase", "phase": f"evaluate {done}/{total}"})


def base(spec: RunSpec, place: Place) -> tuple[Path | None, "PreTrainedTokenizerFast", str]:
    """The base's folder (None: random weights), its tokenizer, and where that comes from.

    Raises `EnvironmentFault` when the run that makes the base, or the checkpoint, is not there.
    """
    from finrepro.model import load_tokenizer

    if spec.base_run is not None:
        folder = place.store.run_folder(spec.base_run) / "weights"
        if place.store.result(spec.base_run) is None:
            raise EnvironmentFault(f"the base of {spec.label}, run {spec.base_run}, is not in {place.store.root}.")
        return folder, load_tokenizer(folder), f"run {spec.base_run}"
    found = weights.locate(spec.model, place.models_dir)
    if found is None and spec.weights == "pretrained":
        found = weights.fetch(spec.model)
    if found is not None:
        return (found if spec.weights == "pretrained" else None), load_tokenizer(found), "checkpoint"
    return None, embedded_tokenizer(spec, place), "trained on the embedded text"


def base_facts(spec: RunSpec, place: Place, folder: Path | None) -> dict[str, Any]:
    """What the base was: the run that made it with its maker's digests, or the sha256 of the checkpoint's weights."""
    if spec.base_run is not None:
        made = (place.store.result(spec.base_run) or {})["environment"]
        digests = {key: made[key] for key in ("source_digest", "lock_digest")}
        return {"run_id": spec.base_run, "weights": place.store.weights_digest(spec.base_run), **digests}
    files = sorted(folder.glob("*.safetensors")) if folder else []
    return {"files": {path.name: file_digest(path) for path in files}}


def embedded_tokenizer(spec: RunSpec, place: Place) -> "PreTrainedTokenizerFast":
    """A tokenizer for a model that brings none: a miniature's own, or a stand-in of fewer tokens for random weights."""
    from finrepro.tokens import train_tokenizer

    text = catalogue.task(spec.model.pretrain.task if spec.model.pretrain else STAND_IN_TEXT)
    task, config = text.task.module("tasks"), text.task.config
    texts = [task.target(example, config) for example in data.load(text.dataset, place.data_dir).splits["train"]]
    vocabulary = int(spec.model.architecture["vocab_size"])
    return train_tokenizer(texts, spec.model.family, min(vocabulary, STAND_IN_VOCABULARY))


def request(spec: RunSpec, selection: Selection, scale: str) -> dict[str, Any]:
    """A cell as a message to a process that runs it: how to find it again, and the id it must then have."""
    digest = provenance.source_digest()
    return {
        "selection": asdict(selection), "scale": scale, "label": spec.label, "run_id": spec.run_id, "source": digest,
    }  # fmt: skip


def resolve(message: dict[str, Any]) -> RunSpec:
    """The spec that a `request` means. Raises `CellFailed` when configuration or source have changed in between."""
    if provenance.source_digest() != message["source"]:
        raise CellFailed(f"{message['label']}: the source changed while the campaign was running.")
    values = message["selection"]
    selection = Selection(**{**values, "seeds": tuple(values["seeds"]) if values["seeds"] else None})
    spec = find(selection, message["scale"], message["label"])
    if spec.run_id != message["run_id"]:
        raise CellFailed(f"{message['label']}: the configuration changed while the campaign was running.")
    return spec


def main(arguments: list[str] | None = None) -> int:
    """Run the cell of a request (JSON) as a process of its own: what launchers start, one a rank. Exit codes as everywhere."""
    from finrepro.train import Interrupted

    parser = argparse.ArgumentParser(prog="python -m finrepro.run", description=main.__doc__)
    parser.add_argument("--request", required=True, help="JSON with selection, scale, label and run_id")
    parser.add_argument("--store", type=Path, required=True)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--models-dir", type=Path)
    options = parser.parse_args(arguments)
    stop: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: stop.append(number))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the terminal sends it to everybody; who started us decides
    runtime.die_with_parent()

    def emit(event: dict[str, Any]) -> None:
        if runtime.ranks().is_main:
            print(json.dumps(event), flush=True)

    try:
        spec = resolve(json.loads(options.request))
        place = Place(store.open_store(options.store), options.data_dir, options.models_dir)
        result: dict[str, Any] = {"status": store.DONE, "reason": None}
        if place.store.state(spec) != store.DONE:
            result = run_cell(spec, place, emit, lambda: bool(stop))
        emit({"event": "result", "status": result["status"], "reason": result["reason"]})
        return 0 if result["status"] == store.DONE else CellFailed.exit_code
    except FinreproError as error:
        emit({"event": "fault", "reason": str(error), "exit_code": error.exit_code})
        print(f"finrepro: {error}", file=sys.stderr)
        return error.exit_code
    except Interrupted as error:
        emit({"event": "interrupted", "reason": str(error)})
        return 130


if __name__ == "__main__":
    runtime.quiet_environment()
    sys.exit(main())
