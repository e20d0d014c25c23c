"""A file of configs/tables/, typed."""

import dataclasses
from typing import Any, Literal

from finrepro.catalogue.spec import Evaluation
from finrepro.settings import Count, Positive, settings
from finrepro.sizes.account import Computed


@settings
class Axes:
    """The values that a table crosses. `batch` sets `global_batch_size`, `optimizer` names an entry
    of optimizers.yaml; without them a table has one of each, in its `train`.

    Adapters and quantizers may be patterns: a new entry of the catalogue is then on the axis.
    """

    model: tuple[str, ...]
    quantizer: tuple[str, ...]
    adapter: tuple[str, ...]
    train_on: tuple[str, ...]
    seed: tuple[int, ...]
    batch: tuple[Positive, ...] = ()
    optimizer: tuple[str, ...] = ()


@settings
class Override:
    """Training settings, and devices, of the cells whose axis values match the patterns (* and
    ?) of `where`.
    """

    where: dict[str, str]
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    devices: Positive | None = None


@settings
class Group:
    """The cells whose labels match one of the patterns, with changes to their training; a cell
    belongs to the first group it matches. `seeds` are those of the table's that the group runs
    (empty: all of them); seeds that a user names replace both.
    """

    cells: tuple[str, ...]
    seeds: tuple[Count, ...] = ()
    train: dict[str, Any] = dataclasses.field(default_factory=dict)


@settings
class Grid:
    """A table at one scale: `default` and `quick` say which of the crossed axes run (empty: all of
    them), --full runs all.

    `full` replaces axes under --full. Where `scored` is false the cells are trained for their costs
    alone. Where `scratch` is true they are trained from the model's own initialisation:
    pretraining. `stored_as` are quantizers under which the trained model is scored as well.
    """

    axes: Axes
    template: str
    threads: Positive
    train: dict[str, Any]
    evaluation: Evaluation
    quick: tuple[Group, ...]
    default: tuple[Group, ...] = ()
    full: dict[Literal["seed"], tuple[int, ...]] = dataclasses.field(default_factory=dict)
    overrides: tuple[Override, ...] = ()
    scored: bool = True
    scratch: bool = False
    stored_as: tuple[str, ...] = ()


@settings
class TableFile:
    """One file of configs/tables: cells at the scales smoke and paper, and at open where it has
    them; or `computed` from sizes alone. `beside` names a table whose finished runs are shown in
    this one as well."""

    title: str
    report: str
    smoke: Grid | None = None
    open: Grid | None = None
    paper: Grid | None = None
    computed: Computed | None = None
    beside: str | None = None
