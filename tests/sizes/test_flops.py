"""Law: the operations that are computed from a model's sizes are those that torch counts while it
runs, and every term left out is named.

Attention is 'eager' here: torch's counter does not see scaled-dot-product attention on a CPU.
"""

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from fixtures.model import ALL_MINIATURES, broken, process  # noqa: F401
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from finrepro.catalogue import reader
from finrepro.catalogue.spec import Model
from finrepro.methods.adapters import lora
from finrepro.methods.layers.linear import features, linear_layers
from finrepro.models.build import configuration
from finrepro.models.factorize import restructured
from finrepro.sizes import flops
from finrepro.sizes.low_rank import break_even
from finrepro.sizes.shapes import block_sizes, depth, other_parameters
from finrepro.sizes.shapes import rank as layer_rank

TOKENS, LORA, LOW_RANK = 48, 8, 24
REAL = ("gpt2_127m", "gpt2_1_5b", "llama2_7b", "llama2_13b", "llama3_1_8b", "llama3_1_70b")
TOLERANCE = 0.005


def shallow(name: str, blocks: int = 2) -> Model:
    """A catalogue entry with fewer blocks, of the same rank."""
    model = reader.model(name)
    if model.low_rank:
        given = {
            "rank": layer_rank(model),
            "compression": None,
            "total_parameters": None,
            "multiple_of": 1,
        }
        model = dataclasses.replace(model, low_rank=dataclasses.replace(model.low_rank, **given))
    key = "n_layer" if model.family == "gpt2" else "num_hidden_layers"
    return dataclasses.replace(model, architecture={**model.architecture, key: blocks})


