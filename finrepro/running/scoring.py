"""The evaluation of a cell: every task it is scored on, and once more from the weights that it has
written, through each quantizer of its table.
"""

import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from finrepro.catalogue.spec import RunSpec
from finrepro.evaluation import quantized
from finrepro.evaluation.evaluate import evaluate
from finrepro.evidence.store import Store
from finrepro.running.events import Emit, emit_phase
from finrepro.running.inputs import Inputs
from finrepro.runtime import ranks
from finrepro.training.engines.deepspeed import inference


@dataclass
class TaskScores:
    """Scores and predictions of all tasks, how many examples were scored, and in how many
    seconds.
    """

    scores: list[dict[str, Any]] = field(default_factory=list)
    predictions: list[dict[str, Any]] = field(default_factory=list)
    examples: int = 0
    seconds: float = 0.0


@dataclass
class QuantizedScores:
    """Scores in other quantizers, the bytes of the model in each, by its name, and why some have
    none.
    """

    scores: list[dict[str, Any]] = field(default_factory=list)
    model_bytes: dict[str, int] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def evaluate_tasks(
    spec: RunSpec,
    model: nn.Module,
    inputs: Inputs,
    store: Store,
    device: torch.device,
    emit: Emit,
) -> TaskScores:
    """Score the model on every task of the cell; all ranks call it, and each gets everything.

    That a split is scored is noted in the store before it is. A model of random weights is
    measured and not judged: it has predictions, and no scores.
    """
    began, result = time.monotonic(), TaskScores()
    with inference(model, spec.train, device):
        for task in spec.tasks:
            examples = inputs.datasets[task.dataset.name].splits[spec.evaluation.split]
            if ranks.current().is_main:
                store.scorings.note(spec, task.task.name)
            evaluated = evaluate(
                model,
                inputs.tokenizer,
                task,
                examples,
                spec.evaluation,
                spec.train.max_seq_len,
                partial(emit_progress, emit),
                inputs.ends,
            )
            result.scores += evaluated.scores if spec.weights != "random" else []
            result.predictions += evaluated.rows
            result.examples += len(examples)
    result.seconds = time.monotonic() - began
    return result


def evaluate_quantized(
    spec: RunSpec, weights: Path, inputs: Inputs, device: torch.device, emit: Emit
) -> QuantizedScores:
    """Load the trained model from `weights` through each quantizer of the cell's `stored_as`, and
    score it again.

    One that fails is a remark: what was trained is whole without it.
    """
    result = QuantizedScores()
    for quantizer in quantized.possible(spec):
        emit_phase(emit, f"evaluate as {quantizer.name}")
        try:
            scores, model_bytes = quantized.scores(
                spec, quantizer, weights, inputs.datasets, inputs.tokenizer, inputs.ends, device
            )
        except Exception as error:
            message = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            result.remarks.append(f"not scored in {quantizer.name}: {message}")
            continue
        result.scores += scores
        result.model_bytes[quantizer.name] = model_bytes
    return result


def emit_progress(emit: Emit, count: int, total: int) -> None:
    """Say how far an evaluation is, in examples."""
    emit_phase(emit, f"evaluate {count}/{total}")
