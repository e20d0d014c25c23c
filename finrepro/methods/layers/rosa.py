"""A linear layer under ROSA (Hameed et al., 2024, arXiv 2407.07802): y = W_f x + B A x, where A and
B are R singular directions of W.

    W = U S V^T,    A (R, in) and B (out, R) with B A = U_J S_J V_J^T,    W_f = W - B A

The paper's A is B here, and its B is A, as in LoRA. After a period of training B A is added to W_f,
the sum is factored anew, and another J is drawn: each period is its own update of rank 2R at most,
[B', -B] [A'; A] with A', B' the trained factors, and the rank of their sum grows with the periods.

W_f is accumulated in float32, since every period adds to it twice: in the layer's own weight where
that is float32, else in a copy in the host's memory from which the weight is rounded each time.
Accumulated in bfloat16, its norm would lose 1.7e-3 a period.
"""

import hashlib
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.functional import linear

from finrepro.methods.layers.linear import features, is_conv1d

Selection = Literal["random", "top", "bottom"]
Gauge = Literal["sqrt", "code"]


class Factors(NamedTuple):
    """A low-rank matrix B A; float32."""

    a: Float[Tensor, "r d_in"]
    b: Float[Tensor, "d_out r"]

    def on(self, device: torch.device | str) -> "Factors":
        """The same on a device."""
        return Factors(self.a.to(device), self.b.to(device))

    def copy(self) -> "Factors":
        """A copy in the host's memory."""
        return Factors(*(factor.detach().to("cpu", copy=True) for factor in self))


class Period(NamedTuple):
    """A finished period: the factors before training and after it."""

    start: Factors
    end: Factors


class NextPeriod(NamedTuple):
    """What a new period begins with."""

    frozen: Float[Tensor, "d_out d_in"]  # W_f in float32
    start: Factors


