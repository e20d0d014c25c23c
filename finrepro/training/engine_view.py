"""What a method may do around an optimizer step: read gradients and weights, set them, and reset a
parameter's moments.

An optimizer steps float32 tensors that need not be the model's own: DeepSpeed steps flat copies,
sharded over the ranks (ZeRO, Rajbhandari et al., 2020, arXiv 1910.02054), and writes the model's
weights from them after each step, so that a weight edited in place is overwritten at the next one.
A `LocalShard` says where this rank's share of a parameter is, on every engine.

DeepSpeed's own setters (`deepspeed.utils.safe_set_full_*`) are not used: they leave the model's
weight unchanged until the next step, cannot set a parameter whose size the number of ranks does not
divide (stage 3), and find no moments between a resumed checkpoint and the next step.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from finrepro.runtime import zero3
from finrepro.training.engines.base import Engine

# the moments' names in torch and bitsandbytes
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "state1", "state2")


@dataclass(frozen=True)
class LocalShard:
    """Elements `first` to `first + count` of a flattened parameter are elements `offset` to
    `offset + count` of `owner`, float32 numbers that the optimizer steps on this rank. `unit`
    names those numbers on every rank: the parameters of a unit have one step count."""

    unit: int
    owner: Tensor
    offset: int
    first: int
    count: int

    def of(self, flat: Tensor) -> Tensor:
        """The view of this share in `owner`, or in a moment of the same shape."""
        return flat.detach().view(-1).narrow(0, self.offset, self.count)

    def cut(self, value: Tensor) -> Tensor:
        """This share's elements of a full parameter's value."""
        return value.reshape(-1).narrow(0, self.first, self.count)


class EngineView:
    """The training of one model, as the hooks of its adapter and of its optimizer see it. All ranks
    make the same calls, in the same order.

    `trained` are the trained parameters by their names in `model`. Values and gradients are full
    float32 tensors of the parameter's shape, and copies: nothing changes but by `set`,
    `set_frozen`, `change_state` and `reset_state`.
    """

    def __init__(self, model: nn.Module, engine: Engine) -> None:
        self.model = model
        self.trained = {
            name: parameter
            for name, parameter in model.named_parameters()
            if parameter.requires_grad
        }
        self._trained_ids = {id(parameter) for parameter in self.trained.values()}
        self._engine = engine
        self._optimizer = engine.stepped_by
        # torch's optimizer, inside of DeepSpeed's
        self._base: Any = getattr(self._optimizer, "optimizer", self._optimizer)
        self._gradients = False

    @contextmanager
    def gradients(self) -> Iterator[None]:
        """Inside, the gradients of the full global batch can be read."""
        self._gradients = True
        try:
            yield
        finally:
            self._gradients = False

    def gradient(self, parameter: nn.Parameter) -> Tensor:
        """The gradient of the full global batch, not clipped yet; zero where there is none.

        Raises `RuntimeError` outside `before_step`: earlier it is incomplete, later it is gone.
        """
        if not self._gradients:
            raise RuntimeError(
                "a gradient can be read in before_step only: "
                "earlier it is not whole, later it is gone."
            )
        gradient = self._engine.gradient(parameter)
        return (
            torch.zeros_like(self.value(parameter))
            if gradient is None
            else gradient.detach().to(torch.float32, copy=True)
        )

    def rate(self, parameter: nn.Parameter) -> float:
        """The learning rate of this step for a trained parameter."""
        unit = self._share(parameter).unit
        # stage 3 cuts groups into units
        group = getattr(self._optimizer, "sub_group_to_group_id", {}).get(unit, unit)
        return float(self._engine.param_groups[group]["lr"])

    def value(self, parameter: nn.Parameter) -> Tensor:
        """The value of a trained parameter as the optimizer holds it: in float32 also where the
        model's weight is bfloat16.
        """
        share = self._share(parameter)
        return self._gathered(share, parameter, share.owner)

    def set(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Give a trained parameter this value, in the model and where the optimizer holds it; its
        moments are unchanged. Raises `ValueError` for another shape.
        """
        _expect_shape(parameter, value)
        share = self._share(parameter)
        value = value.detach().to(share.owner.device)
        share.of(share.owner).copy_(share.cut(value))
        if share.owner is not parameter:
            zero3.fill(parameter, value)

    def reset_state(
        self, parameters: nn.Parameter | Iterable[nn.Parameter], *, steps: bool = True
    ) -> None:
        """Zero the moments of trained parameters, and with `steps` the step count of their bias
        correction.

        Where the optimizer steps flat copies, a group has one step count: with `steps` every
        parameter of a group is reset, or `ValueError` is raised, on every engine alike. Before the
        first step nothing is done. Raises `TypeError` for an optimizer with other state than
        moments of a weight's shape and a step.
        """
        resets = [parameters] if isinstance(parameters, nn.Parameter) else list(parameters)
        shares = {id(parameter): self._share(parameter) for parameter in resets}
        if steps:
            self._expect_whole_groups(shares)
        for share in shares.values():
            for moment in self._moments(share.owner).values():
                share.of(moment).zero_()
            if steps and "step" in (state := self._base.state.get(share.owner, {})):
                _zero_step(state)

    def change_state(
        self, parameter: nn.Parameter, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
    ) -> None:
        """Replace the moments of a trained parameter, name -> full float32 tensor, first moment
        first, by what `change` returns. Before the first step nothing is done. Raises `TypeError`
        as `reset_state` does.
        """
        share = self._share(parameter)
        moments = self._moments(share.owner)
        if moments:
            for name, value in change(
                {name: self._gathered(share, parameter, m) for name, m in moments.items()}
            ).items():
                share.of(moments[name]).copy_(share.cut(value))

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """A copy of any weight of the model in its own dtype, gathered where it is sharded."""
        return zero3.whole(parameter)

    def set_frozen(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Give a frozen weight, also a sharded one, this value. Raises `ValueError` for a trained
        one, and for another shape.
        """
        if parameter.requires_grad:
            raise ValueError("a trained parameter is set by `set`, or the optimizer would undo it.")
        _expect_shape(parameter, value)
        zero3.fill(parameter, value)

    @property
    def _is_sharded(self) -> bool:
        """Whether what the optimizer steps is sharded over the ranks."""
        return hasattr(self._optimizer, "bit16_groups") or hasattr(
            self._optimizer, "fp32_partitioned_groups_flat"
        )

    def _gathered(self, share: LocalShard, parameter: nn.Parameter, flat: Tensor) -> Tensor:
        """A parameter's full tensor, from the ranks' shares in `flat`, of the owner's shape."""
        full = torch.zeros(_shape(parameter), dtype=torch.float32, device=flat.device)
        share.cut(full).copy_(share.of(flat))
        if self._is_sharded:
            dist.all_reduce(full)
        return full

    def _moments(self, owner: Tensor) -> dict[str, Tensor]:
        """The optimizer's state of an owner beside the step count."""
        state = self._base.state.get(owner, {})
        moments = {key: value for key, value in state.items() if key != "step"}
        for key, value in moments.items():
            if not (key in MOMENTS and value.shape == owner.shape and value.is_floating_point()):
                raise TypeError(
                    f"{type(self._base).__name__} keeps '{key}', "
                    "and nobody here knows how to begin it anew."
                )
        return moments

    def _share(self, parameter: Any) -> LocalShard:
        """Where this rank's share of a trained parameter is; an empty share where it has none."""
        if id(parameter) not in self._trained_ids:
            raise ValueError("the optimizer does not step this parameter.")
        optimizer = self._optimizer
        if hasattr(optimizer, "fp32_partitioned_groups_flat"):  # stage 3
            unit, offset, padded = optimizer.grad_position[optimizer.get_param_id(parameter)]
            first = min(padded * dist.get_rank(), parameter.ds_numel)
            count = min(padded, parameter.ds_numel - first)
            owner = optimizer.fp32_partitioned_groups_flat[unit]
            return LocalShard(unit, owner, offset, first, count)
        if hasattr(optimizer, "bit16_groups"):  # stages 1 and 2
            unit = _group_of(parameter, optimizer.bit16_groups)
            owner, mapping = optimizer.single_partition_of_fp32_groups[unit], parameter._hp_mapping
            if mapping is None:
                return LocalShard(unit, owner, 0, 0, 0)
            inside, first = mapping.hp_fragment_address, mapping.lp_fragment_address.start
            return LocalShard(unit, owner, inside.start, first, inside.numel)
        if hasattr(optimizer, "fp32_groups"):  # bfloat16 weights at stage 0: a float32 copy of each
            unit = _group_of(parameter, optimizer.fp16_groups)
            copy = optimizer.fp32_groups[unit][_index(parameter, optimizer.fp16_groups[unit])]
            return LocalShard(unit, copy, 0, 0, parameter.numel())
        unit = _group_of(parameter, [group["params"] for group in optimizer.param_groups])
        return LocalShard(unit, parameter, 0, 0, parameter.numel())

    def _expect_whole_groups(self, shares: dict[int, LocalShard]) -> None:
        units = {share.unit for share in shares.values()}
        for name, parameter in self.trained.items():
            if id(parameter) not in shares and self._share(parameter).unit in units:
                raise ValueError(
                    "one step count may serve a whole group of the optimizer: "
                    f"{name} has to be reset as well, or none's steps."
                )


def _zero_step(state: dict[str, Any]) -> None:
    """In place where it is a tensor."""
    if torch.is_tensor(state["step"]):
        state["step"].zero_()
    else:
        state["step"] = 0


def _index(parameter: nn.Parameter, group: Iterable[Tensor]) -> int:
    return next((index for index, member in enumerate(group) if member is parameter), -1)


def _group_of(parameter: nn.Parameter, groups: Iterable[Iterable[Tensor]]) -> int:
    return next(unit for unit, group in enumerate(groups) if _index(parameter, group) >= 0)


def _shape(parameter: nn.Parameter) -> torch.Size:
    """The full shape of a parameter, also of a sharded one."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def _expect_shape(parameter: nn.Parameter, value: Tensor) -> None:
    if value.shape != _shape(parameter):
        raise ValueError(
            f"a value of shape {list(value.shape)} for a parameter of shape "
            f"{list(_shape(parameter))}."
        )
