"""Table 1: what the models' sizes say - where the parameters and the operations are, bytes, and
the memory to train. A column a model.
"""

from collections.abc import Callable, Sequence
from typing import Any

from finrepro.reporting.curves import Chart, Curve
from finrepro.reporting.table import Line, Table

Account = dict[str, Any]  # finrepro.sizes.account: every number of one model
GB, GFLOP = 1e9, 1e9
H1, H2 = (
    0.80,
    0.99,
)  # FinGPT-HPC's abstract (arXiv 2402.13533): linear layers' share of the compute, and of the size
CLAIMED = "gpt2_1_5b"  # what second-hand notes give as the model of its 2.64x and 1.3x
PARTS = {"linear": "linear layers", "attention": "attention", "head": "output head"}


def build(accounts: Sequence[Account], settings: Any) -> Table:
    """The table of finished accounts, made for `settings` (finrepro.sizes.account.Computed)."""
    lines = [
        *_size(accounts),
        *_bytes(accounts),
        *_compute(accounts, settings),
        *_operations(accounts, settings),
        *_memory(accounts, settings),
    ]
    return Table(
        name="table1",
        label="table1_paper",
        caption="The models: computed from their sizes, real ones",
        columns=("Quantity", *(each["model"] for each in accounts)),
        lines=tuple(lines),
        notes=_notes(accounts, settings),
    )


def charts(accounts: Sequence[Account]) -> tuple[Chart, ...]:
    """A chart a model: the shares of compute against the length of a sequence in training, with
    causal attention.
    """
    return tuple(
        Chart(
            each["model"],
            "tokens in a sequence",
            "share of the operations",
            tuple(Curve(name, *_points(each["curve"], part)) for part, name in PARTS.items()),
            "log",
            (0.0, 1.0),
        )
        for each in accounts
    )


