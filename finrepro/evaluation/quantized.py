"""What a trained model is worth in fewer bits: the model that a run has just written, loaded
through a quantizer and scored again.
"""

import dataclasses
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro.catalogue import reader
from finrepro.catalogue.compatibility import unstorable
from finrepro.catalogue.spec import RunSpec
from finrepro.data.files import Dataset
from finrepro.evaluation.evaluate import evaluate
from finrepro.models.build import build
from finrepro.settings import Choice

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast


def task_name(task: str, quantizer: str) -> str:
    """Under which name the scores of a task stand that were taken with the model stored
    otherwise.
    """
    return f"{task}.{quantizer}"


def possible(spec: RunSpec) -> list[Choice]:
    """Those of the cell's `stored_as` that can hold its model; none on several ranks, where only
    the first has the files.
    """
    quantizers = spec.stored_as if spec.world_size == 1 else ()
    return [quantizer for quantizer in quantizers if unstorable(spec.model, quantizer, 0) is None]


def scores(
    spec: RunSpec,
    quantizer: Choice,
    folder: Path,
    datasets: dict[str, Dataset],
    tokenizer: "PreTrainedTokenizerFast",
    ends: Collection[int],
    device: "torch.device",
) -> tuple[list[dict[str, Any]], int]:
    """The scores of the whole model in `folder` under a quantizer, and the bytes of it as
    stored.
    """
    plain = dataclasses.replace(spec.train, zero_stage=0, activation_checkpointing=False)
    loaded = dataclasses.replace(
        spec,
        weights="pretrained",
        quantizer=quantizer,
        adapter=reader.adapter("base"),
        train=plain,
        stored_as=(),
    )
    built = build(loaded, folder, device)
    all_scores = []
    for task in spec.tasks:
        examples = datasets[task.dataset.name].splits[spec.evaluation.split]
        evaluated = evaluate(
            built.model,
            tokenizer,
            task,
            examples,
            spec.evaluation,
            spec.train.max_seq_len,
            ends=ends,
        )
        all_scores += [
            score | {"task": task_name(task.task.name, quantizer.name)}
            for score in evaluated.scores
        ]
    return all_scores, built.base_bytes
