"""The commands: each turns the texts of its options into values, calls finrepro.api, prints what
comes back, and ends with an exit code. `--list` shows them, `--help NAME` explains one.
"""

import os
import sys
from pathlib import Path

from invoke.collection import Collection
from invoke.context import Context
from invoke.program import Program

from finrepro import __version__
from finrepro.arguments import count, fraction, optional_count, positive
from finrepro.commands.shell import cells_of, code_of, command, folders
from finrepro.errors import UsageError

FOLDERS = {
    "store": "where results/ and mlruns/ go; default FINREPRO_STORE, else the checkout's root, "
    "or the current folder where finrepro is installed as a package",
    "data-dir": "folder with datasets that are not embedded, and with corpora, which are prepared "
    "there; default FINREPRO_DATA_DIR",
    "models-dir": "folder with checkpoints of the real models",
}
CELLS = FOLDERS | {
    "table": "number of the table: 3",
    "scale": "auto (default: smoke, or paper on a GPU that can run it), smoke, open (a small open "
    "language model, offline on a CPU; hours) or paper",
    "quick": "a handful of cells: about two minutes at smoke scale",
    "full": "the complete matrix over three seeds",
    "only": "cells whose label matches this pattern, as 'gpt2*-nf4-*'",
    "seeds": "seeds instead of the table's, as 0,1,2",
    "weights": "pretrained (default) or random: memory, speed and size without a download, no "
    "quality",
    "devices": "devices (ranks) per cell; default the table's own, mostly 1",
    "adapter": "a PEFT folder made elsewhere: score it on its base, in place of the table's "
    "adapters",
}


