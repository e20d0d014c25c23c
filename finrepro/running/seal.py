"""What is left of a finished cell: its run folder in the store, sealed with a manifest."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, cast

import torch

from finrepro.catalogue.spec import RunSpec
from finrepro.data.tokenizer_files import tokenizer_digest
from finrepro.errors import CellFailed
from finrepro.evidence import schema
from finrepro.evidence.files import write_json, write_lines
from finrepro.evidence.result import header
from finrepro.evidence.schema_cell import Attention, Layout, Proof
from finrepro.evidence.store import DONE, Store
from finrepro.kinds import adapter_of
from finrepro.methods.layers.isolated_attention import implementation
from finrepro.models.build import Built
from finrepro.running.base import base_facts
from finrepro.running.events import Emit
from finrepro.running.inputs import Inputs
from finrepro.running.scoring import QuantizedScores, TaskScores, evaluate_quantized
from finrepro.running.text import corpora_facts
from finrepro.runtime import matmul, ranks
from finrepro.runtime.modes import make_readable
from finrepro.runtime.phases import Phases
from finrepro.training.engines.deepspeed import collect_trained
from finrepro.training.progress import Trained


@dataclass(frozen=True)
class Walked:
    """What the steps of a cell have come to. `started` is in seconds since 1970, `layout` what
    `choose_layout` chose, `samples` the monitor's.
    """

    started: float
    device: torch.device
    inputs: Inputs
    built: Built
    layout: Layout
    trained: Trained
    evaluated: TaskScores
    phases: Phases
    samples: list[dict[str, Any]]


def seal_finished(spec: RunSpec, store: Store, walked: Walked, emit: Emit) -> Mapping[str, Any]:
    """Write the run folder: weights, predictions, losses, samples and result.json, whose content
    is returned. All ranks call it; the first one writes.
    """
    if base_facts(spec, store, walked.inputs.base) != walked.inputs.base_facts:
        raise CellFailed(f"its base has changed while it was used: {walked.inputs.base}")
    rate = measured_rate(spec, walked.device)
    walked.phases.begin("save")
    collect_trained(walked.built.model)
    walked.phases.over_ranks()
    if not ranks.current().is_main:
        return {"status": DONE, "reason": None}
    with store.new_run(spec.run_id) as folder:
        weights = folder / "weights"
        write_weights(spec, walked, weights)
        peaks = walked.phases.costs()  # the models that are scored below are no part of the run
        write_lines(folder / "loss.jsonl", walked.trained.losses)
        write_lines(folder / "predictions.jsonl", walked.evaluated.predictions)
        write_lines(folder / "system.jsonl", walked.samples)
        quantized = evaluate_quantized(spec, weights, walked.inputs, walked.device, emit)

        device, layout = walked.device.type, walked.layout
        attention = attention_used(spec, device, layout)
        result = header(spec, DONE, None, walked.started, device, layout, attention)
        result["cell"]["compilation"] = cast(list[Proof], walked.trained.compilation)
        result["cell"]["notes"] += walked.trained.remarks + quantized.remarks
        result["scores"] = cast(list[schema.Score], walked.evaluated.scores + quantized.scores)
        result["costs"] = costs_of(walked, peaks, quantized, weights, rate)
        result["data"] = data_of(spec, store, walked.inputs, weights)
        write_json(folder / "result.json", result)
    shutil.rmtree(store.checkpoints(spec.run_id), ignore_errors=True)
    return result


def write_weights(spec: RunSpec, walked: Walked, folder: Path) -> None:
    """What was trained, and with a model that was trained from nothing its tokenizer."""
    folder.mkdir()
    adapter_of(spec.adapter).export(walked.built.model, folder)
    if spec.weights == "scratch":
        walked.inputs.tokenizer.save_pretrained(folder)
    make_readable(folder)


def costs_of(
    walked: Walked,
    peaks: Mapping[str, int],
    quantized: QuantizedScores,
    weights: Path,
    rate: float | None,
) -> schema.Costs:
    """What the run took; `peaks` are bytes by phase, `rate` in FLOP/s."""
    built, trained = walked.built, walked.trained
    costs: schema.Costs = {
        "total_params": built.base_parameters,
        "trainable_params": built.trainable_parameters,
        "base_bytes": built.base_bytes,
        "trained_file_bytes": sum(path.stat().st_size for path in weights.glob("*.safetensors")),
        "peak_memory_bytes": peaks["peak_memory_bytes"],
        "train_seconds": trained.seconds,
        "train_tokens": trained.tokens,
        "supervised_tokens": trained.supervised_tokens,
        "useful_token_share": _ratio(trained.tokens, trained.computed_tokens),
        "tokens_per_second": _ratio(trained.tokens, trained.seconds),
        "step_seconds": median_step(trained.losses),
        "matmul_flops": rate,
        "final_loss": trained.losses[-1]["loss"] if trained.losses else None,
        "evaluation_seconds": walked.evaluated.seconds,
        "evaluated_examples": walked.evaluated.examples,
    }
    model_bytes = {f"bytes_as_{name}": size for name, size in quantized.model_bytes.items()}
    return cast(schema.Costs, {**costs, **peaks, **model_bytes})


def data_of(spec: RunSpec, store: Store, inputs: Inputs, weights: Path) -> schema.Data:
    """What the run was made from: digests of datasets, corpora, base and tokenizer."""
    datasets = inputs.datasets.items()
    return {
        "fingerprints": {name: dataset.fingerprints for name, dataset in datasets},
        "overlap": {name: dataset.overlap for name, dataset in datasets},
        "origin": {name: dataset.origin for name, dataset in datasets},
        "files": {name: dataset.files for name, dataset in datasets},
        "corpora": corpora_facts(spec, inputs.corpora),
        "base": cast(schema.Base, inputs.base_facts),
        "tokenizer": {
            "origin": inputs.tokenizer_origin,
            "sha256": tokenizer_digest(inputs.base or weights),
            "ends": list(inputs.ends),
        },
        "times_scored": store.scorings.times(spec),
    }


def attention_used(spec: RunSpec, device: str, layout: Layout | None = None) -> Attention:
    """Which implementation of attention training and evaluation use on a kind of device; None
    where nothing is computed. Only training has rows of segments.
    """
    dtype = getattr(torch, spec.model.dtype)
    used = layout["used"] if layout else spec.train.layout
    return {
        "train": implementation(used == "bins", device, dtype) if spec.train.max_steps else None,
        "evaluate": implementation(False, device, dtype) if spec.tasks else None,
    }


def measured_rate(spec: RunSpec, device: torch.device) -> float | None:
    """FLOP/s of large matrix products here and now, in the model's dtype: what a pretraining
    run's own speed is held against. None for other runs.
    """
    if spec.weights != "scratch":
        return None
    return matmul.measure(device, getattr(torch, spec.model.dtype), seconds=1.0).flops


def median_step(losses: Sequence[dict[str, Any]]) -> float | None:
    """The median seconds of a training step after the first two, which warm up."""
    ends = [row["seconds"] for row in losses]
    durations = [end - start for start, end in pairwise(ends)][1:]
    return median(durations) if durations else None


def _ratio(part: int | float, total: int | float) -> float | None:
    return part / total if total else None
