"""Around every command: options as they are typed, errors of one line, exit codes."""

import sys
from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any

from invoke.context import Context
from invoke.tasks import task

from finrepro.arguments import check_texts, count, seed_list

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
        "adapter": adapter or None,
        "weights": weights,
    }


def folders(store: str | None, data_dir: str | None, models_dir: str | None) -> dict[str, Any]:
    """Where a command works, as arguments of finrepro.api; a variable that is not set is none."""
    return {"store": store or None, "data_dir": data_dir or None, "models_dir": models_dir or None}