@command(
    help=CELLS
    | {
        "jobs": "cells at a time; never changes a result; default what cores and memory "
        "hold, 1 on a GPU",
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
    jobs: str | None = None,
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
    from finrepro import api

    arguments = cells_of(scale, quick, full, only, seeds, devices, adapter, weights)
    arguments |= folders(store, data_dir, models_dir)
    arguments |= {"jobs": optional_count("jobs", jobs), "keep": keep}
    if plan:
        api.plan(table, **arguments).show(launches=True)
        return 0
    reproduced = api.reproduce(table, **arguments)
    reproduced.show()
    print(*(f"finrepro: {fault}\n" for fault in reproduced.faults), sep="", end="", file=sys.stderr)
    return code_of(reproduced.states.values()) or (3 if reproduced.faults else 0)


@command(help=CELLS)
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
) -> None:
    """List every cell of a table: label, run id, state, and why it cannot run."""
    from finrepro import api

    arguments = cells_of(scale, quick, full, only, seeds, devices, adapter, weights)
    api.plan(table, **arguments, **folders(store, data_dir, models_dir)).show()


@command(
    help={
        "fetch": "download this dataset, checked against its sha256",
        "prepare": "tokenize a corpus of configs/corpora.yaml, a file or a folder into shards; "
        "run again to go on",
        "verify": "check every sha256 of this prepared corpus; exit code 4 if one is wrong",
        "tokenizer": "with --prepare: the folder of the model's tokenizer",
        "out": "with --prepare: the folder of the corpus",
        "workers": "with --prepare: tokenizing processes, which never change a byte; default one "
        "a core, one for less than 16 MB",
        "on-error": "with --prepare: stop (default) at damaged text, or skip it into "
        "quarantine.jsonl",
        "field": "with --prepare: the text's field in JSON lines, its column in Parquet; default "
        "text",
        "documents": "with --prepare: what is a document of a text file: file (default), "
        "articles, lines or paragraphs",
        "validation": "with --prepare: fraction of the documents that is held out; default 0.005, "
        "or the catalogue's",
        "data-dir": FOLDERS["data-dir"],
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
    """List the datasets, fetch one, or prepare and verify text for pretraining."""
    from finrepro import api

    if prepare and verify is not None:
        raise UsageError("--prepare and --verify are two commands: give one of them.")
    if verify is not None:
        corpus = api.verify_corpus(verify)
        corpus.show()
        return 4 if corpus.damaged else 0
    if prepare:
        api.prepare_corpus(
            prepare,
            tokenizer or "",
            out or "",
            workers=count("workers", workers) if workers else None,
            on_error=on_error,
            field=field or None,
            documents=documents or None,
            validation=fraction("validation", validation) if validation else None,
            data_dir=data_dir,
        ).show()
    else:
        lines = api.fetch(fetch) if fetch else api.datasets(data_dir)
        print(*lines, sep="\n")
    return 0


@command(help={"rebuild": "make MLflow's view again from results/", "store": FOLDERS["store"]})
def record(context: Context, rebuild: bool = False, store: str | None = None) -> int:
    """Check every result against its manifest; with --rebuild, make MLflow's view again."""
    from finrepro import api

    checked = api.record(rebuild, store=store)
    checked.show()
    return 4 if checked.damaged else 0


@command(
    help=FOLDERS
    | {
        "run": "id of a finished run: 12 digits, as invoke cells lists them",
        "format": "peft (default): the adapter; merged: one dense model; base: what it was "
        "trained on",
        "out": "the folder to make; default exports/RUN-FORMAT in the store",
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
    """Write a finished run as files that PEFT and Transformers load, with checked logits."""
    from finrepro import api

    arguments = {"format": format, "out": out} | folders(store, data_dir, models_dir)
    api.export(run, **arguments)


@command(
    help={
        "gpu": "GPU of configs/hardware.yaml: h100",
        "gpus": "how many of them, 1",
        "hours": "how long they compute; a model and its tokens are worked out",
        "mfu": "share of the peak that training reaches, 0.4; an assumption (docs/budget.md says "
        "what others measured)",
        "model": "the model that is trained; with --tokens its hours, price and memory are worked "
        "out",
        "tokens": "tokens that --model is trained on, as 10e9",
        "unique-tokens": "different tokens that there are; more are repetitions, worth less",
        "sequence": "tokens in a sequence, 1024",
        "price": "USD an hour and GPU, in place of the catalogue's",
        "measure": "in place of --gpu: the device at hand, at the matrix rate that it reaches in "
        "a few seconds",
        "store": FOLDERS["store"],
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
) -> None:
    """From GPUs and hours to a model and its tokens by scaling laws; or the other way round."""
    from finrepro import api

    numbers = {"hours": hours, "tokens": tokens, "unique_tokens": unique_tokens, "price": price}
    api.budget(
        gpu=gpu,
        gpus=count("gpus", gpus),
        mfu=positive("mfu", mfu),
        model=model,
        sequence=count("sequence", sequence),
        measure=measure,
        store=store,
        **{
            name: positive(name.replace("_", "-"), text)
            for name, text in numbers.items()
            if text is not None
        },
    ).show()


@command(
    help={
        "store": FOLDERS["store"],
        "port": "port on this machine",
        "host": "address to listen on; default FINREPRO_UI_HOST (in the container 0.0.0.0) or "
        "127.0.0.1",
    }
)
def ui(
    context: Context, store: str | None = None, port: str = "5000", host: str | None = None
) -> None:
    """Show the results in MLflow's web interface, on this machine only; prints the address."""
    from finrepro import api

    address = host or os.environ.get("FINREPRO_UI_HOST", "127.0.0.1")
    api.ui(host=address, port=port, store=store)


@command(help={"store": FOLDERS["store"]})
def paper(context: Context, store: str | None = None) -> None:
    """Build the paper's PDF from paper/ with the tables of the store; needs LaTeX."""
    from finrepro import api

    print(api.paper(store=store))


@command(
    help={
        "quick": "a law of each kind, in less than a minute",
        "slow": "the tests marked slow, instead of the default ones",
        "only": "tests whose name matches, as pytest -k",
    }
)
def test(context: Context, quick: bool = False, slow: bool = False, only: str = "") -> int:
    """Run the tests: on a CPU, without a network, in a few minutes."""
    from finrepro.commands.develop import run_tests

    return run_tests(slow, only, quick)


@command()
def check(context: Context) -> int:
    """Format, lint, types and layering: what must be clean before a commit."""
    from finrepro.commands.develop import run_checks

    return run_checks()


@command(
    help={
        "only": "one benchmark by the name of its file",
        "store": "where the JSON goes; default benchmarks/results",
    }
)
def bench(context: Context, only: str = "", store: str | None = None) -> int:
    """Run the benchmarks, each against its named baseline; raw times and machine go to JSON."""
    from finrepro.commands.develop import run_benchmarks

    return run_benchmarks(only, Path(store).expanduser().absolute() if store else None)


namespace = Collection(
    reproduce, cells, budget, data, record, export, ui, paper, test, check, bench
)


def main() -> None:
    """The command `finrepro` of an installed package. As ./run does, it turns telemetry off."""
    os.environ |= {
        "DO_NOT_TRACK": "true",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    Program(name="finrepro", binary="finrepro", namespace=namespace, version=__version__).run()
