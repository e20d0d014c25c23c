"""What can go wrong in a way the user can mend: one line each, and a documented exit code."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class FinreproError(Exception):
    """An error with a one-line message for the user; `exit_code` is the process's exit status."""

    exit_code = 4


class UsageError(FinreproError):
    """The request or a configuration file is wrong."""

    exit_code = 2


class EnvironmentFault(FinreproError):
    """The request is right, but this machine, store or data folder cannot serve it."""

    exit_code = 3


class Unavailable(EnvironmentFault):
    """What one cell starts from, a checkpoint or an adapter, is not here or not what it should
    be: that cell is skipped, others run.
    """


class CellFailed(FinreproError):
    """A cell ran and did not finish: diverged, out of memory, or a defect."""

    exit_code = 4


def unknown(what: str, name: str, allowed: Iterable[str]) -> UsageError:
    """A `UsageError` that names the wrong value, the nearest match and everything allowed."""
    known = sorted(allowed)
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UsageError(f"unknown {what} '{name}'.{hint} Allowed: {', '.join(known)}.")


class Diverged(CellFailed):
    """The loss or the gradient is not a finite number."""


class Interrupted(Exception):
    """Asked to stop; after a step with a checkpoint, while text is waited for without."""


@contextmanager
def unavailable_if_faulty() -> Iterator[None]:
    """A fault of the checkpoint or the adapter is the cell's own: the campaign goes on without
    it.
    """
    try:
        yield
    except (EnvironmentFault, UsageError) as error:
        raise Unavailable(str(error)) from error