class Factors(nn.Module):
    """B A in place of W."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(inputs, rank, bias=False), nn.Linear(rank, outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


def made(
    model: Model, rank: int, targets: Any, checkpointing: bool, factors: int, device: str = "meta"
) -> Any:
    """A plain model of the entry, with no storage; nothing of ours but the LoRA."""
    from transformers import AutoModelForCausalLM

    config = configuration(model)
    config.use_cache = False
    with torch.device(device):
        net = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        if factors:
            for name, layer in linear_layers(net).items():
                net.set_submodule(name, Factors(*features(layer), factors))
    if model.low_rank:
        net = restructured(net, model.low_rank, layer_rank(model))
    if rank:
        net.requires_grad_(False)
        net = lora.apply(net, lora.plain(rank, 2 * rank, targets), 0)
    if checkpointing:
        net.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return net.train()


def counted(
    model: Model,
    rank: int = 0,
    targets: Any = "all-linear",
    checkpointing: bool = False,
    factors: int = 0,
    backward: bool = True,
    tokens: int = TOKENS,
    device: str = "meta",
) -> float:
    """What torch counts, a token."""
    net = made(model, rank, targets, checkpointing, factors, device)
    ids = torch.zeros((1, tokens), dtype=torch.long, device=device)
    mask = torch.zeros(
        (1, 1, tokens, tokens), device=device
    )  # a mask made by transformers looks at values
    # DeepSpeed's stage 3 leaves a linear function of its own behind in the process, which
    # recomputes a block's last product as well.
    torch.nn.functional.linear = torch._C._nn.linear
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(backward):
        logits = net(input_ids=ids, attention_mask=mask).logits
        if backward:
            logits.float().sum().backward()
    return counter.get_total_flops() / tokens


def sizes_of(model: Model, factors: int) -> dict[str, tuple[int, int]]:
    return flops.factored(block_sizes(model), factors) if factors else block_sizes(model)


def equal(computed: float, run: float) -> None:
    """Half a percent is what is promised; it is the same number, to the operation."""
    assert abs(computed - run) <= TOLERANCE * run, f"{computed:,.0f} computed, {run:,.0f} counted"
    assert computed == pytest.approx(run, rel=1e-12)


CELLS = [
    (rank, checkpointing, factors)
    for rank in (0, LORA)
    for checkpointing in (False, True)
    for factors in (0, LOW_RANK)
]
NAMES = (*ALL_MINIATURES, *REAL)
QUICK = ("gpt2_127m_mini", "llama3_1_8b_mini", "gpt2_127m", "llama3_1_8b")


@pytest.mark.parametrize(("rank", "checkpointing", "factors"), CELLS)
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES]
)
def test_training_costs_what_torch_counts(name: str, rank: int, checkpointing: bool, factors: int):
    model = shallow(name)
    run = counted(model, rank, checkpointing=checkpointing, factors=factors)
    equal(
        flops.training(
            model, TOKENS, rank, checkpointing=checkpointing, sizes=sizes_of(model, factors)
        ).total,
        run,
    )


@pytest.mark.parametrize("factors", [0, LOW_RANK])
@pytest.mark.parametrize("name", QUICK)
def test_a_forward_pass_costs_what_torch_counts(name: str, factors: int):
    model = shallow(name, 3)
    run = counted(model, factors=factors, backward=False)
    equal(flops.forward(model, TOKENS, sizes=sizes_of(model, factors)).total, run)
    assert (
        flops.forward(model, TOKENS, causal=True).attention
        == flops.forward(model, TOKENS).attention / 2
    )


@pytest.mark.parametrize(
    "targets",
    [("q_proj",), ("v_proj",), ("q_proj", "k_proj", "v_proj"), ("gate_proj",), ("down_proj",)],
)
def test_a_lora_on_some_layers_costs_what_torch_counts(targets: tuple[str, ...]):
    model = shallow("llama3_1_8b_mini")
    for checkpointing in (False, True):
        run = counted(model, LORA, targets, checkpointing)
        equal(flops.training(model, TOKENS, LORA, targets, checkpointing).total, run)


def generation(model: Model, context: int) -> float:
    """What torch counts for one token after `context - 1` others that are kept."""
    from transformers import DynamicCache

    net = made(model, 0, "all-linear", False, 0, "cpu").eval()
    ids = torch.arange(context)[None] % model.architecture["vocab_size"]
    kept = DynamicCache()
    with torch.no_grad():
        net(input_ids=ids[:, :-1], past_key_values=kept, use_cache=True)
        with FlopCounterMode(display=False) as counter:
            net(input_ids=ids[:, -1:], past_key_values=kept, use_cache=True)
    return float(counter.get_total_flops())


@pytest.mark.parametrize("name", QUICK[:2])
def test_a_generated_token_costs_what_torch_counts(name: str):
    model = reader.model(name)
    for context in (2, 33):
        equal(flops.generated(model, context).total, generation(model, context))
    broken(equal, flops.generated(model, 32).total, generation(model, 33))


LOW_RANK_ENTRIES = tuple(name for name in reader.entries("models") if reader.model(name).low_rank)
SMALL = tuple(name for name in LOW_RANK_ENTRIES if reader.model(name).scale == "smoke")


def split(model: Model) -> Model:
    """The entry with its queries, keys and values factored apart."""
    return dataclasses.replace(model, low_rank=dataclasses.replace(model.low_rank, split_qkv=True))


@pytest.mark.parametrize("rank", [0, LORA], ids=["full", "lora"])
@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n == SMALL[0] else pytest.mark.slow) for n in LOW_RANK_ENTRIES],
)
def test_a_low_rank_entry_costs_what_torch_counts(name: str, rank: int):
    model = shallow(name)
    saves = layer_rank(model) < break_even(
        flops.width(model), flops.width(model)
    ) and "attn.c_attn.a" in block_sizes(model)
    for each in (model, split(model)) if saves else (model,):
        for checkpointing in (False, True):
            run = counted(each, rank, checkpointing=checkpointing)
            equal(flops.training(each, TOKENS, rank, checkpointing=checkpointing).total, run)


@pytest.mark.parametrize(
    "name", [name for name in LOW_RANK_ENTRIES if reader.model(name).low_rank.compression]
)  # type: ignore[union-attr]
def test_a_rank_is_the_one_that_the_low_rank_entries_have(name: str):
    entry = reader.model(name)
    dense = dataclasses.replace(entry, low_rank=None)
    dense = dataclasses.replace(
        dense,
        parameters=other_parameters(dense)
        + depth(dense) * sum(i * o for i, o in block_sizes(dense).values()),
    )
    found = flops.rank_for(dense, entry.low_rank.compression, of_model=True)  # type: ignore[union-attr,arg-type]
    assert found == layer_rank(entry) and flops.factored(block_sizes(dense), found) == block_sizes(
        entry
    )


def test_a_layer_in_which_a_rank_saves_nothing_stays_dense():
    sizes = block_sizes(reader.model("llama3_1_8b"))
    found = flops.factored(sizes, 1000)  # above the break-even of keys and values, 819
    assert {name for name in found if name in sizes} == {"self_attn.k_proj", "self_attn.v_proj"}
    assert len(flops.factored(sizes, 819)) == 2 * len(sizes)


@cache
def run_of(rank: int, checkpointing: bool) -> tuple[Model, float]:
    model = shallow("llama3_1_8b_mini")
    return model, counted(model, rank, checkpointing=checkpointing)


# What is wrong when a term is forgotten: each is found by the law.
MUTANTS: dict[str, tuple[int, bool, Callable[[Model], float]]] = {
    "a multiply-add is one": (0, False, lambda m: flops.training(m, TOKENS).total / 2),
    "no attention": (
        0,
        False,
        lambda m: flops.training(m, TOKENS).total - flops.training(m, TOKENS).attention,
    ),
    "causal attention": (0, False, lambda m: flops.training(m, TOKENS, causal=True).total),
    "no head": (
        0,
        False,
        lambda m: flops.training(m, TOKENS).total - flops.training(m, TOKENS).head,
    ),
    "no recomputation": (0, True, lambda m: flops.training(m, TOKENS).total),
    "all of a block twice": (0, True, lambda m: flops.training(m, TOKENS).total + blocks(m)),
    "LoRA at 6 N": (LORA, False, lambda m: flops.training(m, TOKENS).total),
    "LoRA without its factors": (LORA, False, lambda m: flops.training(m, TOKENS, 1).total),
    "gradients of frozen embeddings": (
        LORA,
        False,
        lambda m: flops.training(m, TOKENS, LORA, checkpointing=True).total - blocks(m),
    ),
    "dense for low-rank": (
        0,
        False,
        lambda m: flops.training(m, TOKENS, sizes=sizes_of(m, LOW_RANK)).total,
    ),
}


def blocks(model: Model) -> float:
    """A forward pass of the blocks."""
    cost = flops.forward(model, TOKENS)
    return cost.linear + cost.attention


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_forgotten_term_is_found(mutant: str):
    rank, checkpointing, wrong = MUTANTS[mutant]
    model, run = run_of(rank, checkpointing)
    equal(flops.training(model, TOKENS, rank, checkpointing=checkpointing).total, run)
    broken(equal, wrong(model), run)


def test_positions_that_are_not_scored_cost_no_head():
    model = reader.model("gpt2_127m")
    all_of_them, some = flops.training(model, 1024), flops.training(model, 1024, scored=0.25)
    assert some.head == all_of_them.head / 4 and some.linear == all_of_them.linear


def test_a_low_rank_layer_costs_2_r_in_plus_out_forward_a_token():
    """2 r (out + in) a token and layer."""
    model = reader.model("gpt2_1_5b")
    for name, (i, o) in block_sizes(model).items():
        (a, b) = flops.products(flops.factored({name: (i, o)}, 400), "gpt2")
        assert a.forward + b.forward == 2 * 400 * (i + o)


# Published runs (llm.c and its record): tokens/s of a GPU, its peak, and both MFUs, as they are
# worked out from step time and batch.
RUNS = [
    ("gpt2_127m", 524288 / 0.300 / 8, 312e12, 0.602, 0.562),
    ("gpt2_127m", 524288 / 0.140 / 8, 989e12, 0.407, 0.380),
    ("gpt2_1_5b", 1048576 / 2.75 / 8, 989e12, 0.495, 0.465),
]


@pytest.mark.parametrize(("name", "speed", "peak", "palm", "causal"), RUNS)
def test_both_conventions_of_mfu_give_what_published_runs_give(
    name: str, speed: float, peak: float, palm: float, causal: float
):
    model = reader.model(name)
    for convention, known in (("palm", palm), ("causal", causal)):
        found = speed * flops.model_flops(model, 1024, convention) / peak
        assert found == pytest.approx(known, rel=0.02), convention
    everything = flops.training(model, 1024).total
    assert flops.model_flops(model, 1024, "palm") == pytest.approx(everything, rel=1e-12), (
        "6 N + 12 L H Q T is 3 forward passes"
    )
    assert flops.model_flops(model, 1024, "causal") == pytest.approx(
        flops.training(model, 1024, causal=True).total, rel=1e-12
    )


@pytest.mark.parametrize("name", ["llama2_7b", "llama2_13b", "llama3_1_70b"])
def test_a_lora_costs_about_4_n(name: str):
    """NVIDIA's published LoRA throughputs and TFLOP/s agree with 4 N, not 6 N, a token."""
    model = reader.model(name)
    cost = flops.training(model, 4096, 8)
    assert (cost.linear + cost.head) / flops.matrix_parameters(model) == pytest.approx(4, rel=0.02)


