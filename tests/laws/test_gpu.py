"""On a CUDA device. The law: the fast paths that only a GPU has compute what the CPU's plain
paths compute, up to the rounding of bfloat16, and the labels are the same."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.model import (
    ADAPTERS,
    CPU,
    MINIATURES,
    QUANTIZERS,
    all_logits,
    answer_log_likelihood,
    assert_close,
    broken,
    images,
    process,  # noqa: F401
    random_examples,
    spec_of,
    stir,
)
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.compatibility import refusal
from finrepro.data.batches import COLLATE, Batch
from finrepro.data.tokens import Encoded
from finrepro.evaluation.generation import generate
from finrepro.evaluation.log_likelihood import choice_log_likelihoods
from finrepro.kinds import kind_module
from finrepro.methods.layers.isolated_attention import isolated_attention
from finrepro.methods.layers.supervised import (
    SupervisedLM,
    backbone_and_head,
    hidden_states,
    log_likelihood,
)
from finrepro.models.build import build
from finrepro.training.checkpoint import Control
from finrepro.training.loop import train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device, and there is none"
    ),
]

CUDA = torch.device("cuda", 0)
ROUGH = 2e-2  # bfloat16 has eight bits of mantissa, and errors add up over layers
HEADS = ((4, 4), (4, 2), (8, 1))
everywhere = pytest.mark.parametrize("name", MINIATURES)


class Attention(nn.Module):
    """What Transformers hands to an attention function: the layer, for its flags."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        self.is_causal = True
        self.num_key_value_groups = groups


