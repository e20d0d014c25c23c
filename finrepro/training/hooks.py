"""The steps that a method takes part in: optional functions of its module, called by the training
loop, which knows no method by name.

    extra_loss(model, config) -> scalar tensor             added to the objective once a step; in no
    recorded and no evaluated loss before_step(handle, config, step, max_steps)           gradients
    of the whole global batch are there, not clipped yet after_step(handle, config, step, max_steps)
    the optimizer has stepped, and neither loss nor gradient was infinite state(model) -> value,
    load_state(model, value)        what resuming needs beyond the trained parameters and the
    optimizer

An adapter may have all of them, an optimizer `before_step` and `after_step`: what it keeps is in
its own state, which engines save. The optimizer's are called next to its update: `before_step`
after the adapter's, which measures the weights as they were, `after_step` before.

`handle` is `finrepro.training.handle.Handle`. `step` counts from 0. Every rank calls all of them.
`state` gives tensors, numbers, strings, and lists and dictionaries of them, the same on every rank;
`load_state` is called with the trained parameters loaded, before the first step. What a function
needs between its calls it keeps in the model; a frozen weight that may lie in parts is read and
written by `finrepro.runtime.zero3.whole` and `fill`.
"""

from functools import partial
from typing import Any

from torch import nn

from finrepro.methods.layers.supervised import ExtraLoss
from finrepro.settings import Choice
from finrepro.training.engines.base import Engine
from finrepro.training.handle import Handle


class Hooks:
    """The functions of one cell's adapter and optimizer, and no call at all for those that they
    do not define.
    """

    def __init__(
        self, adapter: Choice, optimizer: Choice, model: nn.Module, max_steps: int
    ) -> None:
        names = ("extra_loss", "state", "load_state")
        module, stepping = adapter.module("adapters"), optimizer.module("optimizers")
        self._own = {name: own for name in names if (own := getattr(module, name, None))}
        self._model, self._config, self._max_steps = model, adapter.config, max_steps
        both = ((module, adapter.config), (stepping, optimizer.config))
        self._before, self._after = (
            [(own, config) for each, config in order if (own := getattr(each, name, None))]
            for name, order in (("before_step", both), ("after_step", both[::-1]))
        )
        self._handle: Handle | None = None

    @property
    def extra_loss(self) -> ExtraLoss | None:
        """The adapter's term of the objective as a function of the model, None where it has
        none.
        """
        own = self._own.get("extra_loss")
        return partial(own, config=self._config) if own else None

    def start(self, engine: Engine) -> None:
        """Take up the engine, before the first step."""
        if self._before or self._after:
            self._handle = Handle(self._model, engine)

    def before_step(self, step: int) -> None:
        """Between the last backward pass of a step and its update."""
        if self._handle and self._before:
            with self._handle.gradients():
                for own, config in self._before:
                    own(self._handle, config, step, self._max_steps)

    def after_step(self, step: int) -> None:
        """Between an update and whatever comes next, a checkpoint included."""
        if self._handle:
            for own, config in self._after:
                own(self._handle, config, step, self._max_steps)

    def state(self) -> Any:
        """What a checkpoint keeps of the adapter."""
        return self._own["state"](self._model) if "state" in self._own else None

    def load_state(self, value: Any) -> None:
        """Take up what `state` gave."""
        if "load_state" in self._own:
            self._own["load_state"](self._model, value)
