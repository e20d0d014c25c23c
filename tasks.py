"""The commands. Each is a thin shell around a function of finrepro; `invoke --list` shows them,
`invoke --help NAME` explains one.
"""

import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from invoke.collection import Collection
from invoke.context import Context
from invoke.tasks import task

PROJECT = Path(__file__).resolve().parent
sys.path.insert(0, str(PROJECT))

from finrepro.data.preparing.options import HELP  # noqa: E402

SELECT_HELP = {
    "table": "number of the table: 3",
    "scale": "auto (default), smoke or paper",
    "quick": "a handful of cells, about two minutes",
    "full": "the complete matrix over three seeds",
    "only": "cells whose label matches this pattern, as 'gpt2*-nf4-*'",
    "seeds": "seeds instead of the table's, as 0,1,2",
    "weights": "pretrained (default) or random: memory, speed and size without a download, no quality",
    "devices": "devices (ranks) per cell; default the table's own, mostly 1",
    "adapter": "a PEFT folder made elsewhere: score it on its base, in place of the table's adapters",
    "store": "where results/ and mlruns/ go; default FINREPRO_STORE or the project's root",
    "data-dir": "folder with datasets that are not embedded, and with corpora, which are prepared there; default FINREPRO_DATA_DIR",
    "models-dir": "folder with checkpoints of the real models",
}


def command(**options: Any) -> Callable[[Callable[..., int | None]], Any]:
    """A task whose errors are one line and whose result is the exit code."""

    def decorate(function: Callable[..., int | None]) -> Any:
        @wraps(function)
        def run(context: Context, *arguments: Any, **keywords: Any) -> None:
            from finrepro.errors import FinreproError

            try:
                code = function(context, *arguments, **keywords)
            except FinreproError as error:
                print(f"finrepro: {' '.join(str(error).split())}", file=sys.stderr)
                code = error.exit_code
            except ModuleNotFoundError as error:
                print(
                    f"finrepro: the package '{error.name}' is not installed: make .venv anew with ./run",
                    file=sys.stderr,
                )
                code = 3
            except KeyboardInterrupt:
                print(
                    "finrepro: interrupted; run the same command again to go on.", file=sys.stderr
                )
                code = 130
            sys.stdout.flush()
            sys.exit(code or 0)

        return task(auto_shortflags=False, **options)(run)

    return decorate


def _folder(given: str | None, variable: str | None = None) -> Path | None:
    """A folder argument, relative to where the user is, or the environment variable's."""
    value = given or (os.environ.get(variable) if variable else None)
    return Path(value).expanduser().absolute() if value else None


def _place(store: str | None, data_dir: str | None, models_dir: str | None) -> Any:
    """The store and the folders, checked."""
    from finrepro.errors import EnvironmentFault
    from finrepro.evidence.place import Place
    from finrepro.evidence.store import open_store

    data, models = _folder(data_dir, "FINREPRO_DATA_DIR"), _folder(models_dir)
    for flag, folder in (("--data-dir", data), ("--models-dir", models)):
        if folder is not None and not os.path.isdir(folder):  # noqa: PTH112  (False also for a name that no file system takes)
            raise EnvironmentFault(f"{flag} {folder} is not a folder.")
    return Place(open_store(_folder(store, "FINREPRO_STORE")), data, models)


@command(
    help=SELECT_HELP
    | {
        "jobs": "cells at a time; never changes a result",
        "keep": "keep results made by other source or packages",
        "plan": "print what each cell needs and the command that runs it, and stop",
    }
)
def reproduce(
    context: Context,
    table: str = "",
    scale: str = "auto",
    quick: bool = False,
    full: bool = False,
    only: str | None = None,
    seeds: str | None = None,
    jobs: str = "1",
    devices: str | None = None,
    adapter: str | None = None,
    store: str | None = None,
    data_dir: str | None = None,
    models_dir: str | None = None,
    weights: str = "pretrained",
    keep: bool = False,
    plan: bool = False,
) -> int:
    """Run a table's missing cells, record them, and print the table."""
    from finrepro.campaigns import computed
    from finrepro.campaigns.campaign import Options, list_plan
    from finrepro.campaigns.campaign import reproduce as run
    from finrepro.catalogue import request
    from finrepro.catalogue import selection as selecting

    number = request.whole("jobs", jobs)
    folder = str(_folder(adapter)) if adapter is not None else None
    selection = request.selection(table, quick, full, only, seeds, weights, devices, folder)
    options = Options(selecting.parse_choice("scale", scale, selecting.SCALES), number, keep)
    if computed.is_computed(selection.table):
        place = _place(store, data_dir, models_dir)
        return computed.reproduce(selection, place, scale, plan, jobs=number > 1, keep=keep)
    if plan:
        return list_plan(selection, _place(store, data_dir, models_dir), options, launches=True)
    return run(selection, _place(store, data_dir, models_dir), options)


