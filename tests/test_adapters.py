"""Adapters. The laws hold for every adapter of the catalogue on every quantizer and architecture - by default for one entry of each pair of
kinds on a miniature of each family, under --slow for the whole product. What each method has to fulfil is claimed here, not by the
method: it changes nothing at first, trains its own parameters and no other, is read back from its files bit by bit by plain PEFT or
Transformers, counts as the closed forms say, and draws from a generator of its own."""

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures_model import (
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
    make,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stir,
)
from torch import Tensor, nn

from finrepro import catalogue
from finrepro.errors import UsageError
from finrepro.layers.linear import is_conv1d, linear_layers
from finrepro.model import load, quantize
from finrepro.schema import Choice, build, kinds
from finrepro.spec import RunSpec

IDS = tuple(random_examples(11, count=1, longest=30)[0].ids) * 3


@dataclasses.dataclass(frozen=True)
class Claims:
    """What a method has to fulfil. `count` is its closed form, from the layers' (in, out) and the model's own number of parameters."""

    quantized: bool  # goes with a quantized base
    count: Callable[[list[tuple[int, int]], int, Any], int]
    read_back: Callable[[Any, Path], nn.Module] | None = None  # an untouched base and the exported folder -> the model
    trains: bool = True
    entry: bool = True  # stands in the catalogue; what does not has a test file of its own
    starts_at_zero: bool = False  # y = W x + s B A x with B = 0: the first gradient of A is zero, that of B is not
    merges: bool = False
    exports: frozenset[str] = frozenset()


def read_model(base: Any, folder: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=base.dtype, attn_implementation="sdpa")


def read_adapter(base: Any, folder: Path) -> nn.Module:
    import peft

    return peft.PeftModel.from_pretrained(base, folder)


CLAIMS = {
    "base": Claims(quantized=True, count=lambda _layers, _whole, _config: 0, trains=False),
    "peft_folder": Claims(quantized=True, count=lambda _layers, _whole, _config: 0, trains=False, entry=False),
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
        merges=True,
        exports=frozenset(["adapter_config.json", "adapter_model.safetensors"]),
    ),
}
QUANTIZED = {"none": False, "bnb_4bit": True, "bnb_int8": True, "icq": True}  # whether a kind rounds the weights


def unclaimed(found: Iterable[str], claimed: Iterable[str]) -> set[str]:
    """Kinds that nobody has said what to demand of, and claims without a kind."""
    assert tuple(found), "no kind is discovered"
    return set(found) ^ set(claimed)


def test_every_discovered_kind_has_its_claims_and_an_entry() -> None:
    assert not unclaimed(kinds("adapters"), CLAIMS)
    assert not unclaimed(kinds("quantizers"), QUANTIZED)
    assert {catalogue.adapter(name).kind for name in ADAPTERS} == {
        kind for kind, claims in CLAIMS.items() if claims.entry
    }
    assert {catalogue.quantizer(name, "float32").kind for name in QUANTIZERS} == set(QUANTIZED)
    assert unclaimed([*kinds("adapters"), "brand_new"], CLAIMS) == {"brand_new"}
    broken(unclaimed, (), CLAIMS)


def claims_of(adapter: str) -> Claims:
    return CLAIMS[catalogue.adapter(adapter).kind]


def legal(adapter: str, quantizer: str) -> bool:
    return claims_of(adapter).quantized or not QUANTIZED[catalogue.quantizer(quantizer, "float32").kind]


def kinds_of(adapter: str, quantizer: str) -> tuple[str, str]:
    return catalogue.adapter(adapter).kind, catalogue.quantizer(quantizer, "float32").kind


PAIRS = [pair for pair in itertools.product(ADAPTERS, QUANTIZERS) if legal(*pair)]
FIRST = {
    kinds_of(*pair): pair for pair in reversed(PAIRS)
}  # the first legal pair of each pair of kinds: run by default


def over(pairs: Iterable[tuple[str, str]]) -> Any:
    """Parameters `name`, `adapter`, `quantizer` over every miniature; all but the representative ones are slow."""
    return pytest.mark.parametrize(
        ("name", "adapter", "quantizer"),
        [
            pytest.param(name, *pair, marks=() if name in MINIATURES and pair in FIRST.values() else pytest.mark.slow)
            for name in ALL_MINIATURES
            for pair in pairs
        ],
    )


