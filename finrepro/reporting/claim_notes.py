"""Published claims of low-rank models, tested on the sizes of the model they were made of."""

from collections.abc import Mapping, Sequence
from typing import Any

from finrepro.catalogue.published import Claim

GB = 1e9  # bytes


def percent(share: float) -> str:
    """A share in percent, to one decimal."""
    return f"{100 * share:.1f} %"


def low_rank_claims(
    accounts: Sequence[Mapping[str, Any]], ratio: float, claims: Mapping[str, Claim]
) -> tuple[str, ...]:
    """What of FinGPT-HPC's compression, bytes and speed-up, which its abstract gives together, can
    be true together.

    Nothing where the model is not among the accounts, where they are of another compression than
    the claimed `ratio`, or where no rank reaches it.
    """
    compression, size = claims["compression"], claims["model_bytes"]
    speed_up, linear_share = claims["speed_up"], claims["linear_share_of_size"]
    account = next((entry for entry in accounts if entry["model"] == compression.model), None)
    if account is None or ratio != compression.value:
        return ()
    model, layers = account["low_rank"]["whole_model"], account["low_rank"]["linear"]
    if not model["rank"]:
        return ()
    share = account["linear_share"]
    diluted, at_claimed_share = (
        1 / (1 - linear + linear / ratio) for linear in (share, linear_share.value)
    )
    stored = {name: f"{value / GB:.2f} GB" for name, value in model["bytes"].items()}
    limit, faster = f"{size.value / GB:g} GB", f"{speed_up.value:g}x"
    return (
        f"FinGPT-HPC reports {ratio:g}x compression, models smaller than {limit} and {faster} "
        f"faster pretraining. Of the whole {account['model']}, {ratio:g}x is r {model['rank']} and "
        f"{model['parameters'] / 1e6:,.1f} M parameters: {model['parameters'] / GB:.2f} GB at a "
        f"nominal byte each, but {stored['int8']} as LLM.int8 stores them and {stored['nf4']} as "
        f"NF4 would, which takes ranks that 64 divides. At 8 bit {limit} is a nominal size.",
        f"Of its linear layers alone, {ratio:g}x is r {layers['rank']} and "
        f"{layers['parameters'] / 1e6:,.1f} M parameters, {layers['parameters'] / GB:.2f} GB at a "
        f"nominal byte: not smaller than {limit}. There it is {diluted:.2f}x of the model; were "
        f"linear layers {100 * linear_share.value:g} % of the size, as reported, it would be "
        f"{at_claimed_share:.2f}x. Their share is {percent(share)}: not all of these numbers are "
        "of this model.",
        f"At r {model['rank']} the operations allow {model['speed_up_bound']:.2f}x, at r "
        f"{layers['rank']} {layers['speed_up_bound']:.2f}x; {faster} is "
        f"{percent(speed_up.value / model['speed_up_bound'])} of the first.",
    )
