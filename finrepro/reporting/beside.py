"""Published values that stand beside our own."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from finrepro.catalogue.published import LEVELS, Published
from finrepro.reporting.comparability import Comparison, candidates, comparability
from finrepro.reporting.grouping import SHARES, Row
from finrepro.statistics.equivalence import Estimate, half_width, judge


class Beside:
    """The published value beside a line. Values are numbered, and so are the reasons they share:
    each stands once below the table.
    """

    def __init__(self, published: Sequence[Published]) -> None:
        self.published = published
        self.notes: dict[str, int] = {}
        self.reasons: dict[str, str] = {}  # reason -> r1, r2, ...
        self.unseen: dict[
            str, dict[str, None]
        ] = {}  # reason -> not comparable values that stand in the JSON alone

    def find(
        self, row: Row, task: str | None, metrics: Sequence[str], n: int | None = None
    ) -> list[tuple[Published, Comparison]]:
        """Every value that a reader would look for here, the most comparable first, then in the
        order of `metrics`.
        """
        pairs = [
            (each, comparability(each, row, n))
            for each in candidates(self.published, row, task, metrics)
        ]
        rank = {metric: place for place, metric in enumerate(metrics)}
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
        """The texts of the columns Published and Verdict: of the most comparable value."""
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

    def _gather(self, known: Sequence[str], others: Sequence[tuple[Published, Comparison]]) -> None:
        """Keep why the values that are not shown are not comparable, for what the shown one does
        not say already.
        """
        for value, comparison in others:
            if comparison.level == "not comparable":
                for reason in comparison.reasons:
                    if reason not in known:
                        self.unseen.setdefault(reason, {})[value.name] = None

    def _number(self, value: Published, comparison: Comparison) -> int | None:
        if not comparison.reasons:
            return None
        test = f" on {value.test_set.n:,} rows" if value.test_set.n else ""
        said = f"{value.source}: {value.system.variant}, {value.system.method}{test}"
        text = f"{said} - {comparison.level}: {', '.join(map(self._key, comparison.reasons))}."
        return self.notes.setdefault(text, len(self.notes) + 1)

    def _key(self, reason: str) -> str:
        return self.reasons.setdefault(reason, f"r{len(self.reasons) + 1}")

    def below(self) -> list[str]:
        """The numbered values, then what stands in the JSON alone, then the reasons."""
        texts = [f"[{number}] {text}" for text, number in self.notes.items()]
        for reason, names in self.unseen.items():
            named = next(iter(names)) + (f" and {len(names) - 1} more" if len(names) > 1 else "")
            texts.append(
                f"Published, in the JSON only: {named} - not comparable: {self._key(reason)}."
            )
        return texts + [f"{key}: {reason}." for reason, key in self.reasons.items()]


def margin_of(value: Published) -> float | None:
    """How far from it counts as equal, or None where its spread is unknown. An F1 is no share of
    rows: its spread is no binomial's.
    """
    if value.margin is None or value.test_set.n is None or value.measure.ours not in SHARES:
        return None
    return value.margin.half_widths * half_width(value.value, value.test_set.n)


def published_evidence(pairs: Sequence[tuple[Published, Comparison]]) -> dict[str, Any]:
    """For the JSON: every value that was considered, with what was found about it."""
    return {
        "published": [
            asdict(value) | asdict(comparison) | {"margin": margin_of(value)}
            for value, comparison in pairs
        ]
    }
