"""GaLore: its projection against NumPy, its steps against a loop by hand on every engine that it
goes with, its state and its refusals.
"""

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fixtures.model import broken, make, process  # noqa: F401
from optimizers_program import (
    ADAMW,
    GALORE,
    GPT2,
    LLAMA,
    PLAIN,
    STEPS,
    by_hand,
    cell,
    chosen,
    kept_bytes,
    run,
    states_of,
)
from torch import Tensor, nn

from finrepro.catalogue import reader
from finrepro.catalogue.compatibility import refusal
from finrepro.errors import UsageError
from finrepro.methods.layers import galore
from finrepro.methods.layers.galore import down, projection, up
from finrepro.methods.layers.linear import linear_layers
from finrepro.methods.optimizers import adamw, galore_adamw


@pytest.fixture(autouse=True)
def _one_thread(process: None) -> None:  # noqa: F811
    """Two threads wait for each other longer than they compute, where other processes want the
    cores as well: SVDs are small here.
    """
    torch.set_num_threads(1)


SHAPES = ((6, 9), (9, 6), (7, 7))


def drawn(shape: tuple[int, int], seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def subspace(gradient: np.ndarray, r: int) -> np.ndarray:
    """P (m, r) where m <= n, else Q (n, r): the first singular vectors, each with its largest
    entry positive.
    """
    u, _, vh = np.linalg.svd(gradient.astype(np.float64), full_matrices=False)
    vectors = u[:, :r] if gradient.shape[0] <= gradient.shape[1] else vh[:r].T
    return vectors * np.sign(vectors[np.abs(vectors).argmax(0), np.arange(r)])


def is_the_subspace(project: Any) -> None:
    """Orthonormal columns, of the shorter side, that span the gradient's largest directions."""
    for shape in SHAPES:
        for r in (1, 3, min(shape)):
            gradient = drawn(shape)
            basis = project(gradient, r)
            assert basis.shape == (min(shape), r)
            assert (basis.T @ basis - torch.eye(r)).abs().max() < 1e-5
            np.testing.assert_allclose(basis.numpy(), subspace(gradient.numpy(), r), atol=1e-4)
            assert down(gradient, basis).shape == (
                (r, shape[1]) if shape[0] <= shape[1] else (shape[0], r)
            )


def other_side(gradient: Tensor, r: int) -> Tensor:
    """A mutant: the longer side's vectors."""
    return torch.linalg.svd(gradient.T if gradient.shape[0] > gradient.shape[1] else gradient)[2][
        :r
    ].T


def test_the_subspace_is_that_of_the_shorter_sides_largest_singular_vectors() -> None:
    is_the_subspace(projection)
    broken(is_the_subspace, other_side)
    broken(is_the_subspace, lambda gradient, r: projection(gradient, r)[:, torch.randperm(r)] * -1)


def loses_nothing_at_full_rank(there: Any, back: Any) -> None:
    """With r = min(m, n) P P^T G = G, so that a step of SGD is SGD's; with less it is the
    nearest matrix of that rank.
    """
    for shape in SHAPES:
        gradient, errors = drawn(shape), []
        singular = torch.linalg.svdvals(gradient)
        for r in range(1, min(shape) + 1):
            basis = projection(gradient, r)
            errors.append(float((back(there(gradient, basis), basis, gradient) - gradient).norm()))
            assert errors[-1] == pytest.approx(float(singular[r:].norm()), abs=1e-4)
        assert errors[-1] < 1e-4 * float(gradient.norm())


def test_sgd_in_the_whole_space_is_sgd() -> None:
    loses_nothing_at_full_rank(down, up)
    broken(loses_nothing_at_full_rank, down, lambda *given: 1.01 * up(*given))


def test_a_gradient_of_zero_or_without_a_number_has_a_subspace_too() -> None:
    for value in (0.0, float("nan"), float("inf")):
        for shape in SHAPES:
            basis = projection(torch.full(shape, value), 2)
            assert (basis.T @ basis - torch.eye(2)).abs().max() < 1e-5


def numpy_step(
    state: dict[str, Any],
    config: Any,
    count: int,
    rate: float,
    weight: Any,
    gradient: Any,
    **plain: Any,
) -> Any:
    """A matrix after one step, from the equations; `plain` replaces parts of them by a mutant's."""
    r = galore_adamw.rank_of("x.0.weight", gradient.shape, config)
    left = gradient.shape[0] <= gradient.shape[1]
    if count % config.update_proj_gap == 0:
        state["basis"] = subspace(gradient, r)
    basis = state["basis"]
    small = basis.T @ gradient if left else gradient @ basis
    beta1, beta2 = config.betas
    state["m"] = beta1 * state.get("m", 0) + (1 - beta1) * small
    state["v"] = beta2 * state.get("v", 0) + (1 - beta2) * small**2
    hat, root = (
        state["m"] / (1 - beta1 ** (count + 1)),
        np.sqrt(state["v"] / (1 - beta2 ** (count + 1))),
    )
    step = hat / (root + config.eps)
    whole = basis @ step if left else step @ basis.T
    return (
        weight * (1 - rate * config.weight_decay)
        - rate * plain.get("scale", config.step_scale) * whole
    )


def is_the_numpy_step(**mutant: Any) -> None:
    """Five steps with a refresh every second: the weight follows the equations."""
    config = chosen(GALORE, rank=3).config
    for shape in SHAPES:
        weight = nn.Parameter(drawn(shape, 1))
        truth, state = weight.detach().numpy().astype(np.float64), {}
        optimizer = galore_adamw.build([("x.0.weight", weight)], 0.01, config)
        for count in range(5):
            weight.grad = drawn(shape, 10 + count)
            truth = numpy_step(state, config, count, 0.01, truth, weight.grad.numpy(), **mutant)
            optimizer.step()
            np.testing.assert_allclose(weight.detach().numpy(), truth, rtol=1e-4, atol=1e-5)


def test_a_step_is_that_of_the_equations() -> None:
    is_the_numpy_step()
    broken(is_the_numpy_step, scale=1.0)


def refreshes_every_second_step(optimizer: Any, weight: nn.Parameter) -> None:
    """The subspace changes at steps 0, T, 2 T and at no other."""
    seen = []
    for count in range(6):
        weight.grad = drawn((6, 9), 20 + count)
        optimizer.step()
        seen.append(optimizer.state[weight]["projection"].clone())
    assert [not torch.equal(*pair) for pair in itertools.pairwise(seen)] == [
        False,
        True,
        False,
        True,
        False,
    ]
    assert torch.equal(seen[0], projection(drawn((6, 9), 20), 3)) and torch.equal(
        seen[4], projection(drawn((6, 9), 24), 3)
    )


def test_the_subspace_is_found_anew_every_so_many_steps() -> None:
    for gap, law in (
        (2, refreshes_every_second_step),
        (3, lambda *given: broken(refreshes_every_second_step, *given)),
    ):
        weight = nn.Parameter(drawn((6, 9)))
        law(
            galore_adamw.build(
                [("x.0.weight", weight)], 0.01, chosen(GALORE, rank=3, update_proj_gap=gap).config
            ),
            weight,
        )


def is_adamw_in_turned_coordinates(scale: float) -> None:
    """With the whole space and one subspace for good, P^T W goes AdamW's way."""
    config = chosen(GALORE, rank=5, update_proj_gap=10**6, step_scale=scale).config
    weight, basis = nn.Parameter(drawn((5, 8))), projection(drawn((5, 8), 30), 5)
    turned = nn.Parameter(basis.T @ weight.detach())
    ours = galore_adamw.build([("x.0.weight", weight)], 0.01, config)
    theirs = adamw.build([("x.0.weight", turned)], 0.01, chosen(PLAIN).config)
    for count in range(6):
        weight.grad = drawn((5, 8), 30 + count)
        turned.grad = basis.T @ weight.grad
        ours.step(), theirs.step()
        assert (basis @ turned.detach() - weight.detach()).norm() < 1e-4


def test_in_the_whole_space_it_is_adamw_in_turned_coordinates() -> None:
    is_adamw_in_turned_coordinates(1.0)
    broken(is_adamw_in_turned_coordinates, 0.9)


def test_what_is_no_matrix_of_a_block_is_stepped_by_adamw() -> None:
    named = [
        ("wte.weight", drawn((6, 9))),
        ("h.0.norm.weight", drawn((1, 9))[0]),
        ("lm_head.weight", drawn((9, 6))),
    ]
    pair = [[(name, nn.Parameter(value.clone())) for name, value in named] for _ in range(2)]
    ours = galore_adamw.build(pair[0], 0.01, chosen(GALORE, rank=3).config)
    theirs = adamw.build(pair[1], 0.01, chosen(PLAIN).config)
    for count in range(4):
        for mine, other in zip(*pair, strict=True):
            mine[1].grad = torch.randn(
                mine[1].shape, generator=torch.Generator().manual_seed(count)
            )
            other[1].grad = mine[1].grad.clone()
        ours.step(), theirs.step()
    for mine, other in zip(*pair, strict=True):
        assert torch.allclose(mine[1], other[1], rtol=1e-5, atol=1e-7)
        assert "projection" not in ours.state[mine[1]]


def loop(spec: Any) -> dict[str, Any]:
    """The run by hand: the equations for the blocks' matrices, torch's AdamW for the others."""
    config, states, others = spec.train.optimizer.config, {}, []

    def step(named: dict[str, nn.Parameter], rate: float, index: int) -> None:
        projected = {f"{name}.weight" for name in linear_layers(MODEL[0])}
        if not others:
            others.append(
                adamw.build(
                    [each for each in named.items() if each[0] not in projected], rate, config
                )
            )
        for group in others[0].param_groups:
            group["lr"] = rate
        others[0].step()
        for name in projected:
            p, state = named[name], states.setdefault(name, {})
            value = numpy_step(state, config, index, rate, p.detach().numpy(), p.grad.numpy())
            p.copy_(torch.from_numpy(value))

    MODEL[:] = [make(spec).model]
    return by_hand(spec, step)


MODEL: list[Any] = []


def is_the_loop(found: dict[str, Any], plain: dict[str, Any]) -> None:
    np.testing.assert_allclose(found["losses"], plain["losses"], rtol=1e-4)
    for name, value in plain["weights"].items():
        if not name.endswith(
            "c_attn.bias"
        ):  # keys' have no gradient but rounding, and Adam turns that into steps
            assert (found["weights"][name] - value).norm() <= 2e-3 * value.norm(), name


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        (GPT2, "ddp"),
        pytest.param(LLAMA, "ddp", marks=pytest.mark.slow),
        *(pytest.param(name, "deepspeed", marks=pytest.mark.slow) for name in (GPT2, LLAMA)),
    ],
)
def test_a_run_is_the_loop_by_hand_also_on_conv1d(name: str, engine: Any, tmp_path: Path) -> None:
    """GPT-2's layers store (in, out)."""
    spec = cell(chosen(GALORE), engine, name=name)
    plain = loop(cell(chosen(GALORE), name=name))
    is_the_loop(run(spec, tmp_path / "right"), plain)
    if engine == "ddp":
        broken(
            is_the_loop,
            run(cell(chosen(GALORE, update_proj_gap=3), name=name), tmp_path / "wrong"),
            plain,
        )