def attention_is_the_cpus(
    heads: tuple[int, int], lengths: tuple[int, ...], scaling: float | None, seen: Any
) -> None:
    """Output and gradients of one variable-length call in bfloat16 are those of one call a
    segment on the CPU in float32.
    """
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, h, sum(lengths), 64) for h in (heads[0], heads[1], heads[1])]
    tensors = [torch.randn(shape, generator=generator).bfloat16() for shape in shapes]
    weight = torch.randn(1, sum(lengths), heads[0], 64, generator=generator).bfloat16()
    results = []
    for device, dtype, segments in ((CUDA, torch.bfloat16, seen), (CPU, torch.float32, lengths)):
        leaves = [tensor.clone().to(device, dtype).requires_grad_() for tensor in tensors]
        module = Attention(heads[0] // heads[1]).to(device)
        out, _ = isolated_attention(
            module, *leaves, None, scaling=scaling, segment_lengths=segments
        )
        (out * weight.to(device, dtype)).sum().backward()
        results.append(
            [each.detach().cpu().float() for each in (out, *(leaf.grad for leaf in leaves))]
        )
    for found, expected in zip(*results, strict=True):
        assert found.shape == expected.shape
        assert_close(found, expected, ROUGH, floor=float(results[1][0].norm()))


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("lengths", [(5,), (1, 1, 1), (7, 1, 200, 3), (64, 64)])
@pytest.mark.parametrize("scaling", [None, 0.2])
def test_variable_length_attention_equals_the_cpus_path_by_segments(
    heads: tuple[int, int], lengths: tuple[int, ...], scaling: float | None
) -> None:
    attention_is_the_cpus(heads, lengths, scaling, lengths)
    if len(lengths) > 1:
        broken(attention_is_the_cpus, heads, lengths, scaling, (sum(lengths),))


def pair(name: str, adapter: str = "full", quantizer: str = "none") -> tuple[nn.Module, nn.Module]:
    """The same adapted model in bfloat16 on the GPU and in float32 on the CPU."""
    half = dataclasses.replace(spec_of(name).model, dtype="bfloat16")
    there, here = spec_of(half, adapter, quantizer), spec_of(name, adapter, quantizer)
    gpu = build(there, None, CUDA).model
    cpu = build(here, None, CPU).model
    with torch.no_grad():  # the same numbers: those that bfloat16 can hold
        if quantizer == "none":
            cpu.load_state_dict(
                {key: value.cpu().float() for key, value in gpu.state_dict().items()}
            )
    return stir(gpu), stir(cpu)


def losses_agree(models: tuple[nn.Module, nn.Module], batches: tuple[Batch, Batch]) -> None:
    """Every supervised token's log-likelihood is the other's, and so is their sum."""
    each, total = [], []
    with torch.no_grad():
        for model, batch in zip(models, batches, strict=True):
            here = batch.to(next(model.parameters()).device)
            _, head = backbone_and_head(model)
            each.append(
                log_likelihood(head, hidden_states(model, here)[here.positions], here.targets).cpu()
            )
            total.append(SupervisedLM(model)(here).cpu())
    assert_close(each[0], each[1], ROUGH)
    assert_close(total[0], total[1], ROUGH)


@everywhere
@pytest.mark.parametrize("adapter", ["full", "lora_r8"])
@pytest.mark.parametrize("layout", tuple(COLLATE))
def test_the_loss_of_a_batch_on_the_gpu_is_that_on_the_cpu(
    name: str, adapter: str, layout: str
) -> None:
    examples = random_examples(0)
    models = pair(name, adapter)
    losses_agree(models, (COLLATE[layout](examples), COLLATE[layout](examples)))
    others = [dataclasses.replace(example, ids=example.ids[::-1]) for example in examples]
    broken(losses_agree, models, (COLLATE[layout](others), COLLATE[layout](examples)))


@everywhere
def test_packed_and_padded_batches_have_the_same_hidden_states_on_the_gpu(name: str) -> None:
    examples = random_examples(1)
    model, _ = pair(name)
    states: list[Tensor] = []
    with torch.no_grad():
        for layout in ("padded", "bins"):
            batch = COLLATE[layout](examples).to(CUDA)
            states.append(hidden_states(model, batch)[batch.positions].float())
        assert_close(states[1], states[0], ROUGH)
        with pytest.raises(AssertionError):
            leaking = dataclasses.replace(batch, segment_lengths=None)
            assert_close(hidden_states(model, leaking)[batch.positions].float(), states[0], ROUGH)


def items() -> list[list[Encoded]]:
    prompts = [
        (*range(30, 45), row, *example.ids)
        for row, example in enumerate(random_examples(2, count=12))
    ]
    return [
        [Encoded((*p, *answer), len(p)) for answer in ((5, 9), (6, 8), (7, 4))] for p in prompts
    ]


@everywhere
@pytest.mark.parametrize(
    ("adapter", "quantizer"), [("full", "none"), ("lora_r8", "none"), ("lora_r8", "nf4")]
)
def test_scoring_on_the_gpu_gives_the_cpus_labels(name: str, adapter: str, quantizer: str) -> None:
    """In float32 on both sides: the labels are equal, not only close."""
    spec = spec_of(name, adapter, quantizer)
    gpu, cpu = (stir(build(spec, None, device).model).eval() for device in (CUDA, CPU))
    with torch.no_grad():
        plain = torch.stack(
            [
                torch.stack([answer_log_likelihood(cpu, choice) for choice in each])
                for each in items()
            ]
        )
    for max_tokens in (64, 10**6):
        found = torch.tensor(choice_log_likelihoods(gpu, items(), max_tokens))
        assert_close(found, plain, 1e-3)
        assert torch.equal(found.argmax(-1), plain.argmax(-1))
    assert len(set(plain.argmax(-1).tolist())) > 1


@pytest.mark.parametrize("name", [name for name in QUANTIZERS if name not in ("none", "int8")])
def test_the_gpu_stores_the_same_codes_and_multiplies_with_the_same_weight(name: str) -> None:
    choice = reader.quantizer(name, "float32")
    module, config = kind_module("quantizers", choice.kind), choice.config
    generator = torch.Generator().manual_seed(0)
    weight, inputs = (
        torch.randn(256, 512, generator=generator),
        torch.randn(7, 512, generator=generator),
    )
    here, there = module.encode(weight, config), module.encode(weight.to(CUDA), config)
    packed, packed_there = (getattr(each, "moved", each).codes.cpu() for each in (here, there))
    # Ties at mid-points may fall either way, and so may the searches of ICQ, a block at a time.
    assert (packed == packed_there).float().mean() > (0.98 if hasattr(here, "moved") else 0.999)
    assert_close(module.decode(there).cpu(), module.decode(here), 2e-2)
    layer = module.linear(there, None)
    assert_close(layer(inputs.to(CUDA)).cpu(), inputs @ module.decode(there).cpu().T, 1e-3)
    with pytest.raises(AssertionError):
        assert_close(layer(inputs.to(CUDA)).cpu(), inputs @ weight.T, 1e-3)


@everywhere
def test_a_quantized_model_on_the_gpu_is_the_same_in_both_modes_and_unchanged_by_a_pass(
    name: str,
) -> None:
    half = dataclasses.replace(spec_of(name).model, dtype="bfloat16")
    spec = spec_of(half, "lora_r8", "nf4")
    model = stir(build(spec, None, CUDA).model)
    before = images((key, value.cpu()) for key, value in model.state_dict().items())
    ids = random_examples(3)[0].ids * 3
    with torch.no_grad():
        training, evaluation = all_logits(model.train(), ids), all_logits(model.eval(), ids)
    assert_close(evaluation, training, ROUGH)
    assert images((key, value.cpu()) for key, value in model.state_dict().items()) == before


@everywhere
@pytest.mark.parametrize(
    ("adapter", "quantizer"), [("full", "none"), ("lora_r8", "none"), ("lora_r8", "nf4")]
)
def test_generation_on_the_gpu_gives_the_cpus_tokens(
    name: str, adapter: str, quantizer: str
) -> None:
    """In float32 on both sides, rows of different lengths beside each other."""
    spec = spec_of(name, adapter, quantizer)
    gpu, cpu = (stir(build(spec, None, device).model).eval() for device in (CUDA, CPU))
    prompts = [example.ids for example in random_examples(4)]
    limits = [6] * len(prompts)
    expected = generate(cpu, prompts, limits, [-1], 1)
    assert len(set(expected)) > 1
    for max_tokens in (100, 10**6):
        assert generate(gpu, prompts, limits, [-1], max_tokens) == expected


def trained(
    name: str, device: torch.device, folder: Path, dtype: Any, **changes: Any
) -> list[float]:
    """Losses of a few steps of a tiny cell."""
    adapter, quantizer = changes.pop("method")
    few = {
        "max_steps": 6,
        "warmup_steps": 1,
        "global_batch_size": 4,
        "sort_window": 1,
        "max_tokens": 128,
        "lr": 3e-3,
    }
    spec = spec_of(
        dataclasses.replace(spec_of(name).model, dtype=dtype), adapter, quantizer, **few, **changes
    )
    built = build(spec, None, device)
    control = Control(lambda _: None, lambda: False, folder, checkpoint_seconds=math.inf)
    losses = train(built.model, random_examples(0, 8), spec, device, control).losses
    assert all(0 < row["grad_norm"] < math.inf for row in losses)
    return [row["loss"] for row in losses]


METHODS = [
    (adapter, quantizer)
    for adapter in ADAPTERS
    for quantizer in ("none", "nf4")
    if adapter not in ("base", "full")
]


@everywhere
@pytest.mark.parametrize("method", METHODS, ids="-".join)
@pytest.mark.parametrize("engine", ["deepspeed", "ddp"])
def test_a_bfloat16_cell_in_bins_trains_on_the_gpu_as_in_float32_on_the_cpu(
    name: str, method: tuple[str, str], engine: str, tmp_path: Path
) -> None:
    if reason := refusal(spec_of(name, *method)):
        pytest.skip(reason)
    gpu = trained(
        name, CUDA, tmp_path / "gpu", "bfloat16", method=method, layout="bins", engine=engine
    )
    cpu = trained(name, CPU, tmp_path / "cpu", "float32", method=method, layout="padded")
    assert gpu == pytest.approx(cpu, rel=ROUGH)
    assert gpu[-1] < gpu[0]
    assert torch.cuda.max_memory_allocated(CUDA) > 0
