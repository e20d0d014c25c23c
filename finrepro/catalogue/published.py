"""Values that others published, typed, each with what it was measured on.

A file of configs/published holds one source: its metrics, known defects, test sets and systems
(model and method), and the values, each typed once; and the claims that it makes without a table.
Three levels of comparability, decided from facts alone:

- `comparable`: the same quantity, measured the same way as far as the source says;
- `with reservations`: the same quantity (model, test set, labels, metric), but its recipe or the
  way answers are read differs, or it has a known defect. A verdict is given, and the reasons stand
  beside it;
- `not comparable`: another quantity. No verdict.
"""

from dataclasses import field, replace
from typing import Any, Literal

from finrepro.errors import UsageError, unknown
from finrepro.settings import Count, Positive, PositiveFloat, build, settings

Level = Literal["comparable", "with reservations", "not comparable"]
LEVELS: tuple[Level, ...] = ("comparable", "with reservations", "not comparable")
VARIANTS = ("_chat", "_instruct")


@settings
class Metric:
    """A metric of the source: our metric that is the same quantity, or None. `beside` is then the
    one that a reader would take it for.
    """

    ours: str | None
    says: str
    beside: str | None = None


@settings
class TestSet:
    """A test set of the source: our task that is the same, the number of rows, and `differs`, why
    it is another one after all.
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
    """A model and method of the source (`variant`, `method`, `recipe`), and the catalogue's names
    for them where one fits.
    """

    variant: str
    method: str
    model: str
    adapter: str | None
    quantizer: str | None
    # Where `quantizer` is None because the sources disagree: the quantizers that they name.
    one_of: tuple[str, ...] = ()
    # The quantizer under the adapter when it was scored, where another one than in training.
    scored_with: str | None = None
    # The adapter's own folder, as its authors published it: a cell of --adapter with this name.
    folder: str | None = None
    source: str | None = None
    recipe: str | None = None
    trained_on: str | None = None
    train_on: str | None = None
    train_on_differs: str | None = None  # why the mix of that name is not the same data after all
    defects: tuple[str, ...] = ()

    @property
    def quantizers(self) -> tuple[str, ...]:
        """The quantizers that it may have been trained with; empty: not known."""
        return (self.quantizer,) if self.quantizer else self.one_of


@settings
class Margin:
    """How far from a published value counts as equal, in 95 % sampling half-widths of it."""

    half_widths: PositiveFloat


@settings
class Published:
    """One number. `defects` are sentences; `metric` is named as there, `measure.ours` as here."""

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
class Claim:
    """A number that a source states without a table. `hypothesis` is our paper's name for it,
    `model` the catalogue's entry that it is about, where that is known.
    """

    value: PositiveFloat
    says: str
    source: str = ""  # the file's
    hypothesis: str | None = None
    model: str | None = None


@settings
class SourceFile:
    """One file of configs/published. The defects of `everywhere` hold for each of its values."""

    source: str
    margin: Margin | None
    metrics: dict[str, Metric] = field(default_factory=dict)
    defects: dict[str, str] = field(default_factory=dict)
    everywhere: tuple[str, ...] = ()
    test_sets: dict[str, TestSet] = field(default_factory=dict)
    systems: dict[str, System] = field(default_factory=dict)
    values: dict[str, dict[str, dict[str, PositiveFloat]]] = field(default_factory=dict)
    claims: dict[str, Claim] = field(default_factory=dict)


def read(entries: dict[str, Any], where: str) -> tuple[Published, ...]:
    """The values of one file, in its order. Raises `UsageError` for a name that the file does
    not define, or one that nothing uses.
    """
    file = build(SourceFile, entries, where)
    used: set[str] = set()
    values = []
    for system_name, sets in file.values.items():
        system = _defined(file.systems, system_name, "system", where)
        for set_name, numbers in sets.items():
            test_set = _defined(file.test_sets, set_name, "test set", where)
            for metric, value in numbers.items():
                measure = _defined(file.metrics, metric, "metric", where)
                ids = dict.fromkeys((*system.defects, *test_set.defects, *file.everywhere))
                used |= {system_name, set_name, metric, *ids}
                values.append(
                    Published(
                        name=f"{where.removeprefix('published.')}.{system_name}.{set_name}.{metric}",
                        source=system.source or file.source,
                        system=system,
                        test_set=test_set,
                        metric=metric,
                        measure=measure,
                        value=value,
                        margin=file.margin,
                        defects=tuple(_defined(file.defects, key, "defect", where) for key in ids),
                    )
                )
    for kind in ("metrics", "defects", "test_sets", "systems"):
        for name in getattr(file, kind):
            if name not in used:
                raise UsageError(f"{where}.{kind}.{name}: no value uses it.")
    return tuple(values)


def read_claims(entries: dict[str, Any], where: str) -> dict[str, Claim]:
    """The claims of one file by name, each with the file's source."""
    file = build(SourceFile, entries, where)
    return {name: replace(claim, source=file.source) for name, claim in file.claims.items()}


def _defined(definitions: dict[str, Any], name: str, kind: str, where: str) -> Any:
    """What the file defines under a name."""
    if name not in definitions:
        raise UsageError(f"{where}: {unknown(kind, name, definitions)}")
    return definitions[name]