@pytest.mark.slow
def test_weights_of_bfloat16_are_stepped_in_float32_from_the_first_gradient(tmp_path: Path) -> None:
    """DeepSpeed's float32 copies keep their shapes at stage 0, and its first step of zeros
    leaves no subspace.
    """
    spec = cell(chosen(GALORE), "deepspeed", dtype="bfloat16", max_steps=1, warmup_steps=0)
    states = states_of(spec, tmp_path)
    for name, state in states.items():
        assert state["step"] == 1 and state["exp_avg"].dtype == torch.float32, name
        assert ("projection" in state) is (".layers." in name and "norm" not in name)
    q = states["model.layers.0.mlp.up_proj.weight"]
    assert not torch.equal(
        q["projection"].abs(), torch.eye(*q["projection"].shape)
    )  # that of zeros


def test_the_state_has_the_size_of_the_formula(tmp_path: Path) -> None:
    """2 r n + m r numbers for a matrix (m, n) with m <= n, 2 m n else."""
    for rank in (RANK, 0.25):
        spec = cell(chosen(GALORE, rank=rank), max_steps=1)
        shapes = {name: tuple(p.shape) for name, p in make(spec).model.named_parameters()}
        config = spec.train.optimizer.config
        states = states_of(spec, tmp_path / f"{rank}")
        assert (
            kept_bytes(states)
            == galore_adamw.state_bytes(shapes, config)
            < adamw.state_bytes(shapes, config)
        )
        m, n = (f(shapes["model.layers.0.mlp.up_proj.weight"]) for f in (min, max))
        r = rank if isinstance(rank, int) else round(rank * m)
        assert kept_bytes({"up": states["model.layers.0.mlp.up_proj.weight"]}) == 4 * (
            2 * r * n + m * r
        )


