"""Table 1: what follows from the models' sizes - shares of parameters and of FLOPs, bytes, and the
memory to train. A column a model.
"""

from collections.abc import Callable, Sequence
from typing import Any

from finrepro.catalogue.published import Claim
from finrepro.catalogue.reader import claims
from finrepro.reporting import claim_notes
from finrepro.reporting.claim_notes import GB, percent
from finrepro.reporting.curves import Chart, Curve
from finrepro.reporting.table import Line, Table

Account = dict[str, Any]  # finrepro.sizes.account: every number of one model
Text = Callable[[Account], str]  # the text of a model's column
GFLOP = 1e9
TERMS = {"linear": "linear layers", "attention": "attention", "head": "output head"}


def build(accounts: Sequence[Account], settings: Any) -> Table:
    """The table of finished accounts, computed for `settings` (finrepro.sizes.account.Computed)."""
    published = claims(settings.claims)
    lines = [
        *_size(accounts, published),
        *_bytes(accounts),
        *_compute(accounts, settings, published),
        *_operations(accounts, settings),
        *_memory(accounts, settings),
    ]
    return Table(
        name="table1",
        label="table1_paper",
        caption="The models: computed from their sizes, real ones",
        columns=("Quantity", *(account["model"] for account in accounts)),
        lines=tuple(lines),
        notes=_notes(accounts, settings, published),
    )


def charts(accounts: Sequence[Account]) -> tuple[Chart, ...]:
    """A chart a model: the shares of FLOPs against the sequence length in training, with causal
    attention.
    """
    return tuple(
        Chart(
            account["model"],
            "tokens in a sequence",
            "share of the operations",
            tuple(Curve(name, *_points(account["curve"], term)) for term, name in TERMS.items()),
            "log",
            (0.0, 1.0),
        )
        for account in accounts
    )


