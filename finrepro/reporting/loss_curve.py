"""The training loss of a run by tokens and by time. In pretraining each text is seen once, so that
it is a loss on unseen text.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from statistics import mean
from typing import Any

WINDOW = 10  # steps of the moving mean: the loss of one step depends on its texts


@dataclass(frozen=True)
class LossCurve:
    """A run's smoothed training loss: after `seconds[i]` and `tokens[i]` it was `losses[i]`."""

    seconds: tuple[float, ...]
    tokens: tuple[float, ...]
    losses: tuple[float, ...]

    def at(self, seconds: float) -> float | None:
        """The loss at a time, interpolated linearly between steps; None before the first value
        and after the last.
        """
        if not self.seconds or not self.seconds[0] <= seconds <= self.seconds[-1]:
            return None
        after = next(i for i, second in enumerate(self.seconds) if second >= seconds)
        if self.seconds[after] == seconds or after == 0:
            return self.losses[after]
        begin, end = self.seconds[after - 1], self.seconds[after]
        share = (seconds - begin) / (end - begin)
        return self.losses[after - 1] + share * (self.losses[after] - self.losses[after - 1])


def loss_curve(steps: Sequence[Mapping[str, Any]], tokens: int) -> LossCurve:
    """The curve of a run's steps in loss.jsonl; `tokens` is their total, equal in every step to a
    few tokens.

    A value is the mean of the `WINDOW` steps that end there.
    """
    losses = [step["loss"] for step in steps]
    ends = range(WINDOW, len(steps) + 1)
    tokens_seen = [0.0, *accumulate(tokens / len(steps) for _ in steps)] if steps else []
    return LossCurve(
        tuple(steps[end - 1]["seconds"] for end in ends),
        tuple(tokens_seen[end] for end in ends),
        tuple(mean(losses[end - WINDOW : end]) for end in ends),
    )
