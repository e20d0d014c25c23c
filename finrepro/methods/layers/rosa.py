"""A linear layer under ROSA (Hameed et al., 2024, arXiv 2407.07802): y = W_f x + B A x, where A and
B are R singular directions of W.

    W = U S V^T,    A (R, in) and B (out, R) with B A = U_J S_J V_J^T,    W_f = W - B A

The paper's A is B here, and its B is A, as in LoRA. After a period of training B A is added to W_f,
the sum is factored anew, and another J is drawn: each period is its own update of rank 2R at most,
[B', -B] [A'; A] with A', B' the trained factors, and their sum has a rank that grows with the
periods.

W_f is a sum to which every period adds twice. It is kept in float32: in the layer's own weight
where that is float32, else in a copy in the host's memory of which the weight is a rounding, made
anew each time. Rounded to bfloat16 it would lose 1.7e-3 of its length a period.
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
        return Factors(*(each.detach().to("cpu", copy=True) for each in self))


class Period(NamedTuple):
    """A period that is over: the factors that W gave, and what they were trained to."""

    start: Factors
    end: Factors


class Opened(NamedTuple):
    """What a new period begins with."""

    frozen: Float[Tensor, "d_out d_in"]  # W_f in float32
    start: Factors


def directions(
    selection: Selection, count: int, r: int, seed: int, period: int, name: str
) -> Int[Tensor, " r"]:
    """J: `r` of the `count` singular directions, ascending; 0 is the largest.

    `random` is a uniform subset without replacement, of a generator that nothing but the seed, the
    period and the layer's name decide.
    """
    if selection == "top":
        return torch.arange(r)
    if selection == "bottom":
        return torch.arange(count - r, count)
    digest = hashlib.sha256(f"{seed} {period} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(count, generator=generator)[:r].sort().values


def factors(
    weight: Float[Tensor, "d_out d_in"], chosen: Int[Tensor, " r"], gauge: Gauge
) -> Factors:
    """B A = U_J S_J V_J^T of a float32 weight, on its device.

    Gauge `sqrt` (the paper's): B = U_J S_J^1/2, A = S_J^1/2 V_J^T; `code` (its authors' code): B =
    U_J S_J, A = V_J^T. The product is the same, its gradients are not. A singular vector has no
    sign of its own: the largest entry of each column of U is made positive.
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    chosen = chosen.to(weight.device)
    u, s, vh = u[:, chosen], s[chosen], vh[chosen]
    sign = u.gather(0, u.abs().argmax(0, keepdim=True)).sign()
    u, vh = u * sign, vh * sign.T
    if gauge == "code":
        return Factors(vh.contiguous(), (u * s).contiguous())
    return Factors((s.sqrt()[:, None] * vh).contiguous(), (u * s.sqrt()).contiguous())


class RosaLinear(nn.Module):
    """Wraps a linear layer whose weight is dense; A and B and their arithmetic are float32, and
    zero until a period is opened.

    `name` is the layer's in the model: with `seed` it decides the directions. `history` holds the
    periods that are over, `start` the factors with which the present one began, both in the host's
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
        # W_f in float32 on the host, where the weight is a rounding of it; only on the rank that
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

    def kept(self, opened: "Opened", dtype: torch.dtype) -> tuple[Tensor, Factors]:
        """W_f as the layer stores it, rounded to `dtype` at most once, and the factors. Where it
        is rounded the sum stays on the host.
        """
        self.exact = None if dtype == torch.float32 else opened.frozen.cpu()
        frozen = opened.frozen.T if is_conv1d(self.base_layer) else opened.frozen
        return frozen.to(dtype).contiguous(), opened.start

    def room(self, weight: Tensor) -> tuple[Tensor, Factors]:
        """Tensors for what another rank gives as `kept`."""
        d_in, d_out = features(self.base_layer)
        shape = (d_in, d_out) if is_conv1d(self.base_layer) else (d_out, d_in)
        start = (
            torch.empty(size, device=weight.device) for size in ((self.r, d_in), (d_out, self.r))
        )
        return torch.empty(shape, dtype=weight.dtype, device=weight.device), Factors(*start)

    def opened(self, frozen: Float[Tensor, "d_out d_in"], trained: Factors | None) -> Opened:
        """The next period: `trained` merged into W_f, and new directions taken out. Without
        `trained` it is the first.
        """
        whole = frozen if trained is None else torch.addmm(frozen, trained.b, trained.a)
        period = len(self.history) + (trained is not None)
        chosen = directions(self.selection, min(whole.shape), self.r, self.seed, period, self.name)
        return without(whole, factors(whole, chosen, self.gauge))

    def replayed(self, first: Float[Tensor, "d_out d_in"], made: Factors) -> Opened:
        """W_f after the periods of `history`: of the first, from which `made` was taken out, the
        same sums in the same order.

        The bits are the same where `made` is what the first period began with. Another machine's
        SVD may round otherwise: there what was taken out is put back, and W_f is right up to
        rounding.
        """
        assert self.start is not None
        starts = [
            each.on(first.device)
            for each in (*(period.start for period in self.history), self.start)
        ]
        made = made.on(first.device)
        opened = Opened(first, starts[0])
        if not all(torch.equal(*pair) for pair in zip(made, starts[0], strict=True)):
            opened = without(torch.addmm(first, made.b, made.a), starts[0])
        for period, start in zip(self.history, starts[1:], strict=True):
            end = period.end.on(first.device)
            opened = without(torch.addmm(opened.frozen, end.b, end.a), start)
        return opened

    def as_lora(self) -> Factors:
        """All that was learned, as one LoRA of scale 1 and rank 2R a period on the original
        weight; on the host.
        """
        assert self.start is not None
        periods = [*self.history, Period(self.start, Factors(self.lora_A, self.lora_B).copy())]
        return Factors(
            torch.cat([each for start, end in periods for each in (end.a, start.a)]),
            torch.cat([each for start, end in periods for each in (end.b, -start.b)], dim=1),
        )


def without(whole: Float[Tensor, "d_out d_in"], start: Factors) -> Opened:
    """W - B A and the factors. The difference is more exact than the sum over the other
    directions.
    """
    return Opened(torch.addmm(whole, start.b, start.a, alpha=-1), start)
