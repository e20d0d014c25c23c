"""The hooks of a cell's adapter and optimizer around each step, so that the training loop names no
method.

A hook's own state is in the model, or in the optimizer's state, which engines save; a frozen weight
that may be sharded is read and written through the view.
"""

from typing import Any

from torch import nn

from finrepro.contracts import OptimizerKind
from finrepro.kinds import adapter_of, optimizer_of
from finrepro.settings import Choice
from finrepro.training.engine_view import EngineView
from finrepro.training.engines.base import Engine


class Hooks:
    """The hooks of one cell's adapter and optimizer, each called with the model that is trained."""

    def __init__(
        self, adapter: Choice, optimizer: Choice, model: nn.Module, max_steps: int
    ) -> None:
        self._adapter = adapter_of(adapter)
        self._optimizer: OptimizerKind = optimizer_of(optimizer)
        self._model, self._max_steps = model, max_steps
        self._view: EngineView | None = None

    def start(self, engine: Engine) -> None:
        """Set the engine, before the first step."""
        self._view = EngineView(self._model, engine)

    def before_step(self, step: int) -> None:
        """Between the last backward pass of a step and its update."""
        assert self._view is not None, "the hooks have no engine yet"
        with self._view.gradients():
            self._adapter.before_step(self._view, step, self._max_steps)
            self._optimizer.before_step(self._view, step, self._max_steps)

    def after_step(self, step: int) -> None:
        """Between an update and whatever comes next, a checkpoint included."""
        assert self._view is not None, "the hooks have no engine yet"
        self._optimizer.after_step(self._view, step, self._max_steps)
        self._adapter.after_step(self._view, step, self._max_steps)

    def state(self) -> Any:
        """The adapter's state for a checkpoint."""
        return self._adapter.state(self._model)

    def load_state(self, state: Any) -> None:
        """Restore what `state` returned."""
        self._adapter.load_state(self._model, state)
