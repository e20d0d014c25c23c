"""Around every command: options as they are typed, errors of one line, exit codes."""

import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from pathlib import Path
from typing import Any

from invoke.context import Context
from invoke.tasks import task

from finrepro.arguments import count, seed_list
from finrepro.errors import UsageError

# What file systems allow is 255; partial files beside it and tables named after it need a part.
NAME_BYTES = 200
CELL_FAILED, ENVIRONMENT, INTERRUPTED = 4, 3, 130


def command(**options: Any) -> Callable[[Callable[..., int | None]], Any]:
    """A task whose errors are one line and whose result is the exit code."""

    def decorate(function: Callable[..., int | None]) -> Any:
        @wraps(function)
        def run(context: Context, *arguments: Any, **keywords: Any) -> None:
            from finrepro.errors import FinreproError

            try:
                check_texts(keywords)
                code = function(context, *arguments, **keywords)
            except FinreproError as error:
                print(f"finrepro: {' '.join(str(error).split())}", file=sys.stderr)
                code = error.exit_code
            except ModuleNotFoundError as error:
                print(
                    f"finrepro: the package '{error.name}' is not installed: "
                    "make .venv anew with ./run",
                    file=sys.stderr,
                )
                code = ENVIRONMENT
            except KeyboardInterrupt:
                print(
                    "finrepro: interrupted; run the same command again to go on.", file=sys.stderr
                )
                code = INTERRUPTED
            sys.stdout.flush()
            sys.exit(code or 0)

        return task(auto_shortflags=False, **options)(run)

    return decorate


def check_texts(options: Mapping[str, object]) -> None:
    """Raise `UsageError` for an option, or a variable of ours, that can be no name of a file or be
    printed in no line.
    """
    variables = {name: text for name, text in os.environ.items() if name.startswith("FINREPRO_")}
    flags = {f"--{name.replace('_', '-')}": text for name, text in options.items()}
    for name, text in {**variables, **flags}.items():
        if not isinstance(text, str):
            continue
        shown = ascii(text if len(text) < 60 else text[:60] + "...")
        if any("\udc80" <= letter <= "\udcff" for letter in text):
            raise UsageError(f"{name} {shown}: its bytes are no UTF-8.")
        if any(unicodedata.category(letter) in ("Cc", "Zl", "Zp") for letter in text):
            raise UsageError(f"{name} {shown}: control characters and line breaks are not allowed.")
        if max(len(part.encode()) for part in text.split("/")) > NAME_BYTES:
            raise UsageError(f"{name} {shown}: a name may have {NAME_BYTES} bytes at most.")


def folder(text: str | None, variable: str | None = None) -> Path | None:
    """A folder argument, relative to where the user is, or the environment variable's."""
    value = text or (os.environ.get(variable) if variable else None)
    return Path(value).expanduser().absolute() if value else None


def code_of(states: Iterable[str]) -> int:
    """The exit code of a campaign by the states of its cells: 4 if one failed or is damaged, 3 if
    the only one was skipped.
    """
    cells = list(states)
    if {"failed", "diverged", "damaged"} & set(cells):
        return CELL_FAILED
    return ENVIRONMENT if cells == ["skipped"] else 0


def cells_of(
    scale: str,
    quick: bool,
    full: bool,
    only: str | None,
    seeds: str | None,
    devices: str | None,
    adapter: str | None,
    weights: str,
) -> dict[str, Any]:
    """What of a table is asked for, as arguments of finrepro.api."""
    return {
        "scale": scale,
        "quick": quick,
        "full": full,
        "only": only,
        "seeds": None if seeds is None else seed_list(seeds),
        "devices": None if devices is None else count("devices", devices),
        "adapter": folder(adapter),
        "weights": weights,
    }


def folders(store: str | None, data_dir: str | None, models_dir: str | None) -> dict[str, Any]:
    """Where a command works, as arguments of finrepro.api."""
    return {"store": folder(store), "data_dir": folder(data_dir), "models_dir": folder(models_dir)}