RANK = GALORE["rank"]


def test_what_it_does_not_step_is_refused_by_name() -> None:
    settings = chosen(GALORE)
    assert refusal(cell(settings)) is None
    lora = dataclasses.replace(cell(settings), adapter=reader.adapter("lora_r8"))
    assert (
        refusal(lora) == "galore_adamw steps dense weights in a subspace, and lora_r8 trains others"
    )
    wide = refusal(cell(chosen(GALORE, rank=4096)))
    assert wide is not None and "rank 4096 is more than" in wide and "q_proj" in wide
    low_rank = dataclasses.replace(cell(settings), model=reader.model("gpt2_127m_mini_lr"))
    assert refusal(low_rank) == (
        "galore_adamw steps dense weights in a subspace, and those of gpt2_127m_mini_lr are factors"
    )
    for rank in (0, 1.5, -0.5, "all"):
        with pytest.raises(UsageError, match="rank"):
            chosen(GALORE, rank=rank)
    assert (
        settings.config.rank == RANK
        and set(ADAMW) < set(dataclasses.asdict(settings.config))
        and STEPS > 4
    )


def test_the_first_ranks_subspace_is_everybodys(monkeypatch: pytest.MonkeyPatch) -> None:
    told = []
    monkeypatch.setattr(galore.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(galore.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(
        galore.dist,
        "broadcast",
        lambda basis, src: told.append(src) or basis.copy_(torch.eye(6, 3)),
    )
    weight = nn.Parameter(drawn((6, 9)))
    optimizer = galore_adamw.build([("x.0.weight", weight)], 0.01, chosen(GALORE, rank=3).config)
    weight.grad = drawn((6, 9), 2)
    optimizer.step()
    assert told == [0] and torch.equal(optimizer.state[weight]["projection"], torch.eye(6, 3))