@command(help=SELECT_HELP)
def cells(
    context: Context,
    table: str = "3",
    scale: str = "auto",
    quick: bool = False,
    full: bool = False,
    only: str | None = None,
    seeds: str | None = None,
    devices: str | None = None,
    adapter: str | None = None,
    store: str | None = None,
    data_dir: str | None = None,
    models_dir: str | None = None,
    weights: str = "pretrained",
) -> int:
    """List every cell of a table: label, run id, state, and why it cannot run."""
    from finrepro.campaigns import computed
    from finrepro.campaigns.campaign import Options, list_plan
    from finrepro.catalogue import request
    from finrepro.catalogue import selection as selecting

    selecting.parse_choice("scale", scale, selecting.SCALES)
    folder = str(_folder(adapter)) if adapter is not None else None
    selection = request.selection(table, quick, full, only, seeds, weights, devices, folder)
    if computed.is_computed(selection.table):
        return computed.reproduce(selection, _place(store, data_dir, models_dir), scale, plan=True)
    return list_plan(selection, _place(store, data_dir, models_dir), Options(scale))


@command(
    help={
        "fetch": "download this dataset, checked against its sha256",
        "data-dir": SELECT_HELP["data-dir"],
        **HELP,
    }
)
def data(
    context: Context,
    fetch: str = "",
    prepare: str = "",
    verify: str | None = None,
    tokenizer: str | None = None,
    out: str | None = None,
    workers: str = "",
    on_error: str = "stop",
    field: str = "",
    documents: str = "",
    validation: str = "",
    data_dir: str | None = None,
) -> int:
    """List the datasets: licence, source, and whether each is here; fetch one; or prepare and
    verify text for pretraining.
    """
    from finrepro.data.listing import show

    if prepare or verify is not None:
        from finrepro.data.preparing import command as corpora

        corpora.one_of(prepare, verify)
        if verify:
            return corpora.verify(_folder(verify) or Path())
        return corpora.make(
            prepare,
            _folder(tokenizer),
            _folder(out),
            _folder(data_dir, "FINREPRO_DATA_DIR"),
            workers=workers,
            on_error=on_error,
            field=field,
            documents=documents,
            validation=validation,
        )
    return show(fetch, _folder(data_dir, "FINREPRO_DATA_DIR"))


@command(help={"rebuild": "make MLflow's view again from results/", "store": SELECT_HELP["store"]})
def record(context: Context, rebuild: bool = False, store: str | None = None) -> int:
    """Check every result against its manifest; with --rebuild, make MLflow's database again from
    results/.
    """
    from finrepro.evidence.manifest import damaged_files
    from finrepro.tracking.index import database
    from finrepro.tracking.view import rebuild as rebuild_view

    place = _place(store, None, None)
    folders = sorted(
        path for path in (place.store.results / "runs").iterdir() if not path.name.startswith(".")
    )
    damaged = {folder.name: wrong for folder in folders if (wrong := damaged_files(folder))}
    for name, wrong in damaged.items():
        print(f"damaged: {name}: {', '.join(wrong)}")
    print(f"{len(folders)} results, {len(damaged)} damaged")
    if rebuild:
        with place.store.lock():
            print(f"{rebuild_view(place.store)} cells in {database(place.store)}")
    return 4 if damaged else 0


