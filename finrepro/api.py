"""Everything that the package does, for Python; the commands call these functions too.

Values go in and come out typed. What cannot be done is a `FinreproError`, one line: a
`UsageError` for a wrong request, an `EnvironmentFault` for what this machine, store or data folder
cannot serve. `store` is the folder of results/ and mlruns/ (by default FINREPRO_STORE; else the
root of the checkout, or for an installed package the current folder), `data_dir` that of datasets
which are not embedded (by default FINREPRO_DATA_DIR), `models_dir` that of checkpoints.

What is asked for of a table: `scale` is `smoke` (miniatures), `open` (a small open model), `paper`
or `auto`; `quick` a handful of cells and `full` every combination over three seeds; `only` a
pattern over cell labels, as `gpt2*-nf4-*`; `seeds` in place of the table's; `weights` `pretrained`,
or `random` for memory and speed alone; `devices` ranks a cell; `adapter` a PEFT folder to score.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from finrepro.arguments import checked, choice, needed, optional_count
from finrepro.catalogue.selection import SCALES, select
from finrepro.catalogue.spec import Weights
from finrepro.errors import EnvironmentFault
from finrepro.evidence.place import Place
from finrepro.evidence.store import open_store

if TYPE_CHECKING:
    import pandas
    from transformers import PreTrainedTokenizerFast

    from finrepro.budgeting.command import BudgetAnswer
    from finrepro.campaigns.outcome import Reproduced
    from finrepro.campaigns.preview import CampaignPlan
    from finrepro.data.preparing.command import CheckedCorpus, PreparedCorpus
    from finrepro.planning.plan import Step
    from finrepro.tracking.check import StoreCheck

Folder = str | os.PathLike[str]
ScaleChoice = Literal["auto", "smoke", "open", "paper"]


@checked
def reproduce(
    table: int | str,
    scale: ScaleChoice = "auto",
    *,
    quick: bool = False,
    full: bool = False,
    only: str | None = None,
    seeds: Sequence[int] | None = None,
    weights: Weights = "pretrained",
    devices: int | None = None,
    adapter: Folder | None = None,
    jobs: int | None = None,
    keep: bool = False,
    quiet: bool = False,
    store: Folder | None = None,
    data_dir: Folder | None = None,
    models_dir: Folder | None = None,
) -> "Reproduced":
    """Run a table's missing cells, `jobs` at a time (None: as many as this machine has cores and
    memory for, or one on a GPU), record each, and write the table; `.table`
    holds it, `.states` the states of its cells.

    `keep` keeps results that other source or packages made; `quiet` prints no progress. A cell that
    fails, or cannot run here, is a state and no error. Ctrl-C keeps what is finished, and the same
    call goes on.
    """
    from finrepro.campaigns.preview import CampaignOptions, is_computed

    options = CampaignOptions(_scale(scale), optional_count("jobs", jobs), keep, quiet)
    selection = select(
        table,
        quick=quick,
        full=full,
        only=only,
        seeds=seeds,
        weights=weights,
        devices=devices,
        adapter=str(_folder(adapter)) if adapter else None,
    )
    of_sizes = is_computed(selection.table)  # before anything is opened: the table may be unknown
    place = _place(store, data_dir, models_dir)
    if of_sizes:
        from finrepro.campaigns import computed

        return computed.reproduce(selection, place, options)
    from finrepro.campaigns import campaign

    return campaign.reproduce(selection, place, options)


@checked
def plan(
    table: int | str,
    scale: ScaleChoice = "auto",
    *,
    quick: bool = False,
    full: bool = False,
    only: str | None = None,
    seeds: Sequence[int] | None = None,
    weights: Weights = "pretrained",
    devices: int | None = None,
    adapter: Folder | None = None,
    jobs: int | None = None,
    keep: bool = False,
    store: Folder | None = None,
    data_dir: Folder | None = None,
    models_dir: Folder | None = None,
) -> "CampaignPlan":
    """What `reproduce` would do with the same arguments: `.steps` in their order, with the
    estimated bytes and the command of each in `.show(launches=True)`. Nothing runs.
    """
    from finrepro.campaigns.preview import CampaignOptions, is_computed, plan_campaign

    options = CampaignOptions(_scale(scale), optional_count("jobs", jobs), keep)
    selection = select(
        table,
        quick=quick,
        full=full,
        only=only,
        seeds=seeds,
        weights=weights,
        devices=devices,
        adapter=str(_folder(adapter)) if adapter else None,
    )
    of_sizes = is_computed(selection.table)
    place = _place(store, data_dir, models_dir)
    if of_sizes:
        from finrepro.campaigns import computed

        return computed.plan_table(selection, place, options)
    return plan_campaign(selection, place, options)


@checked
def cells(
    table: int | str,
    scale: ScaleChoice = "auto",
    *,
    quick: bool = False,
    full: bool = False,
    only: str | None = None,
    seeds: Sequence[int] | None = None,
    weights: Weights = "pretrained",
    devices: int | None = None,
    adapter: Folder | None = None,
    store: Folder | None = None,
    data_dir: Folder | None = None,
    models_dir: Folder | None = None,
) -> "tuple[Step, ...]":
    """Every selected cell, and the bases that are still to be made: `.spec` (with its `label` and
    `run_id`), `.state`, `.action` (`run`, `keep`, `skip` or `refuse`) and `.reason`.
    """
    return plan(
        table,
        scale,
        quick=quick,
        full=full,
        only=only,
        seeds=seeds,
        weights=weights,
        devices=devices,
        adapter=adapter,
        store=store,
        data_dir=data_dir,
        models_dir=models_dir,
    ).steps


@checked
def results(store: Folder | None = None) -> "pandas.DataFrame":
    """The scores of every run in a store: a row a run, task and metric, with its run id, scale and
    state (finrepro/reporting/frame.py says what each column is).
    """
    from finrepro.reporting.frame import scores

    return scores(_place(store).store)


@checked
def load(
    run: str,
    *,
    store: Folder | None = None,
    data_dir: Folder | None = None,
    models_dir: Folder | None = None,
) -> "tuple[Any, PreTrainedTokenizerFast]":
    """The model of a finished run, frozen, and its tokenizer. Threads and seeds of this process
    become the run's.
    """
    from finrepro.exporting.load import load_run

    return load_run(run, _place(store, data_dir, models_dir))


@checked
def export(
    run: str,
    format: Literal["peft", "merged", "base"] = "peft",
    *,
    out: Folder | None = None,
    store: Folder | None = None,
    data_dir: Folder | None = None,
    models_dir: Folder | None = None,
) -> Path:
    """Write a finished run as files that PEFT and Transformers load, checked against the run's own
    logits; the folder that was made, by default exports/RUN-FORMAT in the store.
    """
    from finrepro.exporting.command import export as export_run

    return export_run(run, format, _folder(out), _place(store, data_dir, models_dir))


@checked
def budget(
    *,
    gpu: str | None = None,
    gpus: int = 1,
    hours: float | None = None,
    mfu: float = 0.4,
    model: str | None = None,
    tokens: float | None = None,
    unique_tokens: float | None = None,
    sequence: int = 1024,
    price: float | None = None,
    measure: bool = False,
    store: Folder | None = None,
) -> "BudgetAnswer":
    """From GPUs and `hours` to a model and its tokens by scaling laws; or from a `model` and its
    `tokens` to hours, price and memory. `.values` has the numbers, `.show()` prints them.

    `gpu` is of configs/hardware.yaml, or with `measure` the device at hand; `mfu` the share of its
    peak that training reaches; `price` in USD an hour and GPU; `sequence` in tokens.
    """
    from finrepro.budgeting.command import budget_of, checked_request

    asked = checked_request(
        gpu, gpus, hours, mfu, model, tokens, unique_tokens, sequence, price, measure
    )
    return budget_of(_place(store), asked)


@checked
def record(rebuild: bool = False, *, store: Folder | None = None) -> "StoreCheck":
    """Check every result against its manifest; with `rebuild`, make MLflow's view again."""
    from finrepro.tracking.check import check_store

    return check_store(_place(store).store, rebuild)