RANKS = [
    ("gpt2_127m", True, 52, 47.1e6, 2.18),
    ("gpt2_1_5b", True, 413, 589.6e6, 2.30),
    ("gpt2_1_5b", False, 455, None, None),
]


@pytest.mark.parametrize(("name", "whole", "rank", "parameters", "bound"), RANKS)
def test_the_rank_of_a_compression_and_its_bound_are_those_of_the_formulas(
    name: str, whole: bool, rank: int, parameters: float | None, bound: float | None
):
    model = reader.model(name)
    found = flops.rank_for(model, 2.64, whole)
    assert found == rank
    sizes = flops.factored(block_sizes(model), found)
    if parameters and bound:
        dense = flops.matrix_parameters(model)
        left = model.parameters - dense + flops.matrix_parameters(model, sizes)
        assert left == pytest.approx(
            parameters, rel=0.002
        ) and model.parameters / left == pytest.approx(2.64, rel=0.002)
        speed_up = flops.forward(model, 1024).total / flops.forward(model, 1024, sizes=sizes).total
        assert speed_up == pytest.approx(bound, rel=0.01)
    weights = [
        depth(model) * sum(i * o for i, o in each.values()) for each in (block_sizes(model), sizes)
    ]
    if not whole:
        assert weights[0] / weights[1] == pytest.approx(2.64, rel=0.002)


def test_no_rank_reaches_a_compression_that_the_embeddings_alone_forbid():
    assert flops.rank_for(reader.model("gpt2_127m"), 4.0, of_model=True) == 0
