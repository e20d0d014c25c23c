"""Adapters. The laws hold for every adapter of the catalogue on every quantizer and architecture
- by default for one entry of each pair of kinds on a miniature of each family, under --slow for
the whole product. What each method has to fulfil is claimed here, not by the method: it changes
nothing at first, trains its own parameters and no other, is read back from its files bit by bit
by plain PEFT or Transformers, counts as the closed forms say, and draws from a generator of its
own."""

import copy
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model import (
    ADAPTERS,
    ALL_MINIATURES,
    CPU,
    MINIATURES,
    QUANTIZERS,
    all_logits,
    answer_log_likelihood,
    assert_close,
    broken,
    gradients,
    images,
    in_processes,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stir,
)
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.footprint import sizes
from finrepro.catalogue.spec import RunSpec
from finrepro.errors import UsageError
from finrepro.kinds import adapter_of, kind_module, kinds, optimizer_of
from finrepro.methods.adapters import bottleneck, lora, relora
from finrepro.methods.layers.linear import is_conv1d, linear_layers
from finrepro.models import build as building
from finrepro.models.build import Built, quantize
from finrepro.settings import Choice, build

IDS = tuple(random_examples(11, count=1, longest=30)[0].ids) * 3


@dataclasses.dataclass(frozen=True)
class Claims:
    """What a method has to fulfil. `count` is its closed form, from the layers' (in, out) and
    the model's own number of parameters.
    """

    quantized: bool  # goes with a quantized base
    count: Callable[[list[tuple[int, int]], int, Any], int]
    read_back: Callable[[RunSpec, Path], nn.Module] | None = (
        None  # the cell and the exported folder -> the model
    )
    refuses: frozenset[str] = frozenset()  # kinds of quantizers that it does not go with
    prepares: bool = (
        False  # starts from the weights before they are quantized: nearer to them than rounding is
    )
    nearer_logits: bool = False  # and so are the logits, not only the weights
    trains: bool = True
    entry: bool = True  # stands in the catalogue; what does not has a test file of its own
    starts_at_zero: bool = (
        False  # y = W x + s B A x with B = 0: the first gradient of A is zero, that of B is not
    )
    still: tuple[str, ...] = ("lora_A",)  # where it starts so: all that has no first gradient
    scalars: int = (
        0  # trained in each layer beside the two factors, and folded into them when exported
    )
    at_first: float = (
        0.0  # how far from its base the untrained model may be, of the length of the logits
    )
    read_back_within: float = 0.0  # the same of what is read back: what folding rounds
    draws: bool = False  # parameters of its own, in float32, from a generator of its own
    merged: Callable[[Tensor, dict[str, Tensor], Any], Tensor] | None = (
        None  # W (out, in), a layer's own tensors, settings -> W'
    )
    exports: frozenset[str] = frozenset()
    reads_weights: bool = False  # of the base, which is then to be whole
    constants: str | None = None  # in the name of what is neither trained nor the base's
    zero_stages: tuple[int, ...] = (0, 1, 2, 3)
    frozen: Callable[[list[tuple[int, int]], Any], int] = lambda _layers, _config: (
        0
    )  # numbers in the file that are not trained


