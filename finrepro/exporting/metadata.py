"""The YAML in front of a model card, as the hub reads it: base, data, library, and the scores as a
model index.
"""

import math
from typing import TYPE_CHECKING, Any

from finrepro.catalogue import reader
from finrepro.errors import UsageError
from finrepro.exporting.layout import ExportLayout
from finrepro.exporting.recorded import RecordedRun

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

LIBRARY = {"peft": "peft", "merged": "transformers", "base": "transformers"}


def front_matter(recorded: RecordedRun, planned: ExportLayout) -> str:
    """The hub's fields as YAML. No licence: of most bases the catalogue knows none."""
    from huggingface_hub import ModelCardData  # a second of imports

    spec = recorded.spec
    hub = spec.model.hub if spec.weights == "pretrained" else None
    entries = [dataset_entry(name) for name in data_names(recorded)]
    ids = sorted({entry.config.hub.id for entry in entries if entry and entry.config.hub})
    trained = [] if planned.format == "base" else [spec.adapter.kind]
    scores = [] if planned.format == "base" else _eval_results(recorded)
    return ModelCardData(
        base_model=hub.id if hub else None,
        datasets=ids or None,
        library_name=LIBRARY[planned.format],
        pipeline_tag="text-generation",
        tags=[
            "finrepro",
            *trained,
            spec.quantizer.name,
            spec.model.family,
            f"{spec.model.scale}-scale",
        ],
        model_name=recorded.result["label"] if scores else None,
        eval_results=scores or None,
    ).to_yaml()


def _eval_results(recorded: RecordedRun) -> "list[EvalResult]":
    """Every finite score with its bootstrap interval and number of rows."""
    from huggingface_hub import EvalResult

    evaluation = recorded.spec.evaluation
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=score["task"],
            dataset_name=score["task"],
            dataset_split=evaluation.split,
            metric_type=score["metric"],
            metric_value=score["value"],
            metric_args={
                "low": score["low"],
                "high": score["high"],
                "confidence": evaluation.confidence,
                "rows": score["n"],
            },
        )
        for score in recorded.result["scores"]
        if math.isfinite(score["value"])
    ]


def data_names(recorded: RecordedRun) -> list[str]:
    """The datasets that a run read, by the catalogue's names."""
    return sorted(recorded.result["data"].get("fingerprints") or {})


def dataset_entry(name: str) -> Any:
    """The catalogue's entry; None when it is gone."""
    try:
        return reader.dataset(name)
    except UsageError:
        return None
