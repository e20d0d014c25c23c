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
NEAR = 0.005  # how far from what was asked a solved rank may leave the model, as a share


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
    compression: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = (
        None  # of all parameters, against the dense model
    )
    total_parameters: Positive | None = (
        None  # of the whole model ("parameters" is what an entry says of itself)
    )
    targets: Literal["all-linear"] | tuple[str, ...]
    split_qkv: bool
    multiple_of: Positive
    rescale: bool
    svd_niter: Positive | None
    of: str | None = (
        # the entry whose trained weights are decomposed; without it they are drawn, or factors are
        # read
        None
    )

    def __post_init__(self) -> None:
        """Raises `ValueError` unless exactly one thing decides the rank, and `multiple_of`
        divides a given one.
        """
        given = [
            key
            for key in ("rank", "compression", "total_parameters")
            if getattr(self, key) is not None
        ]
        if len(given) != 1:
            said = f"got {' and '.join(given)}" if given else "got none"
            raise ValueError(f"give exactly one of rank, compression and total_parameters ({said})")
        if self.rank is not None and self.rank % self.multiple_of:
            raise ValueError(f"rank {self.rank} is no multiple of {self.multiple_of}")


def not_exported(quantizer: str) -> dict[str, str]:
    """Export format -> why a low-rank model whose factors are stored by this kind of quantizer
    does not go into it.
    """
    unknown = "no library builds its low-rank layers: only the dense model that computes the same can be exported"
    quantized = f"its base is factors stored by {quantizer}, and {unknown}"
    return {"peft": unknown} | ({} if quantizer == "none" else {"base": quantized})


def is_target(name: str, targets: str | tuple[str, ...]) -> bool:
    """Whether a layer's name ends in one of `targets`, whole parts of it; every one does for
    `all-linear`.
    """
    return targets == "all-linear" or any(f".{name}".endswith(f".{each}") for each in targets)


def pairs(chosen: LowRank, dense: Sizes) -> dict[str, tuple[int, int]]:
    """Name of a factor pair -> (in, out), for the dense layers that are targeted: a pair a layer,
    three for a split c_attn.

    Raises `ValueError` for a target that no layer bears, and for `split_qkv` where there is nothing
    to split.
    """
    known = sorted({name.rpartition(".")[2] for name in dense})
    for each in () if chosen.targets == "all-linear" else chosen.targets:
        if not any(is_target(name, (each,)) for name in dense):
            raise ValueError(
                f"low_rank.targets: no linear layer is named {each}; there are {', '.join(known)}"
            )
    found = {name: size for name, size in dense.items() if is_target(name, chosen.targets)}
    if not found:
        raise ValueError(f"low_rank.targets: names no layer; there are {', '.join(known)}")
    if not chosen.split_qkv:
        return found
    if FUSED not in found:
        raise ValueError(
            f"low_rank.split_qkv: there is no fused {FUSED} among the targets: say false"
        )
    split: dict[str, tuple[int, int]] = {}
    for name, (inputs, outputs) in found.items():
        split |= (
            {f"{name}.{each}": (inputs, outputs // 3) for each in "qkv"}
            if name == FUSED
            else {name: (inputs, outputs)}
        )
    return split


def factor_sizes(chosen: LowRank, dense: Sizes, rank: int) -> dict[str, tuple[int, int]]:
    """Name within a block -> (in, out) of every linear layer of the low-rank model, in the dense
    model's order.

    `<layer>.a` is (in, r) and `<layer>.b` (r, out); a split layer has `<layer>.q.a` and so on;
    layers that are not targeted stay.
    """
    found: dict[str, tuple[int, int]] = {}
    split = pairs(chosen, dense)
    for name, size in dense.items():
        inner = {
            key: each for key, each in split.items() if key == name or key.startswith(f"{name}.")
        }
        found |= {} if inner else {name: size}
        for key, (inputs, outputs) in inner.items():
            found |= {f"{key}.a": (inputs, rank), f"{key}.b": (rank, outputs)}
    return found


def break_even(inputs: int, outputs: int) -> float:
    """The rank from which on two factors have no fewer weights than the layer."""
    return inputs * outputs / (inputs + outputs)


def solve(chosen: LowRank, dense: Sizes, blocks: int, others: int) -> int:
    """The rank of a model with so many `blocks` of these linear layers and `others`, the parameters
    that no rank touches.

    Raises `ValueError` in one line when the rank saves nothing in some layer, or no rank gives what
    is asked within half a percent.
    """
    split = pairs(chosen, dense)
    whole = others + blocks * sum(inputs * outputs for inputs, outputs in dense.values())
    kept = whole - blocks * sum(inputs * outputs for inputs, outputs in split.values())
    of_a_rank = blocks * sum(inputs + outputs for inputs, outputs in split.values())
    if chosen.rank is not None:
        return _saving(chosen.rank, split)
    wanted = chosen.total_parameters or whole / (chosen.compression or 1.0)
    asked = (
        f"compression {chosen.compression:g}"
        if chosen.compression
        else f"{chosen.total_parameters:,} parameters"
    )
    if wanted >= whole:
        raise ValueError(f"low_rank: {asked}: the dense model has {whole:,} already")
    if wanted <= kept:
        cap = f"{kept:,} of {whole:,} parameters are not factored (embeddings, biases, norms, other layers)"
        raise ValueError(
            f"low_rank: no rank gives {asked}: {cap}, which caps the compression at {whole / kept:.2f}"
        )
    step, exact = chosen.multiple_of, (wanted - kept) / of_a_rank
    near = sorted(
        {max(step, math.floor(exact / step) * step), max(step, math.ceil(exact / step) * step)}
    )
    sizes = {rank: kept + rank * of_a_rank for rank in near}
    best = min(sizes, key=lambda rank: abs(sizes[rank] / wanted - 1))
    if abs(sizes[best] / wanted - 1) > NEAR:
        gives = " and ".join(
            f"rank {rank} gives {whole / size:.3g} ({size:,})" for rank, size in sizes.items()
        )
        of = f" that is a multiple of {step}" if step > 1 else ""
        raise ValueError(f"low_rank: no rank{of} gives {asked} within {NEAR:.1%}: {gives}")
    return _saving(best, split)


def _saving(rank: int, split: Sizes) -> int:
    """The rank, if it saves weights in every layer. Raises `ValueError` naming the first where
    it does not, and its break-even.
    """
    for name, (inputs, outputs) in split.items():
        if rank * (inputs + outputs) >= inputs * outputs:
            even = break_even(inputs, outputs)
            raise ValueError(
                f"low_rank: rank {rank} saves nothing in {name} ({inputs} in, {outputs} out): its break-even rank is {even:g}"
            )
    return rank
