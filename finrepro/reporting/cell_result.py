"""A cell joined with its result: what a report is made of."""

from typing import Any, TypedDict

from finrepro.catalogue.spec import Weights


class CellResult(TypedDict):
    """One cell of a table. Without a result its scores, costs and curve are empty."""

    label: str
    run_id: str
    model: str  # names of the catalogue
    quantizer: str
    adapter: str
    adapter_kind: str
    train_on: str
    optimizer: str
    tasks: list[str]  # scored, in the order of the spec
    prompts: dict[str, str]  # task -> name of its template, "" without one
    seed: int
    devices: int
    batch: int  # examples an optimizer step, over all devices
    weights: Weights
    decoded_from: str | None  # format of a package's linear weights, where the base is these
    short: bool  # trained for too few steps to show quality
    state: str  # finrepro.evidence.store's states, or "refused"
    reason: str  # why it is skipped, refused, failed or stale; else ""
    notes: list[str]  # remarks of the run
    scores: list[dict[str, Any]]  # one a (task, metric)
    costs: dict[str, Any]  # measured
    sizes: dict[str, int]  # computed from the architecture, where nothing was measured
    pretraining: dict[str, Any]  # finrepro.reporting.pretraining, where it trains from scratch
    curve: list[dict[str, Any]]  # steps of loss.jsonl, where it trains from scratch
