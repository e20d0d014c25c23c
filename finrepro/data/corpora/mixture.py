"""Several corpora in given proportions, as one set of windows.

Which corpus the p-th window of training comes from depends on p alone: of any first p windows, each
corpus has its share to within as many windows as there are corpora. A corpus that is used up begins
again in a new order, while the others go on.
"""

from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from finrepro.data.corpora.rows import Rows
from finrepro.data.corpora.windows import Window, Windows
from finrepro.errors import UsageError


class Mixture(Rows[Window]):
    """Windows of several corpora: `mixture[row]` runs through them one after the other, `rows(step,
    ...)` mixes them.

    `weights` are relative numbers of windows by name, as {"news": 3, "books": 1.5}. Raises
    `UsageError` unless they are positive, and of the corpora that are there.
    """

    def __init__(self, corpora: Mapping[str, Windows], weights: Mapping[str, int | float]) -> None:
        if not corpora or corpora.keys() != weights.keys():
            raise UsageError(
                f"a mixture needs one weight for each of its corpora: {', '.join(corpora) or 'none given'}."
            )
        for name, windows in corpora.items():
            if not getattr(windows.stream, "finished", True):
                raise UsageError(
                    f"mixture: the corpus '{name}' is not finished, and its size decides the order: prepare it first."
                )
        for name, weight in weights.items():
            if not 0 < weight < float("inf"):
                raise UsageError(
                    f"mixture: the weight of '{name}' is {weight}, expected a positive number."
                )
        self.names, self.parts = tuple(corpora), tuple(corpora.values())
        exact = [Fraction(str(weights[name])) for name in self.names]
        rest = list(accumulate(reversed(exact)))[
            ::-1
        ]  # what is left before each corpus takes its share
        self._shares = [weight / left for weight, left in zip(exact, rest, strict=True)]
        self._ends = list(accumulate(len(part) for part in self.parts))
        self.lengths = MixedLengths(self)

    def place(self, row: int) -> tuple[Windows, int]:
        """The corpus of a row, and the row there."""
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        part = bisect_right(self._ends, row % len(self))
        return self.parts[part], row % len(self) - (self._ends[part] - len(self.parts[part]))

    def __len__(self) -> int:
        return self._ends[-1]

    def at(self, row: int) -> Window:
        """A window."""
        windows, inside = self.place(row)
        return windows.at(inside)

    def drawn(self, position: int) -> tuple[int, int]:
        """(corpus, how many of that corpus came before) at a position of training's order:
        O(corpora), in exact numbers.

        Each corpus in turn takes the positions, among those left over by the ones before it, at
        which its share grows by a whole.
        """
        for part, share in enumerate(self._shares[:-1]):
            before = position * share.numerator // share.denominator
            if (position + 1) * share.numerator // share.denominator > before:
                return part, before
            position -= before
        return len(self._shares) - 1, position

    def rows(self, step: int, global_batch_size: int, seed: int) -> list[int]:
        """The rows of optimizer step `step`, as `Windows.rows`."""
        drawn = [self.drawn(step * global_batch_size + k) for k in range(global_batch_size)]
        found: list[int] = [0] * global_batch_size
        for part, windows in enumerate(self.parts):
            here = [k for k, (which, _) in enumerate(drawn) if which == part]
            places: NDArray[np.int64] = np.array([drawn[k][1] for k in here], np.int64)
            offset = self._ends[part] - len(windows)
            for k, row in zip(here, windows.order(places, seed, part).tolist(), strict=True):
                found[k] = offset + row
        return found


class MixedLengths(Rows[int]):
    """The lengths of a mixture's windows, without storing them."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    def __len__(self) -> int:
        return len(self._mixture)

    def at(self, row: int) -> int:
        """The length of a window."""
        windows, inside = self._mixture.place(row)
        return windows.lengths.at(inside)
