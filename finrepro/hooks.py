"""The steps that an adapter takes part in: optional functions of its module, called by the training loop, which knows no method by name.

    extra_loss(model, config) -> scalar tensor             added to the objective once a step; in no recorded and no evaluated loss
    before_step(handle, config, step, max_steps)           gradients of the whole global batch are there, not clipped yet
    after_step(handle, config, step, max_steps)            the optimizer has stepped, and neither loss nor gradient was infinite
    state(model) -> value, load_state(model, value)        what resuming needs beyond the trained parameters and the optimizer

`handle` is `finrepro.handle.Handle`. `step` counts from 0. Every rank calls all of them. `state` gives tensors, numbers, strings, and lists
and dictionaries of them, the same on every rank; `load_state` is called with the trained parameters loaded, before the first step.
What a function needs between its calls it keeps in the model; a frozen weight that may lie in parts is read and written by
`finrepro.partition.whole` and `fill`.
"""

from functools import partial
from typing import Any

from torch import nn

from finrepro.engine import Engine
from finrepro.handle import Handle
from finrepro.layers.supervised import ExtraLoss
from finrepro.schema import Choice


class Hooks:
    """The functions of one cell's adapter, and no call at all for those that it does not define."""

    def __init__(self, adapter: Choice, model: nn.Module, max_steps: int) -> None:
        names = ("extra_loss", "before_step", "after_step", "state", "load_state")
        module = adapter.module("adapters")
        self._own = {name: own for name in names if (own := getattr(module, name, None))}
        self._model, self._config, self._max_steps = model, adapter.config, max_steps
        self._handle: Handle | None = None

    @property
    def extra_loss(self) -> ExtraLoss | None:
        """The adapter's term of the objective as a function of the model, None where it has none."""
        own = self._own.get("extra_loss")
        return partial(own, config=self._config) if own else None

    def start(self, engine: Engine) -> None:
        """Take up the engine, before the first step."""
        if self._own.keys() & {"before_step", "after_step"}:
            self._handle = Handle(self._model, engine)

    def before_step(self, step: int) -> None:
        """Between the last backward pass of a step and its update."""
        if self._handle and "before_step" in self._own:
            with self._handle.gradients():
                self._own["before_step"](self._handle, self._config, step, self._max_steps)

    def after_step(self, step: int) -> None:
        """Between an update and whatever comes next, a checkpoint included."""
        if self._handle and "after_step" in self._own:
            self._own["after_step"](self._handle, self._config, step, self._max_steps)

    def state(self) -> Any:
        """What a checkpoint keeps of the adapter."""
        return self._own["state"](self._model) if "state" in self._own else None

    def load_state(self, value: Any) -> None:
        """Take up what `state` gave."""
        if "load_state" in self._own:
            self._own["load_state"](self._model, value)
