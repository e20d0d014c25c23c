"""How far training is: what its loop counts, what a checkpoint carries along, and what it leaves
behind beside the weights.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Trained:
    """The loss of every step, seconds of training over all attempts, and tokens that went through
    the model: prompt and answer, those of them that the loss counts, and with padding.
    """

    losses: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    tokens: int = 0
    supervised_tokens: int = 0
    computed_tokens: int = 0
    # A proof a process (finrepro.training.compilation).
    compilation: list[dict[str, Any]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)  # what whoever reads the result has to know