def _points(
    shares: dict[int, dict[str, float]], term: str
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The shares of a term against the lengths."""
    return tuple(map(float, shares)), tuple(by_term[term] for by_term in shares.values())


def _line(name: str, accounts: Sequence[Account], key: str, text: Text, section: str) -> Line:
    """A quantity of every model; the evidence holds it unrounded."""
    values = {account["model"]: account[key] for account in accounts}
    return Line((name, *map(text, accounts)), section, {key: values})


def _both(linear: float, with_head: float, holds: Callable[[float], bool] | None = None) -> str:
    """The linear layers' share, and in brackets the one with the head; or for each of the two
    whether a claim holds.
    """
    first, second = (
        percent(share) if holds is None else "yes" if holds(share) else "no"
        for share in (linear, with_head)
    )
    return f"{first} ({second})"


def _size(accounts: Sequence[Account], published: dict[str, Claim]) -> list[Line]:
    claimed = published["linear_share_of_size"]

    def holds(share: float) -> bool:
        return round(share, 2) >= claimed.value  # in whole percents, as it is claimed

    texts: list[tuple[str, str, Text]] = [
        ("Parameters", "parameters", lambda account: f"{account['parameters']:,}"),
        (
            "In the blocks' linear layers",
            "linear_parameters",
            lambda account: f"{account['linear_parameters']:,}",
        ),
        (
            "Linear share of size",
            "linear_share",
            lambda account: percent(account["linear_share"]),
        ),
        (
            "with the output head",
            "linear_share_with_head",
            lambda account: percent(account["linear_share_with_head"]),
        ),
        (
            "without head and embeddings",
            "linear_share_without_tables",
            lambda account: percent(account["linear_share_without_tables"]),
        ),
        (
            f"{claimed.hypothesis}: {100 * claimed.value:g} % of the size",
            "linear_share",
            lambda account: _both(
                account["linear_share"], account["linear_share_with_head"], holds
            ),
        ),
    ]
    return [_line(name, accounts, key, text, "size") for name, key, text in texts]


def _bytes(accounts: Sequence[Account]) -> list[Line]:
    def stored(name: str, bits: int) -> Text:
        return lambda account: (
            f"{account['bytes'][name] / GB:.3g}; {account['nominal_bytes'][bits] / GB:.3g}"
        )

    widths = ((16, "none", ""), (8, "int8", " (int8)"), (4, "nf4", " (nf4)"))
    lines = [
        _line(
            f"{bits} bit{suffix}, stored; nominal [GB]",
            accounts,
            "bytes",
            stored(name, bits),
            "bytes",
        )
        for bits, name, suffix in widths
    ]
    key = "cache_bytes_per_token"
    cache = _line(
        "Keys and values [KiB a token]",
        accounts,
        key,
        lambda account: f"{account[key] / 1024:g}",
        "bytes",
    )
    return [*lines, cache]


def _compute(accounts: Sequence[Account], settings: Any, published: dict[str, Claim]) -> list[Line]:
    """Shares of the linear layers, in brackets with the output head counted among them."""
    claimed = published["linear_share_of_compute"]

    def share(key: str, length: int, holds: Callable[[float], bool] | None = None) -> Text:
        def text(account: Account) -> str:
            shares = account[key].get(length)
            if not shares:
                return "-"
            return _both(shares["linear"], shares["linear"] + shares["head"], holds)

        return text

    lines = [
        _line(
            f"Linear share, {phase}, {length:,} tokens",
            accounts,
            key,
            share(key, length),
            "compute",
        )
        for phase, key in (("training", "training_shares"), ("generating", "serving_shares"))
        for length in settings.lengths
    ]
    name = (
        f"{claimed.hypothesis}: > {100 * claimed.value:g} % of the compute, training, "
        f"{settings.tokens:,} tokens"
    )
    judged = share("training_shares", settings.tokens, lambda linear: linear > claimed.value)
    return [*lines, _line(name, accounts, "training_shares", judged, "compute")]


def _operations(accounts: Sequence[Account], settings: Any) -> list[Line]:
    names = {
        "forward": "Forward",
        "full": "Full fine-tuning or pretraining",
        "full_checkpointed": "the same, checkpointed",
        "lora": f"LoRA, r {settings.rank}",
        "lora_checkpointed": f"LoRA, r {settings.rank}, checkpointed",
    }

    def cost(key: str) -> Text:
        return lambda account: f"{account['flops'][key] / GFLOP:.3g}"

    def low_rank(account: Account) -> str:
        layers = account["low_rank"]["linear"]
        return f"{layers['full'] / GFLOP:.3g} (r {layers['rank']})" if layers["rank"] else "-"

    def bound(goal: str) -> Text:
        def text(account: Account) -> str:
            model = account["low_rank"][goal]
            return f"{model['speed_up_bound']:.2f}x (r {model['rank']})" if model["rank"] else "-"

        return text

    ratio = f"{settings.compression:g}"
    low_rank_texts = {
        f"Pretraining, linear layers / {ratio} [GFLOP a token]": low_rank,
        f"Most speed-up, linear layers / {ratio}": bound("linear"),
        f"Most speed-up, model / {ratio}": bound("whole_model"),
    }
    return [
        *(
            _line(f"{name} [GFLOP a token]", accounts, "flops", cost(key), "operations")
            for key, name in names.items()
        ),
        *(
            _line(name, accounts, "low_rank", text, "operations")
            for name, text in low_rank_texts.items()
        ),
    ]


def _memory(accounts: Sequence[Account], settings: Any) -> list[Line]:
    names = {
        "full": "Full, AdamW",
        "lora": f"LoRA r {settings.rank}, 16 bit",
        "qlora": f"LoRA r {settings.rank}, nf4",
    }

    def total(key: str) -> Text:
        def text(account: Account) -> str:
            size = account["memory"][key]["total"]
            return f"{size / GB:,.{0 if size > 100 * GB else 1}f}"

        return text

    return [
        _line(f"{name} [GB, estimated]", accounts, "memory", total(key), "memory")
        for key, name in names.items()
    ]


def _notes(
    accounts: Sequence[Account], settings: Any, published: dict[str, Claim]
) -> tuple[str, ...]:
    """How it is counted, then the published claims, tested on the model they were made of."""
    tokens = f"{settings.tokens:,}"
    hypotheses = ", ".join(claim.hypothesis for claim in published.values() if claim.hypothesis)
    source = next(iter(published.values())).source
    notes = (
        "Computed from the architecture alone; parameters, stored bytes and operations are exact. "
        "A multiply-add is two operations; only matrix products count.",
        "Linear layers: those of the blocks. In brackets: with the output head counted as one of "
        "them. GPT-2's head is its input embedding, counted once. "
        f"{hypotheses}: {source}.",
        "Stored: with the scales of 8 and 4 bit (LLM.int8; NF4 with double quantization), "
        "embeddings, norms and head in 16 bit. "
        "Nominal: parameters times bits. 1 GB = 10^9 bytes, 1 KiB = 1024.",
        "Shares in training: causal attention (half of all pairs); backward costs twice forward in "
        "every part. Generating: one token after as many others whose keys and values are kept. "
        "'-': the model has no positions for it.",
        f"Operations: sequences of {tokens} tokens, attention in full. LoRA: on all linear layers; "
        "no gradients of frozen weights. Checkpointing: the blocks run forward twice but for each "
        "one's last product, before which torch stops.",
        f"Memory: one sequence of {tokens} tokens, each block's input kept; 16 bytes a trained "
        "parameter; without fragments, driver and communication. An estimate.",
        f"/ {settings.compression:g}: one rank for all linear layers, the nearest to that "
        "compression; a layer in which it saves nothing stays dense.",
    )
    return notes + claim_notes.low_rank_claims(accounts, settings.compression, published)
