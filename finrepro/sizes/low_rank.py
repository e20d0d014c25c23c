"""The sizes of a low-rank model, by arithmetic alone: which layers become W = B A, at which rank,
and what that saves.

A linear layer of o outputs and i inputs has o i weights; B (o, r) and A (r, i) have r (i + o),
which is fewer from the break-even rank o i / (o + i) downwards (FinGPT-HPC, arXiv 2402.13533). One
rank holds for all targeted layers of a model. It is given, or solved for the parameters that the
whole model shall have; everything else (embeddings, biases, norms) stays as it is, and limits what
a rank can save.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field

from finrepro.settings import Positive, settings

Sizes = Mapping[str, tuple[int, int]]  # name within a block -> (in, out)

FUSED = "attn.c_attn"  # GPT-2's query, key and value in one layer
TOLERANCE = 0.005  # how far a solved rank may leave the model from its goal, as a share of it


@settings
class LowRank:
    """How an entry of models.yaml differs from the dense model of its architecture. Exactly one of
    the first three is given.

    `targets` are last parts of the dense layers' names ("c_fc"; "mlp.c_proj" where the last name
    alone says too little). With `split_qkv` GPT-2's fused c_attn becomes three pairs, one each for
    query, key and value; else one pair, whose A they share. `rescale` gives B A the Frobenius norm
    of the weight that it stands for. The decomposition is exact without `svd_niter`, else a
    randomised one.
    """

    rank: Positive | None = None
    # Of all parameters, against the dense model.
    compression: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    # Of the whole model; `parameters` is taken: the entry's own count.
    total_parameters: Positive | None = None
    targets: Literal["all-linear"] | tuple[str, ...]
    split_qkv: bool
    multiple_of: Positive
    rescale: bool
    svd_niter: Positive | None
    # The entry whose trained weights are decomposed; without it the factors are drawn or read.
    of: str | None = None

    def __post_init__(self) -> None:
        """Raises `ValueError` unless exactly one thing decides the rank, and `multiple_of`
        divides a given one.
        """
        settings_given = [
            key
            for key in ("rank", "compression", "total_parameters")
            if getattr(self, key) is not None
        ]
        if len(settings_given) != 1:
            got = " and ".join(settings_given) or "none"
            raise ValueError(
                f"give exactly one of rank, compression and total_parameters (got {got})"
            )
        if self.rank is not None and self.rank % self.multiple_of:
            raise ValueError(f"rank {self.rank} is no multiple of {self.multiple_of}")


def not_exported(quantizer: str) -> dict[str, str]:
    """Export format -> why a low-rank model whose factors are stored by this kind of quantizer
    does not go into it.
    """
    unknown = (
        "no library builds its low-rank layers: "
        "only the dense model that computes the same can be exported"
    )
    quantized = f"its base is factors stored by {quantizer}, and {unknown}"
    return {"peft": unknown} | ({} if quantizer == "none" else {"base": quantized})


def is_target(name: str, targets: str | tuple[str, ...]) -> bool:
    """Whether a layer's name ends in one of `targets`, whole parts of it; every one does for
    `all-linear`.
    """
    return targets == "all-linear" or any(f".{name}".endswith(f".{target}") for target in targets)


def pairs(low_rank: LowRank, dense: Sizes) -> dict[str, tuple[int, int]]:
    """Name of a factor pair -> (in, out), for the dense layers that are targeted: a pair a layer,
    three for a split c_attn.

    Raises `ValueError` for a target that no layer bears, and for `split_qkv` where there is nothing
    to split.
    """
    names = ", ".join(sorted({name.rpartition(".")[2] for name in dense}))
    for target in () if low_rank.targets == "all-linear" else low_rank.targets:
        if not any(is_target(name, (target,)) for name in dense):
            raise ValueError(
                f"low_rank.targets: no linear layer is named {target}; there are {names}"
            )
    layers = {name: size for name, size in dense.items() if is_target(name, low_rank.targets)}
    if not layers:
        raise ValueError(f"low_rank.targets: names no layer; there are {names}")
    if not low_rank.split_qkv:
        return layers
    if FUSED not in layers:
        raise ValueError(
            f"low_rank.split_qkv: there is no fused {FUSED} among the targets: say false"
        )
    split: dict[str, tuple[int, int]] = {}
    for name, (inputs, outputs) in layers.items():
        split |= (
            {f"{name}.{letter}": (inputs, outputs // 3) for letter in "qkv"}
            if name == FUSED
            else {name: (inputs, outputs)}
        )
    return split


def factor_sizes(low_rank: LowRank, dense: Sizes, rank: int) -> dict[str, tuple[int, int]]:
    """Name within a block -> (in, out) of every linear layer of the low-rank model, in the dense
    model's order.

    `<layer>.a` is (in, r) and `<layer>.b` (r, out); a split layer has `<layer>.q.a` and so on;
    layers that are not targeted stay.
    """
    factors: dict[str, tuple[int, int]] = {}
    split = pairs(low_rank, dense)
    for name, size in dense.items():
        layer_pairs = {
            pair: shape
            for pair, shape in split.items()
            if pair == name or pair.startswith(f"{name}.")
        }
        factors |= {} if layer_pairs else {name: size}
        for pair, (inputs, outputs) in layer_pairs.items():
            factors |= {f"{pair}.a": (inputs, rank), f"{pair}.b": (rank, outputs)}
    return factors


def break_even(inputs: int, outputs: int) -> float:
    """The rank from which on two factors have no fewer weights than the layer."""
    return inputs * outputs / (inputs + outputs)


def solve(low_rank: LowRank, dense: Sizes, blocks: int, other_parameters: int) -> int:
    """The rank of a model of so many `blocks` of these linear layers and `other_parameters`, which
    no rank changes.

    Raises `ValueError` in one line when the rank saves nothing in some layer, or no rank reaches
    the goal within half a percent.
    """
    split = pairs(low_rank, dense)
    total = other_parameters + blocks * sum(inputs * outputs for inputs, outputs in dense.values())
    not_factored = total - blocks * sum(inputs * outputs for inputs, outputs in split.values())
    of_a_rank = blocks * sum(inputs + outputs for inputs, outputs in split.values())
    if low_rank.rank is not None:
        return _saving(low_rank.rank, split)
    goal = low_rank.total_parameters or total / (low_rank.compression or 1.0)
    goal_text = (
        f"compression {low_rank.compression:g}"
        if low_rank.compression
        else f"{low_rank.total_parameters:,} parameters"
    )
    if goal >= total:
        raise ValueError(f"low_rank: {goal_text}: the dense model has {total:,} already")
    if goal <= not_factored:
        raise ValueError(
            f"low_rank: no rank gives {goal_text}: {not_factored:,} of {total:,} parameters are "
            "not factored (embeddings, biases, norms, other layers), which caps the compression "
            f"at {total / not_factored:.2f}"
        )
    step, exact = low_rank.multiple_of, (goal - not_factored) / of_a_rank
    near = sorted(
        {max(step, math.floor(exact / step) * step), max(step, math.ceil(exact / step) * step)}
    )
    sizes = {rank: not_factored + rank * of_a_rank for rank in near}
    best = min(sizes, key=lambda rank: abs(sizes[rank] / goal - 1))
    if abs(sizes[best] / goal - 1) > TOLERANCE:
        gives = " and ".join(
            f"rank {rank} gives {total / size:.3g} ({size:,})" for rank, size in sizes.items()
        )
        of = f" that is a multiple of {step}" if step > 1 else ""
        raise ValueError(f"low_rank: no rank{of} gives {goal_text} within {TOLERANCE:.1%}: {gives}")
    return _saving(best, split)


def _saving(rank: int, split: Sizes) -> int:
    """The rank, if it saves weights in every layer. Raises `ValueError` that names the first layer
    where it does not, and its break-even rank.
    """
    for name, (inputs, outputs) in split.items():
        if rank * (inputs + outputs) >= inputs * outputs:
            even = break_even(inputs, outputs)
            raise ValueError(
                f"low_rank: rank {rank} saves nothing in {name} ({inputs} in, {outputs} out): "
                f"its break-even rank is {even:g}"
            )
    return rank