def read_model(spec: RunSpec, folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    dtype = getattr(torch, spec.model.dtype)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")


def read_adapter(spec: RunSpec, folder: Path) -> nn.Module:
    import peft

    return peft.PeftModel.from_pretrained(base_of(spec), folder)


def read_bottleneck(spec: RunSpec, folder: Path) -> nn.Module:
    return bottleneck.read(base_of(spec), folder)


def read_beside_its_base(spec: RunSpec, folder: Path) -> nn.Module:
    """On the base that the first stage makes, again."""
    import peft

    made: Any = make(spec).model
    return peft.PeftModel.from_pretrained(made.unload(), folder)


def read_change(spec: RunSpec, folder: Path) -> nn.Module:
    """A change of the weights in full precision, W + s [B, -B_0] [A; A_0]. Where the base was
    quantized: q(W - s B_0 A_0) + s B A.
    """
    from safetensors.torch import load_file

    if not QUANTIZED[spec.quantizer.kind]:
        return read_adapter(spec, folder)
    settings, file = (
        json.loads((folder / "adapter_config.json").read_text()),
        load_file(folder / "adapter_model.safetensors"),
    )
    r, scale, base, trained = (
        settings["r"] // 2,
        settings["lora_alpha"] / settings["r"],
        load(spec),
        {},
    )
    for name, layer in linear_layers(base).items():
        a, b = (file[f"base_model.model.{name}.lora_{each}.weight"] for each in "AB")
        took = scale * (-b[:, r:].contiguous() @ a[r:])
        layer.weight.data -= took.T if is_conv1d(layer) else took
        trained[name] = {"lora_A": a[:r], "lora_B": b[:, :r]}
    quantize(base, spec.quantizer)
    plain = lora.plain(r, settings["lora_alpha"] // 2, "all-linear")
    return lora.apply_from(base.requires_grad_(False), plain, 0, trained, "PiSSA")


def lora_weight(weight: Tensor, own: dict[str, Tensor], config: Any) -> Tensor:
    """W + s B A (arXiv 2106.09685); s = alpha / r, or alpha / sqrt(r) (arXiv 2312.03732)."""
    scale = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return weight + scale * own["lora_B.default.weight"] @ own["lora_A.default.weight"]


def dora_weight(weight: Tensor, own: dict[str, Tensor], config: Any) -> Tensor:
    """m V / ||V||, V = W + s B A, row by row of (out, in) (arXiv 2402.09353, equation 5)."""
    direction = lora_weight(weight, own, config)
    return (
        own["lora_magnitude_vector.default.weight"][:, None]
        * direction
        / direction.norm(dim=1, keepdim=True)
    )


def vera_weight(weight: Tensor, own: dict[str, Tensor], config: Any) -> Tensor:
    """W + diag(b) B diag(d) A, of A and B the part of the layer's size (arXiv 2310.11454,
    equation 2).
    """
    a, b = own["vera_A.default"][:, : weight.shape[1]], own["vera_B.default"][: weight.shape[0]]
    assert a.shape[0] == b.shape[1] == config.r
    return (
        weight
        + torch.diag(own["vera_lambda_b.default"])
        @ b
        @ torch.diag(own["vera_lambda_d.default"])
        @ a
    )


def adalora_weight(weight: Tensor, own: dict[str, Tensor], config: Any) -> Tensor:
    """W + s P Lambda Q, s = alpha / init_r (arXiv 2303.10512, equation 3); PEFT adds 1e-5 to the
    divisor.
    """
    p, diagonal, q = (own[f"lora_{part}.default"] for part in "BEA")
    return weight + config.lora_alpha / config.init_r * p @ torch.diag(diagonal.flatten()) @ q


def pissa_weight(weight: Tensor, own: dict[str, Tensor], config: Any) -> Tensor:
    """W + s (B A - B_0 A_0): W_res + s B A (arXiv 2404.02948)."""
    change = (
        own["lora_B.default.weight"] @ own["lora_A.default.weight"]
        - own["initial_lora_B"] @ own["initial_lora_A"]
    )
    return weight + config.lora_alpha / config.r * change


def bottleneck_count(layers: list[tuple[int, int]], _whole: int, config: Any) -> int:
    """2 (2 m d + m + d) a block, and two layer norms (arXiv 1902.00751, section 2.1)."""
    width, m = layers[0][0], config.bottleneck_size
    gpt2 = (
        layers[0][1] == 3 * width
    )  # query, key and value in one: four layers a block, and norms with a bias
    norms = (4 if gpt2 else 2) * width if config.train_layer_norms else 0
    return len(layers) // (4 if gpt2 else 7) * (2 * (2 * m * width + m + width) + norms)


CLAIMS = {
    "base": Claims(quantized=True, count=lambda _layers, _whole, _config: 0, trains=False),
    "peft_folder": Claims(
        quantized=True, count=lambda _layers, _whole, _config: 0, trains=False, entry=False
    ),
    "full": Claims(
        quantized=False,
        count=lambda _layers, whole, _config: whole,
        read_back=read_model,
        exports=frozenset(["config.json", "generation_config.json", "model.safetensors"]),
    ),
    "lora": Claims(
        quantized=True,
        count=lambda layers, _whole, config: config.r * sum(i + o for i, o in layers),
        read_back=read_adapter,
        starts_at_zero=True,
        merged=lora_weight,
        draws=True,
        exports=frozenset(["adapter_config.json", "adapter_model.safetensors"]),
    ),
    "vera": Claims(
        quantized=True,
        count=lambda layers, _whole, config: sum(config.r + o for _, o in layers),
        read_back=read_adapter,
        merged=vera_weight,
        exports=frozenset(["adapter_config.json", "adapter_model.safetensors"]),
        zero_stages=(0, 1, 2),
        frozen=lambda layers, config: (
            config.r * (max(i for i, _ in layers) + max(o for _, o in layers))
        ),
    ),
}
VARIANTS = {  # methods that are settings of a kind
    "dora": dataclasses.replace(
        CLAIMS["lora"],
        count=lambda layers, _whole, config: sum(config.r * (i + o) + o for i, o in layers),
        merged=dora_weight,
        reads_weights=True,
        zero_stages=(0, 1, 2),
    ),
}
CLAIMS["iec"] = dataclasses.replace(
    CLAIMS["lora"],
    count=lambda layers, _whole, config: sum(config.r * (i + o) + 2 for i, o in layers),
    still=("lora_A", "beta_A"),
    scalars=2,
    merged=None,  # it is folded, not merged: tests/methods/adapters/test_iec.py
    read_back_within=1e-5,
)
CLAIMS["adalora"] = Claims(
    quantized=True,
    count=lambda layers, _whole, config: config.init_r * sum(i + o + 1 for i, o in layers),
    read_back=read_adapter,
    merged=adalora_weight,
    draws=True,
    constants="ranknum",  # init_r, by which PEFT divides
    exports=frozenset(["adapter_config.json", "adapter_model.safetensors"]),
)
CLAIMS["bottleneck"] = Claims(
    quantized=True,
    count=bottleneck_count,
    read_back=read_bottleneck,
    at_first=1e-3,
    draws=True,
    exports=frozenset(["bottleneck.json", "bottleneck.safetensors"]),
)
CLAIMS["pissa"] = Claims(
    quantized=True,
    count=CLAIMS["lora"].count,
    read_back=read_change,
    prepares=True,
    still=(),
    at_first=1e-5,
    read_back_within=1e-5,
    merged=pissa_weight,
    exports=CLAIMS["lora"].exports,
    frozen=lambda layers, config: config.r * sum(i + o for i, o in layers),
)
CLAIMS["loftq"] = Claims(
    quantized=True,
    refuses=frozenset(["none", "bnb_int8"]),
    count=CLAIMS["lora"].count,
    read_back=read_beside_its_base,
    prepares=True,
    nearer_logits=True,
    still=(),
    exports=CLAIMS["lora"].exports,
)
CLAIMS["rosa"] = Claims(
    quantized=False,
    count=CLAIMS["lora"].count,
    read_back=read_adapter,
    at_first=1e-5,  # it splits W, and sums the parts
    read_back_within=1e-5,
    draws=True,
    exports=CLAIMS["lora"].exports,
    frozen=lambda layers, config: (
        config.r * sum(i + o for i, o in layers)
    ),  # the factors that it began with
)
CLAIMS["relora"] = Claims(
    quantized=False,
    count=lambda layers, whole, config: (
        whole + sum(relora.rank_of(config, i, o) * (i + o) - i * o for i, o in layers)
    ),
    read_back=read_model,
    read_back_within=1e-5,  # it sums W and B A
    starts_at_zero=True,
    exports=CLAIMS["full"].exports,
    frozen=lambda layers, config: sum(
        i * o - relora.rank_of(config, i, o) * (i + o) for i, o in layers
    ),
)
QUANTIZED = {
    "none": False,
    "bnb_4bit": True,
    "bnb_int8": True,
    "icq": True,
}  # whether a kind rounds the weights
KEPT_APART = ("icq",)  # kinds that keep a part of the weight beside it
ACTIVATION_STEP = (
    20  # a small change of an activation that is rounded to 8 bits becomes a whole step, or nothing
)


def unclaimed(found: Iterable[str], claimed: Iterable[str]) -> set[str]:
    """Kinds that nobody has said what to demand of, and claims without a kind."""
    assert tuple(found), "no kind is discovered"
    return set(found) ^ set(claimed)


def test_every_discovered_kind_has_its_claims_and_an_entry() -> None:
    assert not unclaimed(kinds("adapters"), CLAIMS)
    assert not unclaimed(kinds("quantizers"), QUANTIZED)
    assert {method(reader.adapter(name)) for name in ADAPTERS} == {
        kind for kind, claims in (CLAIMS | VARIANTS).items() if claims.entry
    }
    assert {reader.quantizer(name, "float32").kind for name in QUANTIZERS} == set(QUANTIZED)
    assert unclaimed([*kinds("adapters"), "brand_new"], CLAIMS) == {"brand_new"}
    broken(unclaimed, (), CLAIMS)


def method(adapter: Choice) -> str:
    """Whose claims hold for an entry: its kind's, or those of a variant that its settings
    choose.
    """
    return "dora" if getattr(adapter.config, "use_dora", False) else adapter.kind


def claims_of(adapter: str | Choice) -> Claims:
    return (CLAIMS | VARIANTS)[
        method(reader.adapter(adapter) if isinstance(adapter, str) else adapter)
    ]


def legal(adapter: str, quantizer: str) -> bool:
    kind = reader.quantizer(quantizer, "float32").kind
    if (claims_of(adapter).reads_weights and kind in KEPT_APART) or kind in claims_of(
        adapter
    ).refuses:
        return False
    return claims_of(adapter).quantized or not QUANTIZED[kind]


def kinds_of(adapter: str, quantizer: str) -> tuple[str, str]:
    return method(reader.adapter(adapter)), reader.quantizer(quantizer, "float32").kind


PAIRS = [pair for pair in itertools.product(ADAPTERS, QUANTIZERS) if legal(*pair)]
FIRST = {
    kinds_of(*pair): pair for pair in reversed(PAIRS)
}  # the first legal pair of each pair of kinds: run by default


# Of the miniatures that repeat a family, these alone are tried: their widths are what differs.
EVERYWHERE = [("lora_r8", "none"), ("lora_r8", "nf4")]
REPEATING = (
    "loftq",
)  # methods that decompose a weight five times before they begin: one family by default
SEARCHING = {
    ("loftq", "icq")
}  # pairs of kinds that search five times a layer before they begin: slow


def by_default(name: str, pair: tuple[str, str]) -> bool:
    """One entry of each pair of kinds but those that search, on both families where the base is
    plain or in 4 bits, else on Llama's.
    """
    both = kinds_of(*pair)[1] in ("none", "bnb_4bit") and kinds_of(*pair)[0] not in REPEATING
    return (
        pair in FIRST.values()
        and kinds_of(*pair) not in SEARCHING
        and (both or name == MINIATURES[1])
    )


def families_of(pair: tuple[str, str]) -> tuple[str, ...]:
    """The miniatures that a pair is tried on: one of each family; of a method that repeats
    itself, only its first pair.
    """
    if kinds_of(*pair) in SEARCHING or (
        kinds_of(*pair)[0] in REPEATING and pair not in FIRST.values()
    ):
        return MINIATURES[1:]
    return ALL_MINIATURES if pair in EVERYWHERE else MINIATURES


def over(pairs: Iterable[tuple[str, str]]) -> Any:
    """Parameters `name`, `adapter`, `quantizer`: every pair on a miniature of each family; most
    of it is slow.
    """
    return pytest.mark.parametrize(
        ("name", "adapter", "quantizer"),
        [
            pytest.param(name, *pair, marks=() if by_default(name, pair) else pytest.mark.slow)
            for pair in pairs
            for name in families_of(pair)
        ],
    )


every_pair = over(PAIRS)
training = over(pair for pair in PAIRS if claims_of(pair[0]).trains)
resting = over(pair for pair in PAIRS if not claims_of(pair[0]).trains)
starting_at_zero = over(pair for pair in PAIRS if claims_of(pair[0]).starts_at_zero)
in_factors = over(
    pair for pair in PAIRS if claims_of(pair[0]).starts_at_zero or claims_of(pair[0]).prepares
)
in_float32 = over(pair for pair in PAIRS if claims_of(pair[0]).draws or claims_of(pair[0]).prepares)
drawing = over(pair for pair in PAIRS if claims_of(pair[0]).draws)
merging = over(pair for pair in PAIRS if claims_of(pair[0]).merged and pair[1] == "none")


def test_what_runs_by_default_represents_every_family_and_every_pair_of_kinds() -> None:
    families = [
        {reader.model(name).family for name in names} for names in (MINIATURES, ALL_MINIATURES)
    ]
    assert set(MINIATURES) <= set(ALL_MINIATURES) and families[0] == families[1]
    assert FIRST.keys() == {kinds_of(*pair) for pair in PAIRS}
    claimed = (CLAIMS | VARIANTS).values()
    goes_with = [
        len(QUANTIZED) - len(KEPT_APART) * claims.reads_weights - len(claims.refuses)
        if claims.quantized
        else 1
        for claims in claimed
        if claims.entry
    ]
    assert len(FIRST) == sum(goes_with)
    assert {reader.model(name).miniature_of for name in ALL_MINIATURES} == set(LORA_COUNTS)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_an_adapter_refuses_is_what_is_claimed(adapter: str, quantizer: str) -> None:
    spec = spec_of(MINIATURES[0], adapter, quantizer)
    supports = kind_module("adapters", spec.adapter.kind).supports
    for stage in (0, 1, 2, 3):
        reason = supports(spec.model, spec.quantizer, stage, spec.adapter.config)
        divided = stage in claims_of(adapter).zero_stages
        assert (reason is None) is (legal(adapter, quantizer) and divided)
        assert (
            reason is None
            or (f"ZeRO-{stage}" if legal(adapter, quantizer) else quantizer) in reason
        )


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapters_settings_are_all_spelled_out(adapter: str) -> None:
    choice = reader.adapter(adapter)
    fields = dataclasses.fields(choice.config)
    assert all(field.default is field.default_factory is dataclasses.MISSING for field in fields)
    with pytest.raises(UsageError, match="rank"):
        build(type(choice.config), {**dataclasses.asdict(choice.config), "rank": 3}, "adapters.x")


KEPT: dict[
    str, Any
] = {}  # what decides its bits -> what was built of it: a dozen laws build each pair's model


def kept(decided_by: Any, made: Callable[[], Any]) -> Any:
    """A copy, to be changed at will, of what is built once."""
    key = repr(decided_by)
    if key not in KEPT:
        KEPT[key] = made()
    return copy.deepcopy(KEPT[key])


def make(spec: RunSpec) -> Built:
    """The cell's model, as a run builds it."""
    built: Built = kept(spec, lambda: building.build(spec, None, CPU))
    return built


def load(spec: RunSpec) -> Any:
    """The cell's base in full precision."""
    return kept((spec.model, spec.seed), lambda: building.load(spec, None))


def base_of(spec: RunSpec) -> Any:
    """The cell's base, quantized, before any adapter."""

    def quantized() -> Any:
        model = load(spec)
        quantize(model, spec.quantizer)
        return model.to(CPU).requires_grad_(False).train()

    return kept((spec.model, spec.seed, spec.quantizer), quantized)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return all_logits(model, IDS)


def nothing_changes_at_first(model: nn.Module, base: nn.Module, within: float) -> None:
    """The adapted model computes what its base computes: bit by bit, or as nearly as is claimed."""
    if within:
        assert_close(logits(model), logits(base), within)
    else:
        assert torch.equal(logits(model), logits(base))


@torch.no_grad()
def weight_of(layer: Any) -> Tensor:
    """The matrix (in, out) that a layer multiplies with, whatever its class, with its adapter:
    what it makes of unit vectors.
    """
    base = getattr(layer, "base_layer", layer)
    outputs: Tensor = layer(torch.eye(base.nx if is_conv1d(base) else base.in_features))
    return outputs - (0 if base.bias is None else base.bias)


def is_nearer(model: nn.Module, rounded: nn.Module, dense: nn.Module, logits_too: bool) -> None:
    """Every weight of the adapted model is nearer to the one in full precision than the rounded
    one is; the logits too.
    """
    for name, layer in linear_layers(dense).items():
        truth, ours = weight_of(layer), weight_of(model.get_submodule(f"base_model.model.{name}"))
        assert (ours - truth).norm() < 0.99 * (
            weight_of(rounded.get_submodule(name)) - truth
        ).norm(), name
    if logits_too:
        truth = logits(dense)
        assert (logits(model) - truth).norm() < (logits(rounded) - truth).norm()


preparing = over(
    pair for pair in PAIRS if claims_of(pair[0]).prepares and QUANTIZED[kinds_of(*pair)[1]]
)


@preparing
def test_at_initialisation_what_was_prepared_is_nearer_to_full_precision_than_rounding(
    name: str, adapter: str, quantizer: str
) -> None:
    spec, too = spec_of(name, adapter, quantizer), claims_of(adapter).nearer_logits
    model, rounded, dense = make(spec).model, base_of(spec), load(spec)
    is_nearer(model, rounded, dense, too)
    broken(is_nearer, stir(model), rounded, dense, too)
    forgotten = make(
        spec_of(name, "lora_r8", quantizer)
    ).model  # its base has not been through a first stage
    broken(is_nearer, forgotten, rounded, dense, too)


@over(pair for pair in PAIRS if not (claims_of(pair[0]).prepares and QUANTIZED[kinds_of(*pair)[1]]))
def test_at_initialisation_the_model_equals_its_base(
    name: str, adapter: str, quantizer: str
) -> None:
    spec = spec_of(name, adapter, quantizer)
    model = make(spec).model
    within = claims_of(adapter).at_first * (
        ACTIVATION_STEP if spec.quantizer.kind == "bnb_int8" else 1
    )
    nothing_changes_at_first(model, base_of(spec), within)
    if claims_of(adapter).trains:
        broken(nothing_changes_at_first, stir(model), base_of(spec), within)


def layer_sizes(model: nn.Module) -> list[tuple[int, int]]:
    return [
        (layer.nx, layer.nf) if is_conv1d(layer) else (layer.in_features, layer.out_features)
        for layer in linear_layers(model).values()
    ]


def count_is_the_closed_form(model: nn.Module, spec: RunSpec, reported: int) -> None:
    """As many trainable parameters as the method's formula gives for the layers of the blocks,
    and as the build reports.
    """
    plain = load(dataclasses.replace(spec, quantizer=reader.quantizer("none", spec.model.dtype)))
    whole = sum(parameter.numel() for parameter in plain.parameters())
    expected = claims_of(spec.adapter).count(layer_sizes(plain), whole, spec.adapter.config)
    trainable = sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    assert trainable == reported == expected


@every_pair
def test_trainable_parameters_are_counted_by_the_closed_form(
    name: str, adapter: str, quantizer: str
) -> None:
    spec = spec_of(name, adapter, quantizer)
    built = make(spec)
    count_is_the_closed_form(built.model, spec, built.trainable_parameters)
    whole = sum(parameter.numel() for parameter in load(spec_of(name)).parameters())
    assert built.trainable_parameters == kind_module(
        "adapters", spec.adapter.kind
    ).trainable_parameters(dataclasses.replace(spec.model, parameters=whole), spec.adapter.config)
    parameter = next(each for each in built.model.parameters() if each.is_floating_point())
    parameter.requires_grad_(not parameter.requires_grad)
    broken(count_is_the_closed_form, built.model, spec, built.trainable_parameters)


# Adapted modules, LoRA parameters a unit of rank, and what DoRA adds
LORA_COUNTS = {
    "gpt2_127m": (48, 147_456, 82_944),
    "gpt2_1_5b": (192, 1_228_800, 691_200),
    "llama2_7b": (224, 2_498_560, 1_359_872),
    "llama2_13b": (280, 3_911_680, 2_129_920),
    "llama3_1_8b": (224, 2_621_440, 1_376_256),
    "llama3_1_70b": (560, 12_943_360, 6_717_440),
}


@pytest.mark.parametrize(
    "adapter",
    [name for name in ADAPTERS if claims_of(name).starts_at_zero and claims_of(name).draws],
)
@pytest.mark.parametrize("name", LORA_COUNTS)
def test_low_rank_factors_on_the_real_models_count_as_in_the_table(name: str, adapter: str) -> None:
    from transformers import AutoModelForCausalLM

    from finrepro.models.build import configuration

    choice = reader.adapter(adapter)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration(reader.model(name)))
        adapted = adapter_of(choice).apply(model, 0)
    modules, per_rank, magnitudes = LORA_COUNTS[name]
    trained = [p for p in adapted.parameters() if p.requires_grad]
    expected = choice.config.r * per_rank + claims_of(adapter).scalars * modules
    expected += magnitudes if getattr(choice.config, "use_dora", False) else 0
    assert (sum(p.ndim == 2 for p in trained), sum(p.numel() for p in trained)) == (
        2 * modules,
        expected,
    )
    assert (
        kind_module("adapters", choice.kind).trainable_parameters(reader.model(name), choice.config)
        == expected
    )


def descend(
    model: nn.Module, spec: RunSpec, steps: int = 3, watch: Iterable[nn.Parameter] | None = None
) -> None:
    """A few optimizer steps over `watch`, by default what is trainable."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if watch is not None:
        named = [(str(i), p) for i, p in enumerate(watch)]
    optimizer = optimizer_of(spec.train.optimizer).build(named, 1e-2)
    for step in range(steps):
        loss = -torch.stack(
            [answer_log_likelihood(model, example) for example in random_examples(step, count=3)]
        ).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def only_its_parameters_move(
    model: nn.Module, spec: RunSpec, train: Callable[[nn.Module, RunSpec], None]
) -> None:
    """After training every trainable tensor is another, and every other tensor is the same, bit
    by bit.
    """
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    before = images(tensors)
    train(model, spec)
    after = images([*model.named_parameters(), *model.named_buffers()])
    assert before.keys() == after.keys()
    moved = {name for name in before if before[name] != after[name]}
    assert moved == trainable
    assert all(p.grad is None for n, p in model.named_parameters() if n not in trainable)


def freeing_a_norm(model: nn.Module, spec: RunSpec) -> None:
    """A mutant: training moves a tensor that is not the adapter's."""
    descend(model, spec)
    with torch.no_grad():
        next(p for p in model.parameters() if not p.requires_grad and p.is_floating_point()).add_(
            1e-3
        )


@training
def test_only_the_adapters_parameters_are_trained_and_nothing_else_changes_a_bit(
    name: str, adapter: str, quantizer: str
) -> None:
    spec = spec_of(name, adapter, quantizer)
    model = make(spec).model
    only_its_parameters_move(model, spec, descend)
    broken(only_its_parameters_move, model, spec, lambda *_: None)
    if adapter != "full":
        broken(only_its_parameters_move, model, spec, freeing_a_norm)


@resting
def test_what_trains_nothing_exports_nothing_and_frees_nothing(
    name: str, adapter: str, quantizer: str, tmp_path: Path
) -> None:
    spec = spec_of(name, adapter, quantizer)
    built = make(spec)
    assert built.trainable_parameters == 0 and not any(
        p.requires_grad for p in built.model.parameters()
    )
    assert {
        path.name for path in exported(built.model, spec, tmp_path / "weights").iterdir()
    } == claims_of(adapter).exports


@training
def test_only_the_adapters_parameters_get_gradients(
    name: str, adapter: str, quantizer: str
) -> None:
    model = stir(make(spec_of(name, adapter, quantizer)).model)
    answer_log_likelihood(model, random_examples(0, count=1)[0]).backward()
    for each, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, each
        else:
            assert parameter.grad is None, each


def exported(model: nn.Module, spec: RunSpec, folder: Path) -> Path:
    folder.mkdir()
    adapter_of(spec.adapter).export(model, folder)
    return folder


def is_read_back(model: nn.Module, spec: RunSpec, folder: Path) -> None:
    """The model made of the exported files on an untouched base computes the same: bit by bit,
    or up to the rounding that is claimed.
    """
    claims = claims_of(spec.adapter)
    assert claims.read_back is not None
    again = logits(claims.read_back(spec, folder).eval())
    if claims.read_back_within:
        assert_close(again, logits(model), claims.read_back_within)
    else:
        assert torch.equal(again, logits(model))


@training
def test_what_is_exported_is_read_back(
    name: str, adapter: str, quantizer: str, tmp_path: Path
) -> None:
    spec = spec_of(name, adapter, quantizer)
    model = make(spec).model
    descend(model, spec)
    folder = exported(model, spec, tmp_path / "weights")
    assert {path.name for path in folder.iterdir()} == claims_of(adapter).exports
    is_read_back(model.eval(), spec, folder)
    descend(model.train(), spec, steps=1)
    broken(is_read_back, model.eval(), spec, folder)  # files of an earlier step


def file_holds_only_the_adapter(folder: Path, numbers: int) -> None:
    """The tensors of the exported file are as many numbers as were trained, with what the method
    says that it needs beside.
    """
    from safetensors.torch import load_file

    sizes = [
        tensor.numel()
        for path in folder.glob("*.safetensors")
        for tensor in load_file(path).values()
    ]
    assert sum(sizes) == numbers


@training
def test_the_exported_file_holds_what_was_trained_and_no_more(
    name: str, adapter: str, quantizer: str, tmp_path: Path
) -> None:
    spec = spec_of(name, adapter, quantizer)
    built = make(spec)
    folder = exported(built.model, spec, tmp_path / "weights")
    plain = load(spec)
    claims, layers = claims_of(adapter), linear_layers(plain)
    written = built.trainable_parameters - claims.scalars * len(layers)
    written += claims.frozen(layer_sizes(plain), spec.adapter.config)
    if claims.read_back is not read_model:  # whose size is the model's own
        counted = sizes(spec_of(name, adapter, quantizer, max_steps=1))
        assert (
            counted["trained_file_bytes"] == 4 * written
            and counted["trainable_params"] == built.trainable_parameters
        )
    file_holds_only_the_adapter(folder, written)
    broken(file_holds_only_the_adapter, folder, written + 1)


def merged_equals_unmerged(model: Any) -> None:
    """Folded into the base's own layers the adapter computes what it computed beside them."""
    model.eval()
    before = logits(model)
    assert_close(logits(model.merge_and_unload()), before)


@merging
def test_merged_equals_unmerged(name: str, adapter: str, quantizer: str) -> None:
    spec = spec_of(name, adapter, quantizer)
    merged_equals_unmerged(stir(make(spec).model))
    mutant: Any = stir(make(spec).model)
    with torch.no_grad():
        next(each for each in mutant.parameters() if each.requires_grad).mul_(1.01)
    reference = logits(stir(make(spec).model))
    with pytest.raises(AssertionError):
        assert_close(logits(mutant.merge_and_unload()), reference)


def merged_weight_is_the_methods(
    merged: nn.Module, model: Any, base: nn.Module, spec: RunSpec
) -> None:
    """W' is what the method's definition says, in whichever orientation the layer stores W."""
    formula = claims_of(spec.adapter).merged
    assert formula is not None
    old, new = linear_layers(base), linear_layers(merged)
    assert old.keys() == new.keys()
    for name in old:
        layer = model.get_submodule(f"base_model.model.{name}")
        own = {n: each.detach() for n, each in [*layer.named_parameters(), *layer.named_buffers()]}
        before, after = (
            each[name].weight.T if is_conv1d(each[name]) else each[name].weight
            for each in (old, new)
        )
        assert_close(
            after - before, formula(before, own, spec.adapter.config) - before, 1e-4, what=name
        )


@merging
def test_the_merged_weight_is_what_the_methods_definition_says(
    name: str, adapter: str, quantizer: str
) -> None:
    spec = spec_of(name, adapter, quantizer)
    model = stir(make(spec).model)
    merged = copy.deepcopy(model).merge_and_unload()  # type: ignore[operator]
    base = load(spec)
    merged_weight_is_the_methods(merged, model, base, spec)
    broken(merged_weight_is_the_methods, merged, stir(model, seed=2), base, spec)


def only_what_reads_a_has_a_first_gradient(model: nn.Module, still: tuple[str, ...]) -> None:
    """B = 0 at first, so grad A = s B^T ... = 0, and so of whatever else acts through B, while
    grad B is not.
    """
    answer_log_likelihood(model, random_examples(0, count=1)[0]).backward()
    for name, slope in gradients(model).items():
        assert bool(slope.any()) is not any(part in name for part in still), name


@in_factors
def test_at_the_first_step_a_has_no_gradient_where_b_is_zero_and_b_has(
    name: str, adapter: str, quantizer: str
) -> None:
    still = claims_of(adapter).still
    only_what_reads_a_has_a_first_gradient(make(spec_of(name, adapter, quantizer)).model, still)
    mutant = stir(make(spec_of(name, adapter, quantizer)).model)
    with torch.no_grad():
        for each, parameter in mutant.named_parameters():
            if "lora_B" in each and not still:
                parameter.zero_()
    broken(only_what_reads_a_has_a_first_gradient, mutant, still)


def a_is_uniform_within_its_bound(model: nn.Module) -> None:
    """B = 0 and A ~ U(-1/sqrt(in), 1/sqrt(in)): within the bound, and near it, with the standard
    deviation 1/sqrt(3 in).
    """
    named = dict(model.named_parameters())
    drawn = [p * p.shape[1] ** 0.5 for name, p in named.items() if "lora_A" in name]
    values = torch.cat([each.detach().flatten() for each in drawn])
    assert len(values) > 2000
    assert 0.99 < values.abs().max() <= 1
    assert abs(float(values.std()) * 3**0.5 - 1) < 0.04  # five standard errors of the smallest
    assert all(not p.any() for name, p in named.items() if "lora_B" in name)


@starting_at_zero
def test_a_is_drawn_within_one_over_root_in(name: str, adapter: str, quantizer: str) -> None:
    model = make(spec_of(name, adapter, quantizer)).model
    a_is_uniform_within_its_bound(model)
    with torch.no_grad():
        for each, parameter in model.named_parameters():
            if "lora_A" in each:
                parameter.mul_(1.1)
    broken(a_is_uniform_within_its_bound, model)


@in_float32
def test_adapter_weights_are_float32_whatever_the_base(
    name: str, adapter: str, quantizer: str
) -> None:
    half = dataclasses.replace(spec_of(name).model, dtype="bfloat16")
    built = make(spec_of(half, adapter, quantizer))
    assert {p.dtype for p in built.model.parameters() if p.requires_grad} == {torch.float32}
    constants = claims_of(adapter).constants
    frozen = {
        n: p
        for n, p in built.model.named_parameters()
        if not (p.requires_grad or (constants and constants in n))
    }
    assert {p.dtype for p in frozen.values()} <= {torch.bfloat16, torch.uint8, torch.int8}


def draws_from_its_own_generator(apply: Callable[[int], nn.Module]) -> None:
    """The same seed gives the same adapter whatever was drawn before, another seed another, and
    the global generator is untouched.
    """
    state = torch.get_rng_state()
    first = apply(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = apply(0), apply(1)
    trainable = [
        {n: p for n, p in model.named_parameters() if p.requires_grad}
        for model in (first, again, other)
    ]
    assert (
        images(trainable[0].items()) == images(trainable[1].items()) != images(trainable[2].items())
    )


@drawing
def test_an_adapter_draws_from_a_generator_of_its_own(
    name: str, adapter: str, quantizer: str
) -> None:
    spec = spec_of(name, adapter, quantizer)
    method = kind_module("adapters", spec.adapter.kind)
    draws_from_its_own_generator(
        lambda seed: method.apply(base_of(spec), spec.adapter.config, seed)
    )

    def shared(seed: int) -> nn.Module:
        import peft

        names = list(linear_layers(base_of(spec)))
        torch.manual_seed(seed)
        return peft.get_peft_model(
            base_of(spec), peft.LoraConfig(r=8, target_modules=names, fan_in_fan_out=False)
        )

    if not any(is_conv1d(layer) for layer in linear_layers(base_of(spec)).values()):
        broken(draws_from_its_own_generator, shared)


@in_factors
def test_all_linear_means_every_linear_layer_of_the_blocks_conv1d_too(
    name: str, adapter: str, quantizer: str
) -> None:
    spec = spec_of(name, adapter, quantizer)
    wanted = set(linear_layers(load(spec)))
    if spec.model.family == "gpt2":
        assert all(is_conv1d(layer) for layer in linear_layers(load(spec)).values())
    model: Any = make(spec).model
    hit = {
        n.removeprefix("base_model.model.")
        for n, module in model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert hit == wanted
    assert len(hit) == {"gpt2": 4, "llama": 7}[spec.model.family] * model.config.num_hidden_layers


def lora_on(name: str, targets: tuple[str, ...]) -> nn.Module:
    spec = spec_of(name, "lora_r8")
    config = dataclasses.replace(spec.adapter.config, target_modules=targets)
    return make(
        dataclasses.replace(spec, adapter=Choice(name="lora", kind="lora", config=config))
    ).model


def test_named_layers_alone_are_adapted_and_no_match_is_an_error() -> None:
    (gpt2,) = [name for name in MINIATURES if reader.model(name).family == "gpt2"][:1]
    model = lora_on(gpt2, ("c_attn",))
    assert {
        n.rsplit(".", 1)[-1] for n, module in model.named_modules() if hasattr(module, "lora_A")
    } == {"c_attn"}
    with pytest.raises(ValueError, match=r"named q_proj, v_proj; there are c_attn, c_fc, c_proj$"):
        lora_on(gpt2, ("q_proj", "v_proj"))
    with pytest.raises(ValueError, match="named c_proy"):
        lora_on(gpt2, ("c_attn", "c_proy"))
    with pytest.raises(ValueError, match="no linear layer"):
        lora_on(gpt2, ("lm_head",))


EXPORT = """
import json
import sys
from pathlib import Path
from fixtures.model import MINIATURES, make, spec_of, stir
from finrepro.kinds import adapter_of
from finrepro.runtime import process as runtime
runtime.quiet_environment()
runtime.setup(0, 2)
from finrepro.models.build import load
root = Path(sys.argv[1])
for name in MINIATURES:
    base = root / f"base of {name}"
    load(spec_of(name), None).save_pretrained(base)
    for adapter, quantizer in json.loads(sys.argv[2]):
        spec = spec_of(name, adapter, quantizer)
        folder = root / "weights" / spec.label
        folder.mkdir(parents=True)
        adapter_of(spec.adapter).export(stir(make(spec, base).model), folder)
"""


def files_are_the_same(one: Path, two: Path) -> None:
    """The same names with the same bytes."""
    first, second = (
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (one, two)
    )
    assert first == second != {}


def no_file_names(root: Path, what: str) -> None:
    """No file holds the text."""
    assert not [
        path for path in root.rglob("*") if path.is_file() and what.encode() in path.read_bytes()
    ]


@pytest.mark.parametrize("kinds", [("lora",), pytest.param((), marks=pytest.mark.slow)])
def test_exported_files_are_the_same_in_every_process_and_name_no_place_on_the_machine(
    tmp_path: Path, kinds: tuple[str, ...]
) -> None:
    places = [tmp_path / "here", tmp_path / "elsewhere"]
    for place in places:
        place.mkdir()
    # Every method (or those of `kinds`) beside a base that is not rounded, and beside one in 4
    # bits: beside another it writes by the same code.
    pairs = [
        pair
        for kind, pair in FIRST.items()
        if claims_of(pair[0]).trains
        and kind[1] in ("none", "bnb_4bit")
        and kind[0] in (kinds or kind)
    ]
    in_processes(EXPORT, [(str(place), json.dumps(pairs)) for place in places], ["0", "31337"])
    weights = [place / "weights" for place in places]
    assert len(list(weights[0].iterdir())) == len(MINIATURES) * len(pairs)
    files_are_the_same(*weights)
    for root in weights:
        for secret in (str(tmp_path), str(Path.home()), "/tmp"):
            no_file_names(root, secret)
    for path in weights[0].rglob("adapter_config.json"):
        values = json.loads(path.read_text())
        assert values["base_model_name_or_path"] == path.parent.name.split("-")[0]
        assert values["target_modules"] == sorted(values["target_modules"])
    mutant = next(weights[1].rglob("*.json"))
    mutant.write_text(mutant.read_text() + f"\n{tmp_path}")
    broken(files_are_the_same, *weights)
    broken(no_file_names, weights[1], str(tmp_path))