@checked
def datasets(data_dir: Folder | None = None) -> list[str]:
    """Lines that say of every dataset and corpus its licence, source, and whether it is here."""
    from finrepro.data import listing
    from finrepro.data.preparing.entries import listed

    return [*listing.datasets(_data_dir(data_dir)), "", *listed()]


@checked
def fetch(dataset: str) -> list[Path]:
    """Download a dataset, checked against its sha256; the paths of its files."""
    from finrepro.catalogue import reader
    from finrepro.data.fetch import fetch as download

    return list(download(reader.dataset(dataset)))


@checked
def prepare_corpus(
    source: str,
    tokenizer: Folder,
    out: Folder,
    *,
    workers: int | None = None,
    on_error: str = "stop",
    field: str | None = None,
    documents: str | None = None,
    validation: float | None = None,
    data_dir: Folder | None = None,
) -> "PreparedCorpus":
    """Tokenize text for pretraining into shards, or go on with it (finrepro.data.preparing.command
    says what the options are).
    """
    needed(tokenizer and out, "--prepare needs --tokenizer FOLDER and --out FOLDER")
    from finrepro.data.preparing.command import prepare_corpus as prepare

    return prepare(
        source,
        Path(tokenizer).expanduser().absolute(),
        Path(out).expanduser().absolute(),
        _data_dir(data_dir),
        workers=workers,
        on_error=on_error,
        field=field,
        documents=documents,
        validation=validation,
    )


@checked
def verify_corpus(folder: Folder) -> "CheckedCorpus":
    """Check every byte of a prepared corpus."""
    needed(folder, "--verify needs the folder of a prepared corpus")
    from finrepro.data.preparing.command import verify_corpus as verify

    return verify(Path(folder).expanduser().absolute())


@checked
def ui(*, host: str = "127.0.0.1", port: int | str = 5000, store: Folder | None = None) -> None:
    """Show the results in MLflow's web interface until interrupted; prints the address."""
    from finrepro.tracking.ui import serve

    serve(_place(store).store, host, str(port))


@checked
def paper(*, store: Folder | None = None) -> Path:
    """Build the paper's PDF from the tables of the store; its path. Needs LaTeX and a checkout."""
    from finrepro.reporting.paper import build

    return build(_place(store).store.root)


def _scale(scale: str) -> str:
    return choice("scale", scale, SCALES)


def _folder(path: Folder | None) -> Path | None:
    return Path(path).expanduser().absolute() if path else None


def _data_dir(path: Folder | None) -> Path | None:
    return _folder(path or os.environ.get("FINREPRO_DATA_DIR") or None)


def _existing(option: str, path: Folder | None) -> Path | None:
    """A folder that has to be there. Raises `EnvironmentFault` that names the option."""
    folder = _folder(path)
    # os.path.isdir is False also for a name that no file system takes.
    if folder is not None and not os.path.isdir(folder):  # noqa: PTH112
        raise EnvironmentFault(f"{option} {folder} is not a folder.")
    return folder


def _place(
    store: Folder | None, data_dir: Folder | None = None, models_dir: Folder | None = None
) -> Place:
    """The store and the folders, checked."""
    data = _existing("--data-dir", _data_dir(data_dir))
    models = _existing("--models-dir", models_dir)
    return Place(open_store(_folder(store)), data, models)