def _points(
    shares: dict[int, dict[str, float]], part: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(map(float, shares)), tuple(each[part] for each in shares.values())


def _line(
    name: str, accounts: Sequence[Account], key: str, show: Callable[[Account], str], section: str
) -> Line:
    """A quantity of every model; the evidence holds it unrounded."""
    return Line(
        (name, *map(show, accounts)),
        section,
        {key: {each["model"]: each[key] for each in accounts}},
    )


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _both(linear: float, with_head: float, claim: Callable[[float], bool] | None = None) -> str:
    """A share, and in brackets the one with the head; or whether a claim holds for the one and
    for the other.
    """
    first, second = (
        _percent(each) if claim is None else "yes" if claim(each) else "no"
        for each in (linear, with_head)
    )
    return f"{first} ({second})"


def _large(share: float) -> bool:
    return round(share, 2) >= H2  # in whole percents, as it is claimed


def _busy(share: float) -> bool:
    return share > H1


def _size(accounts: Sequence[Account]) -> list[Line]:
    def add(name: str, key: str, show: Callable[[Account], str]) -> Line:
        return _line(name, accounts, key, show, "size")

    return [
        add("Parameters", "parameters", lambda each: f"{each['parameters']:,}"),
        add(
            "In the blocks' linear layers",
            "linear_parameters",
            lambda each: f"{each['linear_parameters']:,}",
        ),
        add("Linear share of size", "linear_share", lambda each: _percent(each["linear_share"])),
        add(
            "with the output head",
            "linear_share_with_head",
            lambda each: _percent(each["linear_share_with_head"]),
        ),
        add(
            "without head and embeddings",
            "linear_share_without_tables",
            lambda each: _percent(each["linear_share_without_tables"]),
        ),
        add(
            "H2: 99 % of the size",
            "linear_share",
            lambda each: _both(each["linear_share"], each["linear_share_with_head"], _large),
        ),
    ]


def _bytes(accounts: Sequence[Account]) -> list[Line]:
    def shown(name: str, bits: int) -> Callable[[Account], str]:
        return lambda each: (
            f"{each['bytes'][name] / GB:.3g}; {each['nominal_bytes'][bits] / GB:.3g}"
        )

    lines = [
        _line(
            f"{bits} bit{what}, stored; nominal [GB]", accounts, "bytes", shown(name, bits), "bytes"
        )
        for bits, name, what in ((16, "none", ""), (8, "int8", " (int8)"), (4, "nf4", " (nf4)"))
    ]
    kept = _line(
        "Keys and values [KiB a token]",
        accounts,
        "cache_bytes_per_token",
        lambda each: f"{each['cache_bytes_per_token'] / 1024:g}",
        "bytes",
    )
    return [*lines, kept]


def _compute(accounts: Sequence[Account], settings: Any) -> list[Line]:
    """Shares of the linear layers, in brackets with the output head counted among them."""

    def shown(
        key: str, length: int, claim: Callable[[float], bool] | None = None
    ) -> Callable[[Account], str]:
        def show(each: Account) -> str:
            found = each[key].get(length)
            return _both(found["linear"], found["linear"] + found["head"], claim) if found else "-"

        return show

    lines = [
        _line(
            f"Linear share, {what}, {length:,} tokens", accounts, key, shown(key, length), "compute"
        )
        for what, key in (("training", "training_shares"), ("generating", "serving_shares"))
        for length in settings.lengths
    ]
    judged = shown("training_shares", settings.tokens, _busy)
    name = f"H1: > 80 % of the compute, training, {settings.tokens:,} tokens"
    return [*lines, _line(name, accounts, "training_shares", judged, "compute")]


def _operations(accounts: Sequence[Account], settings: Any) -> list[Line]:
    names = {
        "forward": "Forward",
        "full": "Full fine-tuning or pretraining",
        "full_checkpointed": "the same, checkpointed",
        "lora": f"LoRA, r {settings.rank}",
        "lora_checkpointed": f"LoRA, r {settings.rank}, checkpointed",
    }

    def cost(key: str) -> Callable[[Account], str]:
        return lambda each: f"{each['flops'][key] / GFLOP:.3g}"

    def low_rank(each: Account) -> str:
        found = each["low_rank"]["linear"]
        return f"{found['full'] / GFLOP:.3g} (r {found['rank']})" if found["rank"] else "-"

    def bound(whole: str) -> Callable[[Account], str]:
        def show(each: Account) -> str:
            found = each["low_rank"][whole]
            return f"{found['speed_up_bound']:.2f}x (r {found['rank']})" if found["rank"] else "-"

        return show

    ratio = f"{settings.compression:g}"
    return [
        *(
            _line(f"{name} [GFLOP a token]", accounts, "flops", cost(key), "operations")
            for key, name in names.items()
        ),
        _line(
            f"Pretraining, linear layers / {ratio} [GFLOP a token]",
            accounts,
            "low_rank",
            low_rank,
            "operations",
        ),
        _line(
            f"Most speed-up, linear layers / {ratio}",
            accounts,
            "low_rank",
            bound("linear"),
            "operations",
        ),
        _line(
            f"Most speed-up, model / {ratio}",
            accounts,
            "low_rank",
            bound("whole_model"),
            "operations",
        ),
    ]


def _memory(accounts: Sequence[Account], settings: Any) -> list[Line]:
    names = {
        "full": "Full, AdamW",
        "lora": f"LoRA r {settings.rank}, 16 bit",
        "qlora": f"LoRA r {settings.rank}, nf4",
    }

    def shown(key: str) -> Callable[[Account], str]:
        return lambda each: (
            f"{each['memory'][key]['total'] / GB:,.{0 if each['memory'][key]['total'] > 100 * GB else 1}f}"
        )

    return [
        _line(f"{name} [GB, estimated]", accounts, "memory", shown(key), "memory")
        for key, name in names.items()
    ]


def _notes(accounts: Sequence[Account], settings: Any) -> tuple[str, ...]:
    """How it is counted, then the published claims put to the test on the model they were made
    for.
    """
    tokens = f"{settings.tokens:,}"
    notes = [
        "Computed from the architecture alone; parameters, stored bytes and operations are exact. "
        "A multiply-add is two operations; only matrix products count.",
        "Linear layers: those of the blocks. In brackets: with the output head counted as one of them. "
        "GPT-2's head is its input embedding, counted once. H1, H2: FinGPT-HPC's abstract (arXiv 2402.13533).",
        "Stored: with the scales of 8 and 4 bit (LLM.int8; NF4 with double quantization), embeddings, norms and head in 16 bit. "
        "Nominal: parameters times bits. 1 GB = 10^9 bytes, 1 KiB = 1024.",
        "Shares in training: causal attention (half of all pairs); backward costs twice forward in every part. "
        "Generating: one token after as many others whose keys and values are kept. '-': the model has no positions for it.",
        f"Operations: sequences of {tokens} tokens, attention in full. LoRA: on all linear layers; no gradients of frozen weights. "
        "Checkpointing: the blocks run forward twice but for each one's last product, before which torch stops.",
        f"Memory: one sequence of {tokens} tokens, each block's input kept; 16 bytes a trained parameter; "
        "without fragments, driver and communication. An estimate.",
        f"/ {settings.compression:g}: one rank for all linear layers, the nearest to that compression; "
        "a layer in which it saves nothing stays dense.",
    ]
    published = next((each for each in accounts if each["model"] == CLAIMED), None)
    return (
        *notes,
        *(
            _claims(published, settings.compression)
            if published and settings.compression == REPORTED
            else ()
        ),
    )


REPORTED = 2.64  # FinGPT-HPC's abstract (arXiv 2402.13533)


def _claims(each: Account, ratio: float) -> list[str]:
    """FinGPT-HPC's 2.64x, 0.59 GB and 1.3x, which its abstract gives together."""
    whole, linear, share = (
        each["low_rank"]["whole_model"],
        each["low_rank"]["linear"],
        each["linear_share"],
    )
    if not whole["rank"]:
        return []
    diluted, meant = (1 / (1 - part + part / ratio) for part in (share, H2))
    size = {name: f"{value / GB:.2f} GB" for name, value in whole["bytes"].items()}
    return [
        f"FinGPT-HPC reports {ratio:g}x compression, models smaller than 0.59 GB and 1.3x faster pretraining. "
        f"Of the whole {each['model']}, {ratio:g}x is r {whole['rank']} and {whole['parameters'] / 1e6:,.1f} M parameters: "
        f"{whole['parameters'] / GB:.2f} GB at a nominal byte each, but {size['int8']} as LLM.int8 stores them "
        f"and {size['nf4']} as NF4 would, which takes ranks that 64 divides. "
        "At 8 bit 0.59 GB is a nominal size.",
        f"Of its linear layers alone, {ratio:g}x is r {linear['rank']} and {linear['parameters'] / 1e6:,.1f} M parameters, "
        f"{linear['parameters'] / GB:.2f} GB at a nominal byte: not smaller than 0.59 GB. There it is {diluted:.2f}x of the model; "
        f"were linear layers 99 % of the size, as reported, it would be {meant:.2f}x. Their share is {_percent(share)}: "
        "not all of these numbers are of this model.",
        f"At r {whole['rank']} the operations allow {whole['speed_up_bound']:.2f}x, at r {linear['rank']} {linear['speed_up_bound']:.2f}x; "
        f"1.3x is {_percent(1.3 / whole['speed_up_bound'])} of the first.",
    ]