def directions(
    selection: Selection, count: int, r: int, seed: int, period: int, name: str
) -> Int[Tensor, " r"]:
    """J: `r` of the `count` singular directions, ascending; 0 is the largest.

    `random` is a uniform subset without replacement, from a generator seeded by the seed, the
    period and the layer's name alone.
    """
    if selection == "top":
        return torch.arange(r)
    if selection == "bottom":
        return torch.arange(count - r, count)
    digest = hashlib.sha256(f"{seed} {period} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(count, generator=generator)[:r].sort().values


def factors(
    weight: Float[Tensor, "d_out d_in"], indices: Int[Tensor, " r"], gauge: Gauge
) -> Factors:
    """B A = U_J S_J V_J^T of a float32 weight, on its device; `indices` is J.

    Gauge `sqrt` (the paper's): B = U_J S_J^1/2, A = S_J^1/2 V_J^T; `code` (its authors' code): B =
    U_J, A = S_J V_J^T, since that decomposes the transpose, (in, out), and gives S to the factor
    that the input meets first. The product is the same, its gradients are not. A singular vector
    has no sign of its own: the largest entry of each column of U is made positive.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    indices = indices.to(weight.device)
    u, s, vh = u[:, indices], s[indices], vh[indices]
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    u, vh = u * sign, vh * sign.T
    if gauge == "code":
        return Factors((s[:, None] * vh).contiguous(), u.contiguous())
    return Factors((s.sqrt()[:, None] * vh).contiguous(), (u * s.sqrt()).contiguous())


class RosaLinear(nn.Module):
    """Wraps a linear layer whose weight is dense; A and B and their arithmetic are float32, and
    zero until the first period begins.

    `name` is the layer's in the model: with `seed` it decides the directions. `history` holds the
    finished periods, `start` the factors with which the present one began, both in the host's
    memory.
    """

    def __init__(
        self, base_layer: Any, name: str, r: int, selection: Selection, gauge: Gauge, seed: int
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name, self.r, self.selection, self.gauge, self.seed = name, r, selection, gauge, seed
        d_in, d_out = features(base_layer)
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.zeros(r, d_in, dtype=torch.float32, device=device))
        self.lora_B = nn.Parameter(torch.zeros(d_out, r, dtype=torch.float32, device=device))
        # Not buffers: engines would send those to every rank, and they are on the host.
        self.history: list[Period] = []
        self.start: Factors | None = None
        # W_f in float32 on the host, where the weight is rounded from it; only on the rank that
        # factors it
        self.exact: Tensor | None = None

    def forward(self, x: Float[Tensor, "*batch d_in"]) -> Float[Tensor, "*batch d_out"]:
        """In the input's dtype, rounded once."""
        base = self.base_layer(x)
        wide = x.to(self.lora_A.dtype)
        return (base + linear(linear(wide, self.lora_A), self.lora_B)).to(x.dtype)

    def frozen(self, weight: Tensor) -> Float[Tensor, "d_out d_in"]:
        """W_f in float32, from the layer's whole weight as it stores it; before the first period
        W.
        """
        if self.exact is not None:
            return self.exact.to(weight.device)
        return (weight.T if is_conv1d(self.base_layer) else weight).float().contiguous()

    def as_stored(self, period: NextPeriod, dtype: torch.dtype) -> tuple[Tensor, Factors]:
        """W_f as the layer stores it, rounded to `dtype` at most once, and the factors. Where it
        is rounded, the float32 sum stays on the host in `exact`.
        """
        self.exact = None if dtype == torch.float32 else period.frozen.cpu()
        frozen = period.frozen.T if is_conv1d(self.base_layer) else period.frozen
        return frozen.to(dtype).contiguous(), period.start

    def empty_like(self, weight: Tensor) -> tuple[Tensor, Factors]:
        """Uninitialised tensors of the shapes of `as_stored`, to receive another rank's."""
        d_in, d_out = features(self.base_layer)
        shape = (d_in, d_out) if is_conv1d(self.base_layer) else (d_out, d_in)
        start = (
            torch.empty(size, device=weight.device) for size in ((self.r, d_in), (d_out, self.r))
        )
        return torch.empty(shape, dtype=weight.dtype, device=weight.device), Factors(*start)

    def next_period(
        self, frozen: Float[Tensor, "d_out d_in"], trained: Factors | None
    ) -> NextPeriod:
        """The next period: `trained` merged into W_f, and new directions subtracted. Without
        `trained` it is the first.
        """
        merged = frozen if trained is None else torch.addmm(frozen, trained.b, trained.a)
        period = len(self.history) + (trained is not None)
        count = min(merged.shape)
        indices = directions(self.selection, count, self.r, self.seed, period, self.name)
        return subtract(merged, factors(merged, indices, self.gauge))

    def replay(self, first: Float[Tensor, "d_out d_in"], computed: Factors) -> NextPeriod:
        """W_f after the periods of `history`, by the same sums in the same order; `first` is the
        weight from which `computed`, this process's own first factors, were subtracted.

        Bitwise the same where `computed` equals the recorded first factors. Another machine's SVD
        may round differently: there `computed` is added back and the recorded ones are subtracted,
        and W_f is the same up to rounding.
        """
        assert self.start is not None
        recorded = (*(period.start for period in self.history), self.start)
        starts = [start.on(first.device) for start in recorded]
        computed = computed.on(first.device)
        present = NextPeriod(first, starts[0])
        if not all(torch.equal(*pair) for pair in zip(computed, starts[0], strict=True)):
            present = subtract(torch.addmm(first, computed.b, computed.a), starts[0])
        for period, start in zip(self.history, starts[1:], strict=True):
            end = period.end.on(first.device)
            present = subtract(torch.addmm(present.frozen, end.b, end.a), start)
        return present

    def as_lora(self) -> Factors:
        """The sum of all periods' updates, as one LoRA of scale 1 and rank 2R a period on the
        original weight; on the host.
        """
        assert self.start is not None
        periods = [*self.history, Period(self.start, Factors(self.lora_A, self.lora_B).copy())]
        return Factors(
            torch.cat([a for start, end in periods for a in (end.a, start.a)]),
            torch.cat([b for start, end in periods for b in (end.b, -start.b)], dim=1),
        )


def subtract(weight: Float[Tensor, "d_out d_in"], start: Factors) -> NextPeriod:
    """W - B A, and the factors. The difference is more exact than the sum over the remaining
    directions.
    """
    return NextPeriod(torch.addmm(weight, start.b, start.a, alpha=-1), start)
