"""Published values that stand beside our own."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from finrepro.catalogue.published import LEVELS, Published
from finrepro.reporting.cell_result import CellResult
from finrepro.reporting.comparability import Comparison, candidates, comparability
from finrepro.statistics.equivalence import Estimate, half_width, judge

# Metrics that are a share of the test rows: only these have a binomial's sampling half-width.
SHARES = ("accuracy",)


class Beside:
    """The published values beside the lines of one table. Values and reasons are numbered, and each
    is printed once, below the table.
    """

    def __init__(self, published: Sequence[Published]) -> None:
        self.published = published
        self.notes: dict[str, int] = {}
        self.reasons: dict[str, str] = {}  # reason -> r1, r2, ...
        # Reason -> values that are not comparable and are in the JSON alone.
        self.json_only: dict[str, dict[str, None]] = {}

    def find(
        self, row: CellResult, task: str | None, metrics: Sequence[str], n: int | None = None
    ) -> list[tuple[Published, Comparison]]:
        """The published candidates for a cell, the most comparable first, then in the order of
        `metrics`. `n`: test examples of its score.
        """
        pairs = [
            (value, comparability(value, row, n))
            for value in candidates(self.published, row, task, metrics)
        ]
        rank = {metric: position for position, metric in enumerate(metrics)}
        return sorted(
            pairs,
            key=lambda pair: (
                LEVELS.index(pair[1].level),
                rank.get(pair[0].measure.ours or "", len(metrics)),
            ),
        )

    def texts(
        self, pairs: Sequence[tuple[Published, Comparison]], ours: dict[str, Estimate]
    ) -> tuple[str, str]:
        """The texts of the columns Published and Verdict, for the most comparable value."""
        if not pairs:
            return "", ""
        value, comparison = pairs[0]
        self._gather(comparison.reasons, pairs[1:])
        number = self._number(value, comparison)
        mark = f" [{number}]" if number else ""
        text = f"{value.metric} {value.value:g}, {value.name.split('.')[0]}{mark}"
        if comparison.level == "not comparable":
            return text, "not comparable"
        margin = margin_of(value)
        if margin is None:
            return text, "no margin is known"
        judgement = judge(ours.get(str(value.measure.ours)), value.value, margin)
        reserve = " with reservations" if comparison.level == "with reservations" else ""
        return text, f"{judgement.verdict}{reserve}: {judgement.text}"

    def _gather(
        self, printed: Sequence[str], hidden: Sequence[tuple[Published, Comparison]]
    ) -> None:
        """Note why the values that are not in the column are not comparable, but for reasons that
        are printed with the one that is.
        """
        for value, comparison in hidden:
            if comparison.level == "not comparable":
                for reason in comparison.reasons:
                    if reason not in printed:
                        self.json_only.setdefault(reason, {})[value.name] = None

    def _number(self, value: Published, comparison: Comparison) -> int | None:
        if not comparison.reasons:
            return None
        test = f" on {value.test_set.n:,} rows" if value.test_set.n else ""
        system = f"{value.source}: {value.system.variant}, {value.system.method}{test}"
        text = f"{system} - {comparison.level}: {', '.join(map(self._key, comparison.reasons))}."
        return self.notes.setdefault(text, len(self.notes) + 1)

    def _key(self, reason: str) -> str:
        return self.reasons.setdefault(reason, f"r{len(self.reasons) + 1}")

    def below(self) -> list[str]:
        """The notes below the table: numbered values, values in the JSON alone, reasons."""
        texts = [f"[{number}] {text}" for text, number in self.notes.items()]
        for reason, names in self.json_only.items():
            values = next(iter(names)) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            texts.append(
                f"Published, in the JSON only: {values} - not comparable: {self._key(reason)}."
            )
        return texts + [f"{key}: {reason}." for reason, key in self.reasons.items()]


def margin_of(value: Published) -> float | None:
    """How far from the value counts as equal, in its unit; None where its spread is unknown: an
    F1 is no share of rows, and its spread no binomial's.
    """
    if value.margin is None or value.test_set.n is None or value.measure.ours not in SHARES:
        return None
    return value.margin.half_widths * half_width(value.value, value.test_set.n)


def published_evidence(pairs: Sequence[tuple[Published, Comparison]]) -> dict[str, Any]:
    """For the JSON: every candidate, with its comparison and margin."""
    return {
        "published": [
            asdict(value) | asdict(comparison) | {"margin": margin_of(value)}
            for value, comparison in pairs
        ]
    }