every_pair = over(PAIRS)
training = over(pair for pair in PAIRS if claims_of(pair[0]).trains)
resting = over(pair for pair in PAIRS if not claims_of(pair[0]).trains)
starting_at_zero = over(pair for pair in PAIRS if claims_of(pair[0]).starts_at_zero)
merging = over(pair for pair in PAIRS if claims_of(pair[0]).merges and pair[1] == "none")


def test_what_runs_by_default_represents_every_family_and_every_pair_of_kinds() -> None:
    families = [{catalogue.model(name).family for name in names} for names in (MINIATURES, ALL_MINIATURES)]
    assert set(MINIATURES) <= set(ALL_MINIATURES) and families[0] == families[1]
    assert FIRST.keys() == {kinds_of(*pair) for pair in PAIRS}
    assert len(FIRST) == sum(len(QUANTIZED) if claims.quantized else 1 for claims in CLAIMS.values() if claims.entry)
    assert {catalogue.model(name).miniature_of for name in ALL_MINIATURES} == set(LORA_COUNTS)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("adapter", ADAPTERS)
def test_what_an_adapter_refuses_is_what_is_claimed(adapter: str, quantizer: str) -> None:
    spec = spec_of(MINIATURES[0], adapter, quantizer)
    supports = spec.adapter.module("adapters").supports
    reasons = [supports(spec.model, spec.quantizer, stage, spec.adapter.config) for stage in (0, 1, 2, 3)]
    assert all((reason is None) is legal(adapter, quantizer) for reason in reasons)
    assert legal(adapter, quantizer) or all(quantizer in reason for reason in reasons)


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_an_adapters_settings_are_all_spelled_out(adapter: str) -> None:
    choice = catalogue.adapter(adapter)
    fields = dataclasses.fields(choice.config)
    assert all(field.default is field.default_factory is dataclasses.MISSING for field in fields)
    with pytest.raises(UsageError, match="rank"):
        build(type(choice.config), {**dataclasses.asdict(choice.config), "rank": 3}, "adapters.x")


def base_of(spec: RunSpec) -> Any:
    """The cell's base, quantized, before any adapter."""
    model = load(spec, None)
    quantize(model, spec.quantizer)
    return model.to(CPU).requires_grad_(False).train()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return all_logits(model, IDS)


def nothing_changes_at_first(model: nn.Module, base: nn.Module) -> None:
    """The adapted model computes what its base computes, bit by bit."""
    assert torch.equal(logits(model), logits(base))


@every_pair
def test_at_initialisation_the_model_equals_its_base(name: str, adapter: str, quantizer: str) -> None:
    spec = spec_of(name, adapter, quantizer)
    model = make(spec).model
    nothing_changes_at_first(model, base_of(spec))
    if claims_of(adapter).trains:
        broken(nothing_changes_at_first, stir(model), base_of(spec))


def layer_sizes(model: nn.Module) -> list[tuple[int, int]]:
    return [
        (layer.nx, layer.nf) if is_conv1d(layer) else (layer.in_features, layer.out_features)
        for layer in linear_layers(model).values()
    ]


def count_is_the_closed_form(model: nn.Module, spec: RunSpec, reported: int) -> None:
    """As many trainable parameters as the method's formula gives for the layers of the blocks, and as the build reports."""
    plain = load(dataclasses.replace(spec, quantizer=catalogue.quantizer("none", spec.model.dtype)), None)
    whole = sum(parameter.numel() for parameter in plain.parameters())
    expected = CLAIMS[spec.adapter.kind].count(layer_sizes(plain), whole, spec.adapter.config)
    trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert trainable == reported == expected


@every_pair
def test_trainable_parameters_are_counted_by_the_closed_form(name: str, adapter: str, quantizer: str) -> None:
    spec = spec_of(name, adapter, quantizer)
    built = make(spec)
    count_is_the_closed_form(built.model, spec, built.trainable_parameters)
    whole = sum(parameter.numel() for parameter in load(spec_of(name), None).parameters())
    assert built.trainable_parameters == spec.adapter.module("adapters").trainable_parameters(
        dataclasses.replace(spec.model, parameters=whole), spec.adapter.config
    )
    parameter = next(each for each in built.model.parameters() if each.is_floating_point())
    parameter.requires_grad_(not parameter.requires_grad)
    broken(count_is_the_closed_form, built.model, spec, built.trainable_parameters)


