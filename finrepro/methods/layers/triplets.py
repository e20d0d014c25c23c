"""The arithmetic of AdaLoRA (Zhang et al., 2023, arXiv 2303.10512) on the factors P Lambda Q of its
updates.

Triplet k of a layer is column k of P (out, r), Lambda's k-th entry and row k of Q (r, in). PEFT
calls P lora_B, Lambda lora_E (r, 1) and Q lora_A.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor


def from_orthogonal(p: Float[Tensor, "out r"], q: Float[Tensor, "r in"]) -> Float[Tensor, ""]:
    """||P^T P - I|| + ||Q Q^T - I||, Frobenius norms, not squared as in equation 4 (both codes
    leave out the square).
    """
    unit = torch.eye(p.shape[1], dtype=p.dtype, device=p.device)
    return torch.linalg.matrix_norm(p.T @ p - unit) + torch.linalg.matrix_norm(q @ q.T - unit)


@dataclass
class Allocation:
    """AdaLoRA's state between steps.

    `averages`: parameter name -> smoothed importance and its smoothed uncertainty (equations 9 and
    10), of the parameter's shape, float32. `masks`: layer -> which of its triplets survived the
    last allocation. `measured` and `allocated` count steps: a loop that forgets one of a step's two
    calls fails at the next.
    """

    averages: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    masks: dict[str, Bool[Tensor, " r"]] = field(default_factory=dict)
    measured: int = 0
    allocated: int = 0

    def measure(
        self, name: str, value: Tensor, gradient: Tensor, beta1: float, beta2: float
    ) -> None:
        """I = |w grad| (equation 8), smoothed from zero by beta1; |I - average| by beta2."""
        now = (value * gradient).abs()
        mean, uncertainty = self.averages.get(name) or (
            torch.zeros_like(now),
            torch.zeros_like(now),
        )
        mean = beta1 * mean + (1 - beta1) * now
        self.averages[name] = mean, beta2 * uncertainty + (1 - beta2) * (now - mean).abs()

    def scores(self, layer: Mapping[str, str]) -> Float[Tensor, " r"]:
        """Of each triplet of a layer, whose parameters' names are P, E and Q: s(lambda) + mean
        s(P's column) + mean s(Q's row), with s the product of the two averages (equations 7 and
        11)."""
        s = {key: self.averages[name][0] * self.averages[name][1] for key, name in layer.items()}
        return s["E"].flatten() + s["P"].mean(0) + s["Q"].mean(1)

    def allocate(self, layers: Mapping[str, Mapping[str, str]], budget: int) -> None:
        """Keep the `budget` triplets of the highest scores, over all layers; of equal ones the
        earlier layer's, the earlier triplet.
        """
        scores = {name: self.scores(layer).cpu() for name, layer in layers.items()}
        order = torch.cat(list(scores.values())).argsort(descending=True, stable=True)
        survives = torch.zeros(len(order), dtype=torch.bool)
        survives[order[:budget]] = True
        masks = survives.split([len(layer_scores) for layer_scores in scores.values()])
        self.masks = dict(zip(scores, (mask.clone() for mask in masks), strict=True))

    def state(self) -> dict[str, Any]:
        """As tensors, numbers, lists and dictionaries."""
        averages = {name: list(both) for name, both in self.averages.items()}
        return {
            "averages": averages,
            "kept": self.masks,
            "measured": self.measured,
            "allocated": self.allocated,
        }

    def load(self, state: dict[str, Any], devices: Mapping[str, Any]) -> None:
        """Restore what `state` returned; `devices`: parameter name -> the device it is on."""
        self.averages = {
            name: (mean.to(devices[name]), uncertainty.to(devices[name]))
            for name, (mean, uncertainty) in state["averages"].items()
        }
        self.masks = {name: mask.cpu() for name, mask in state["kept"].items()}
        self.measured, self.allocated = state["measured"], state["allocated"]


def mean_distance(pairs: Iterable[tuple[Tensor, Tensor]]) -> Float[Tensor, ""]:
    """`from_orthogonal` of each (P, Q), over the number of matrices."""
    distances = [from_orthogonal(p, q) for p, q in pairs]
    return torch.stack(distances).sum() / (2 * len(distances))