@command(
    help={
        "run": "id of a finished run: 12 digits, as invoke cells lists them",
        "format": "peft (default): the adapter; merged: one dense model; base: what it was trained on",
        "out": "the folder to make; default exports/RUN-FORMAT in the store",
        **{name: SELECT_HELP[name] for name in ("store", "data-dir", "models-dir")},
    }
)
def export(
    context: Context,
    run: str = "",
    format: str = "peft",
    out: str | None = None,
    store: str | None = None,
    data_dir: str | None = None,
    models_dir: str | None = None,
) -> None:
    """Write a finished run as files that PEFT and Transformers load, checked against the run's
    own logits.
    """
    from finrepro.exporting.command import export as make

    make(run, format, _folder(out), _place(store, data_dir, models_dir))


@command(
    help={
        "gpu": "GPU of configs/hardware.yaml: h100",
        "gpus": "how many of them, 1",
        "hours": "how long they compute; a model and its tokens are worked out",
        "mfu": "share of the peak that training reaches, 0.4; an assumption (docs/budget.md says what others measured)",
        "model": "the model that is trained; with --tokens its hours, price and memory are worked out",
        "tokens": "tokens that --model is trained on, as 10e9",
        "unique-tokens": "different tokens that there are; more are repetitions, worth less",
        "sequence": "tokens in a sequence, 1024",
        "price": "USD an hour and GPU, in place of the catalogue's",
        "measure": "in place of --gpu: the device at hand, at the matrix rate that it reaches in a few seconds",
        "store": SELECT_HELP["store"],
    }
)
def budget(
    context: Context,
    gpu: str | None = None,
    gpus: str = "1",
    hours: str | None = None,
    mfu: str = "0.4",
    model: str | None = None,
    tokens: str | None = None,
    unique_tokens: str | None = None,
    sequence: str = "1024",
    price: str | None = None,
    measure: bool = False,
    store: str | None = None,
) -> int:
    """From GPUs and hours to a model and its tokens by scaling laws; or from a model and tokens
    to hours, price and memory.
    """
    from finrepro.budget.command import budget_of, checked_request

    request = checked_request(
        gpu, gpus, hours, mfu, model, tokens, unique_tokens, sequence, price, measure
    )
    return budget_of(_place(store, None, None), request)


@command(
    help={
        "store": SELECT_HELP["store"],
        "port": "port on this machine",
        "host": "address to listen on; default FINREPRO_UI_HOST (in the container 0.0.0.0) or 127.0.0.1",
    }
)
def ui(
    context: Context, store: str | None = None, port: str = "5000", host: str | None = None
) -> int:
    """Show the results in MLflow's web interface, on this machine only; prints the address."""
    from finrepro.tracking.ui import serve

    return serve(
        _place(store, None, None).store,
        host or os.environ.get("FINREPRO_UI_HOST", "127.0.0.1"),
        port,
    )


@command(help={"store": SELECT_HELP["store"]})
def paper(context: Context, store: str | None = None) -> None:
    """Build the paper's PDF from paper/ with the tables of the store; needs LaTeX."""
    from finrepro.reporting.paper import build

    print(build(_place(store, None, None).store.root))


@command(
    help={
        "slow": "the tests marked slow, instead of the default ones",
        "only": "tests whose name matches, as pytest -k",
    }
)
def test(context: Context, slow: bool = False, only: str = "") -> int:
    """Run the tests: on a CPU, without a network, in a few minutes."""
    from finrepro.develop import run_tests

    return run_tests(slow, only)


@command()
def check(context: Context) -> int:
    """Format, lint, types and layering: what must be clean before a commit."""
    from finrepro.develop import run_checks

    return run_checks()


@command(
    help={
        "only": "one benchmark by the name of its file",
        "store": "where the JSON goes; default benchmarks/results",
    }
)
def bench(context: Context, only: str = "", store: str | None = None) -> int:
    """Run the benchmarks, each against its named baseline, and write raw times and machine as
    JSON.
    """
    from finrepro.develop import run_benchmarks

    return run_benchmarks(only, _folder(store))


namespace = Collection(
    reproduce, cells, budget, data, record, export, ui, paper, test, check, bench
)