# reference/methods.md 1.1: adapted modules, and LoRA parameters a unit of rank
LORA_COUNTS = {
    "gpt2_127m": (48, 147_456),
    "gpt2_1_5b": (192, 1_228_800),
    "llama2_7b": (224, 2_498_560),
    "llama2_13b": (280, 3_911_680),
    "llama3_1_8b": (224, 2_621_440),
    "llama3_1_70b": (560, 12_943_360),
}


@pytest.mark.parametrize("adapter", [name for name in ADAPTERS if catalogue.adapter(name).kind == "lora"])
@pytest.mark.parametrize("name", LORA_COUNTS)
def test_lora_on_the_real_models_counts_as_in_the_table(name: str, adapter: str) -> None:
    from transformers import AutoModelForCausalLM

    from finrepro.model import configuration

    choice = catalogue.adapter(adapter)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(configuration(catalogue.model(name)))
        adapted = choice.module("adapters").apply(model, choice.config, 0)
    modules, parameters = LORA_COUNTS[name]
    factors = [p for p in adapted.parameters() if p.requires_grad]
    assert (len(factors) // 2, sum(p.numel() for p in factors)) == (modules, choice.config.r * parameters)
    assert (
        choice.module("adapters").trainable_parameters(catalogue.model(name), choice.config)
        == choice.config.r * parameters
    )


def test_loras_update_is_scaled_alike_at_every_rank() -> None:
    configs = [catalogue.adapter(name).config for name in ADAPTERS if catalogue.adapter(name).kind == "lora"]
    assert {config.r for config in configs} == {4, 8}
    assert {config.lora_alpha / config.r for config in configs} == {2}


def descend(model: nn.Module, spec: RunSpec, steps: int = 3, watch: Iterable[nn.Parameter] | None = None) -> None:
    """A few optimizer steps over `watch`, by default what is trainable."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if watch is not None:
        named = [(str(i), p) for i, p in enumerate(watch)]
    optimizer = spec.train.optimizer.module("optimizers").build(named, 1e-2, spec.train.optimizer.config)
    for step in range(steps):
        loss = -torch.stack([answer_log_likelihood(model, example) for example in random_examples(step, count=3)]).sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def only_its_parameters_move(model: nn.Module, spec: RunSpec, train: Callable[[nn.Module, RunSpec], None]) -> None:
    """After training every trainable tensor is another, and every other tensor is the same, bit by bit."""
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
        next(p for p in model.parameters() if not p.requires_grad and p.is_floating_point()).add_(1e-3)


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
    assert built.trainable_parameters == 0 and not any(p.requires_grad for p in built.model.parameters())
    assert {path.name for path in exported(built.model, spec, tmp_path / "weights").iterdir()} == claims_of(
        adapter
    ).exports


@training
def test_only_the_adapters_parameters_get_gradients(name: str, adapter: str, quantizer: str) -> None:
    model = stir(make(spec_of(name, adapter, quantizer)).model)
    answer_log_likelihood(model, random_examples(0, count=1)[0]).backward()
    for each, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, each
        else:
            assert parameter.grad is None, each


def exported(model: nn.Module, spec: RunSpec, folder: Path) -> Path:
    folder.mkdir()
    spec.adapter.module("adapters").export(model, folder)
    return folder


def is_read_back(model: nn.Module, spec: RunSpec, folder: Path) -> None:
    """The model made of the exported files on an untouched base computes the same, bit by bit."""
    read_back = CLAIMS[spec.adapter.kind].read_back
    assert read_back is not None
    again = read_back(base_of(spec), folder)
    assert torch.equal(logits(again.eval()), logits(model))


@training
def test_what_is_exported_is_read_back_bit_by_bit(name: str, adapter: str, quantizer: str, tmp_path: Path) -> None:
    spec = spec_of(name, adapter, quantizer)
    model = make(spec).model
    descend(model, spec)
    folder = exported(model, spec, tmp_path / "weights")
    assert {path.name for path in folder.iterdir()} == claims_of(adapter).exports
    is_read_back(model.eval(), spec, folder)
    descend(model.train(), spec, steps=1)
    broken(is_read_back, model.eval(), spec, folder)  # files of an earlier step


def file_holds_only_the_adapter(folder: Path, trainable: int) -> None:
    """The tensors of the exported file are as many numbers as were trained."""
    from safetensors.torch import load_file

    sizes = [tensor.numel() for path in folder.glob("*.safetensors") for tensor in load_file(path).values()]
    assert sum(sizes) == trainable


@training
def test_the_exported_file_holds_what_was_trained_and_no_more(
    name: str, adapter: str, quantizer: str, tmp_path: Path
) -> None:
    spec = spec_of(name, adapter, quantizer)
    built = make(spec)
    folder = exported(built.model, spec, tmp_path / "weights")
    file_holds_only_the_adapter(folder, built.trainable_parameters)
    broken(file_holds_only_the_adapter, folder, built.trainable_parameters + 1)


def merged_equals_unmerged(model: Any) -> None:
    """Folded into the base's own layers the adapter computes what it computed beside them."""
    model.eval()
    before = logits(model)
    assert_close(logits(model.merge_and_unload()), before)


@merging
def test_merged_equals_unmerged(name: str, adapter: str, quantizer: str) -> None:
    spec = spec_of(name, adapter, quantizer)
    merged_equals_unmerged(stir(make(spec).model))
    mutant = stir(make(spec).model)
    layer = next(module for module in mutant.modules() if hasattr(module, "fan_in_fan_out"))
    layer.scaling = {key: 1.01 * value for key, value in layer.scaling.items()}
    reference = logits(stir(make(spec).model))
    with pytest.raises(AssertionError):
        assert_close(logits(mutant.merge_and_unload()), reference)


def delta_is_scaled_product(merged: nn.Module, model: Any, base: nn.Module, config: Any) -> None:
    """W' = W + (alpha / r) B A, from the method's definition, in whichever orientation the layer stores W."""
    factors = dict(model.named_parameters())
    old, new = linear_layers(base), linear_layers(merged)
    assert old.keys() == new.keys()
    for name in old:
        first = factors[f"base_model.model.{name}.lora_A.default.weight"]
        second = factors[f"base_model.model.{name}.lora_B.default.weight"]
        assert first.shape[0] == second.shape[1] == config.r
        delta = config.lora_alpha / config.r * (second @ first)
        delta = delta.T if is_conv1d(old[name]) else delta
        assert_close(new[name].weight - old[name].weight, delta, 1e-4, what=name)
        assert torch.linalg.matrix_rank(delta) <= config.r


@merging
def test_lora_adds_alpha_over_r_times_b_a(name: str, adapter: str, quantizer: str) -> None:
    import copy

    spec = spec_of(name, adapter, quantizer)
    model = stir(make(spec).model)
    merged = copy.deepcopy(model).merge_and_unload()
    delta_is_scaled_product(merged, model, load(spec, None), spec.adapter.config)
    wrong = dataclasses.replace(spec.adapter.config, lora_alpha=spec.adapter.config.lora_alpha + 1)
    broken(delta_is_scaled_product, merged, model, load(spec, None), wrong)


def only_b_has_a_first_gradient(model: nn.Module) -> None:
    """B = 0 at first, so grad A = s B^T ... = 0, while grad B is not."""
    answer_log_likelihood(model, random_examples(0, count=1)[0]).backward()
    for name, slope in gradients(model).items():
        assert bool(slope.any()) is ("lora_B" in name), name


@starting_at_zero
def test_at_the_first_step_a_has_no_gradient_and_b_has(name: str, adapter: str, quantizer: str) -> None:
    only_b_has_a_first_gradient(make(spec_of(name, adapter, quantizer)).model)
    broken(only_b_has_a_first_gradient, stir(make(spec_of(name, adapter, quantizer)).model))


def a_is_uniform_within_its_bound(model: nn.Module) -> None:
    """B = 0 and A ~ U(-1/sqrt(in), 1/sqrt(in)): within the bound, and near it, with the standard deviation 1/sqrt(3 in)."""
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


@starting_at_zero
def test_adapter_weights_are_float32_whatever_the_base(name: str, adapter: str, quantizer: str) -> None:
    half = dataclasses.replace(spec_of(name).model, dtype="bfloat16")
    built = make(spec_of(half, adapter, quantizer))
    assert {p.dtype for p in built.model.parameters() if p.requires_grad} == {torch.float32}
    assert {p.dtype for p in built.model.parameters() if not p.requires_grad} <= {
        torch.bfloat16,
        torch.uint8,
        torch.int8,
    }


def draws_from_its_own_generator(apply: Callable[[int], nn.Module]) -> None:
    """The same seed gives the same adapter whatever was drawn before, another seed another, and the global generator is untouched."""
    state = torch.get_rng_state()
    first = apply(0)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(7)
    again, other = apply(0), apply(1)
    trainable = [{n: p for n, p in model.named_parameters() if p.requires_grad} for model in (first, again, other)]
    assert images(trainable[0].items()) == images(trainable[1].items()) != images(trainable[2].items())


@starting_at_zero
def test_an_adapter_draws_from_a_generator_of_its_own(name: str, adapter: str, quantizer: str) -> None:
    spec = spec_of(name, adapter, quantizer)
    method = spec.adapter.module("adapters")
    draws_from_its_own_generator(lambda seed: method.apply(base_of(spec), spec.adapter.config, seed))

    def shared(seed: int) -> nn.Module:
        import peft

        names = list(linear_layers(base_of(spec)))
        torch.manual_seed(seed)
        return peft.get_peft_model(base_of(spec), peft.LoraConfig(r=8, target_modules=names, fan_in_fan_out=False))

    if not any(is_conv1d(layer) for layer in linear_layers(base_of(spec)).values()):
        broken(draws_from_its_own_generator, shared)


@starting_at_zero
def test_all_linear_means_every_linear_layer_of_the_blocks_conv1d_too(name: str, adapter: str, quantizer: str) -> None:
    spec = spec_of(name, adapter, quantizer)
    wanted = set(linear_layers(load(spec, None)))
    if spec.model.family == "gpt2":
        assert all(is_conv1d(layer) for layer in linear_layers(load(spec, None)).values())
    model: Any = make(spec).model
    hit = {n.removeprefix("base_model.model.") for n, module in model.named_modules() if hasattr(module, "lora_A")}
    assert hit == wanted
    assert len(hit) == {"gpt2": 4, "llama": 7}[spec.model.family] * model.config.num_hidden_layers


def lora_on(name: str, targets: tuple[str, ...]) -> nn.Module:
    spec = spec_of(name, "lora_r8")
    config = dataclasses.replace(spec.adapter.config, target_modules=targets)
    return make(dataclasses.replace(spec, adapter=Choice(name="lora", kind="lora", config=config))).model


def test_named_layers_alone_are_adapted_and_no_match_is_an_error() -> None:
    (gpt2,) = [name for name in MINIATURES if catalogue.model(name).family == "gpt2"][:1]
    model = lora_on(gpt2, ("c_attn",))
    assert {n.rsplit(".", 1)[-1] for n, module in model.named_modules() if hasattr(module, "lora_A")} == {"c_attn"}
    with pytest.raises(ValueError, match="no linear layer of the model is named q_proj, v_proj"):
        lora_on(gpt2, ("q_proj", "v_proj"))
    with pytest.raises(ValueError, match="named c_proy"):
        lora_on(gpt2, ("c_attn", "c_proy"))
    with pytest.raises(ValueError, match="no linear layer"):
        lora_on(gpt2, ("lm_head",))


EXPORT = """
import json
import sys
from pathlib import Path
from fixtures_model import MINIATURES, make, spec_of, stir
from finrepro import runtime
runtime.quiet_environment()
runtime.setup(0, 2)
from finrepro.model import load
root = Path(sys.argv[1])
for name in MINIATURES:
    base = root / f"base of {name}"
    load(spec_of(name), None).save_pretrained(base)
    for adapter, quantizer in json.loads(sys.argv[2]):
        spec = spec_of(name, adapter, quantizer)
        folder = root / "weights" / spec.label
        folder.mkdir(parents=True)
        spec.adapter.module("adapters").export(stir(make(spec, base).model), folder)
"""


def files_are_the_same(one: Path, two: Path) -> None:
    """The same names with the same bytes."""
    first, second = (
        {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()} for root in (one, two)
    )
    assert first == second != {}


def no_file_names(root: Path, what: str) -> None:
    """No file holds the text."""
    assert not [path for path in root.rglob("*") if path.is_file() and what.encode() in path.read_bytes()]


def test_exported_files_are_the_same_in_every_process_and_name_no_place_on_the_machine(tmp_path: Path) -> None:
    places = [tmp_path / "here", tmp_path / "elsewhere"]
    for place in places:
        place.mkdir()
    pairs = [pair for pair in FIRST.values() if claims_of(pair[0]).trains]
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
