"""What can go wrong in a way the user can mend: one line each, and a documented exit code."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class FinreproError(Exception):
    """An error with a one-line message for the user; `exit_code` is the process's exit status."""

    exit_code = 4


class UsageError(FinreproError):
    """The command line or a configuration file is wrong."""

    exit_code = 2


class EnvironmentFault(FinreproError):
    """The command is right, but this machine, store or data folder cannot run it."""

    exit_code = 3


class DiskFull(EnvironmentFault):
    """No space, no inode, or no larger file: whoever goes on writing fails again."""


class StoreGone(EnvironmentFault):
    """The store is not where it was: nothing is written there any more."""


class Unavailable(EnvironmentFault):
    """A cell's checkpoint or adapter is missing or not the one it should be: that cell is skipped,
    others run.
    """


class CellFailed(FinreproError):
    """A cell ran and did not finish: diverged, out of memory, or a defect."""

    exit_code = 4


def unknown(kind: str, name: str, allowed: Iterable[str]) -> UsageError:
    """A `UsageError` that names the unknown value, the nearest match and everything allowed."""
    names = sorted(allowed)
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return UsageError(f"unknown {kind} '{name}'.{hint} Allowed: {', '.join(names)}.")


class DataFault(CellFailed):
    """A cell's dataset is here and is not what it should be: that cell fails, others run."""


class Diverged(CellFailed):
    """The loss, the gradient or a trained weight is not a finite number."""


class NotFinite(CellFailed):
    """A score is NaN or infinite: it is no answer."""


class Interrupted(Exception):
    """A signal asked the run to stop: after a step, with a checkpoint, or while it waited for text,
    without one.
    """


@contextmanager
def unavailable_if_faulty() -> Iterator[None]:
    """Turn a fault of a checkpoint or an adapter into `Unavailable`, so that the campaign goes on
    with the other cells. A full disk is none of theirs.
    """
    try:
        yield
    except DiskFull:
        raise
    except (EnvironmentFault, UsageError) as error:
        raise Unavailable(str(error)) from error


@contextmanager
def failed_if_faulty() -> Iterator[None]:
    """Turn a fault of a dataset into `DataFault`, so that the campaign goes on with the other
    cells.
    """
    try:
        yield
    except EnvironmentFault as error:
        raise DataFault(str(error)) from error
