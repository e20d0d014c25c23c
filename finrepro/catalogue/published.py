"""Values that others published: typed, each with what it was measured on, and whether a cell of
ours measures the same thing.

A file of configs/published holds one source: its metrics, known defects, test sets and systems
(model and method), and the values, each typed once. Three levels of comparability, decided from
facts alone:

- `comparable`: the same quantity, measured the same way as far as the source says;
- `with reservations`: the same quantity (model, test set, labels, metric), but its recipe or the
  way answers are read differs, or it has a known defect. A verdict is given, and the reasons stand
  beside it;
- `not comparable`: another quantity. No verdict.
"""

from typing import Any, Literal

from finrepro.errors import UsageError, unknown
from finrepro.settings import Count, Positive, PositiveFloat, build, settings

Level = Literal["comparable", "with reservations", "not comparable"]
LEVELS: tuple[Level, ...] = ("comparable", "with reservations", "not comparable")
VARIANTS = ("_chat", "_instruct")


@settings
class Metric:
    """A metric there: the name of ours that is the same quantity, or None. `beside` is then the
    one that it would be taken for.
    """

    ours: str | None
    says: str
    beside: str | None = None


@settings
class TestSet:
    """What was asked there: the task here that asks the same, the number of rows, and `differs`,
    why it is not the same after all.
    """

    __test__ = False  # for pytest: not a test, whatever its name

    task: str | None
    n: Positive | None
    prompt: str | None
    says: str = ""
    differs: str | None = None
    batch: Count | None = None
    defects: tuple[str, ...] = ()


@settings
class System:
    """What was scored there, exactly (`variant`, `method`, `recipe`), and the catalogue's names
    for it where one fits.
    """

    variant: str
    method: str
    model: str
    adapter: str | None
    quantizer: str | None
    one_of: tuple[
        str, ...
    ] = ()  # where `quantizer` is None because its sources disagree: what they say
    scored_with: str | None = (
        # the quantizer under the adapter when it was scored, where another one than in training
        None
    )
    folder: str | None = (
        # the adapter itself, as its authors published it: a cell of --adapter with this folder's
        # name
        None
    )
    source: str | None = None
    recipe: str | None = None
    trained_on: str | None = None
    train_on: str | None = None
    train_on_differs: str | None = None  # why the mix of that name is not the same data after all
    defects: tuple[str, ...] = ()

    @property
    def quantizers(self) -> tuple[str, ...]:
        """What it may have been trained with; empty: nothing is known."""
        return (self.quantizer,) if self.quantizer else self.one_of


@settings
class Margin:
    """How far from a published value counts as equal, in 95 % sampling half-widths of it."""

    half_widths: PositiveFloat


@settings
class Published:
    """One number. `defects` are sentences; `metric` is as named there, `measure.ours` as here."""

    name: str  # file.system.test_set.metric
    source: str
    system: System
    test_set: TestSet
    metric: str
    measure: Metric
    value: float
    margin: Margin | None
    defects: tuple[str, ...]


@settings
class SourceFile:
    """One file of configs/published. The defects named by `everywhere` hold for each of its
    values.
    """

    source: str
    margin: Margin | None
    metrics: dict[str, Metric]
    defects: dict[str, str]
    everywhere: tuple[str, ...] = ()
    test_sets: dict[str, TestSet]
    systems: dict[str, System]
    values: dict[str, dict[str, dict[str, PositiveFloat]]]


def read(entries: dict[str, Any], where: str) -> tuple[Published, ...]:
    """The values of one file, in its order. Raises `UsageError` for a name that the file does
    not define, or one that nothing uses.
    """
    file = build(SourceFile, entries, where)
    used: set[str] = set()
    found = []
    for system_name, sets in file.values.items():
        system = _named(file.systems, system_name, "system", where)
        for set_name, numbers in sets.items():
            test_set = _named(file.test_sets, set_name, "test set", where)
            for metric, value in numbers.items():
                measure = _named(file.metrics, metric, "metric", where)
                ids = dict.fromkeys((*system.defects, *test_set.defects, *file.everywhere))
                used |= {system_name, set_name, metric, *ids}
                found.append(
                    Published(
                        name=f"{where.removeprefix('published.')}.{system_name}.{set_name}.{metric}",
                        source=system.source or file.source,
                        system=system,
                        test_set=test_set,
                        metric=metric,
                        measure=measure,
                        value=value,
                        margin=file.margin,
                        defects=tuple(_named(file.defects, each, "defect", where) for each in ids),
                    )
                )
    for kind in ("metrics", "defects", "test_sets", "systems"):
        for name in getattr(file, kind):
            if name not in used:
                raise UsageError(f"{where}.{kind}.{name}: no value uses it.")
    return tuple(found)


def _named(entries: dict[str, Any], name: str, what: str, where: str) -> Any:
    if name not in entries:
        raise UsageError(f"{where}: {unknown(what, name, entries)}")
    return entries[name]
