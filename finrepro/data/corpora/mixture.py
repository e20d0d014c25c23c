"""Several corpora in given proportions, as one set of windows.

Which corpus the p-th window of training comes from depends on p alone. Among the first p windows
each corpus has its share, to within as many windows as there are corpora. A corpus that is used up
begins again in a new order, while the others go on.
"""

from bisect import bisect_right
from collections.abc import Mapping
from fractions import Fraction
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from finrepro.data.corpora.lazy_sequence import LazySequence
from finrepro.data.corpora.windows import Window, Windows
from finrepro.errors import UsageError


class Mixture(LazySequence[Window]):
    """Windows of several corpora: `mixture[index]` runs through them one after the other,
    `rows(step, ...)` mixes them.

    `weights` are relative numbers of windows by name, as {"news": 3, "books": 1.5}. Raises
    `UsageError` unless they are positive and name the corpora, all of them finished.
    """

    def __init__(self, corpora: Mapping[str, Windows], weights: Mapping[str, int | float]) -> None:
        _check(corpora, weights)
        self.names, self.corpora = tuple(corpora), tuple(corpora.values())
        exact = [Fraction(str(weights[name])) for name in self.names]
        # The weight of each corpus together with all that come after it.
        totals = list(accumulate(reversed(exact)))[::-1]
        self._shares = [weight / total for weight, total in zip(exact, totals, strict=True)]
        self._ends = list(accumulate(len(windows) for windows in self.corpora))
        self.lengths = MixedLengths(self)

    def locate(self, index: int) -> tuple[Windows, int]:
        """The corpus that a window is of, and the window's index there."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        position = index % len(self)
        number = bisect_right(self._ends, position)
        windows = self.corpora[number]
        return windows, position - (self._ends[number] - len(windows))

    def __len__(self) -> int:
        return self._ends[-1]

    def at(self, index: int) -> Window:
        """A window."""
        windows, local = self.locate(index)
        return windows.at(local)

    def drawn(self, position: int) -> tuple[int, int]:
        """(number of a corpus, windows of it that came before) at a position of training's order:
        O(corpora), in exact arithmetic.

        The corpora take positions in turn. Each takes, of the positions that the ones before it
        leave, those at which the integer part of its share of them grows.
        """
        for number, share in enumerate(self._shares[:-1]):
            before = position * share.numerator // share.denominator
            if (position + 1) * share.numerator // share.denominator > before:
                return number, before
            position -= before
        return len(self._shares) - 1, position

    def rows(self, step: int, global_batch_size: int, seed: int) -> list[int]:
        """The windows of optimizer step `step`, as `Windows.rows`."""
        first = step * global_batch_size
        draws = [self.drawn(first + k) for k in range(global_batch_size)]
        indices: list[int] = [0] * global_batch_size
        for number, windows in enumerate(self.corpora):
            slots = [k for k, (corpus, _) in enumerate(draws) if corpus == number]
            positions: NDArray[np.int64] = np.array([draws[k][1] for k in slots], np.int64)
            offset = self._ends[number] - len(windows)
            local_indices = windows.order(positions, seed, number).tolist()
            for k, local in zip(slots, local_indices, strict=True):
                indices[k] = offset + local
        return indices


def _check(corpora: Mapping[str, Windows], weights: Mapping[str, int | float]) -> None:
    if not corpora or corpora.keys() != weights.keys():
        names = ", ".join(corpora) or "none given"
        raise UsageError(f"a mixture needs one weight for each of its corpora: {names}.")
    for name, windows in corpora.items():
        if not getattr(windows.stream, "finished", True):
            raise UsageError(
                f"mixture: the corpus '{name}' is not finished, and its size decides the order: "
                "prepare it first."
            )
    for name, weight in weights.items():
        if not 0 < weight < float("inf"):
            raise UsageError(
                f"mixture: the weight of '{name}' is {weight}, expected a positive number."
            )


class MixedLengths(LazySequence[int]):
    """The lengths of a mixture's windows, without storing them."""

    def __init__(self, mixture: Mixture) -> None:
        self._mixture = mixture

    def __len__(self) -> int:
        return len(self._mixture)

    def at(self, index: int) -> int:
        """The length of a window."""
        windows, local = self._mixture.locate(index)
        return windows.lengths.at(local)
