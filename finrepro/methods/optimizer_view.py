"""What the hooks of a method see of training: gradients, weights and moments, gathered on every
engine. `finrepro.training.engine_view` implements it.
"""

from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from torch import Tensor, nn


@runtime_checkable
class OptimizerView(Protocol):
    """The training of one model. Values and gradients are full tensors (gathered where sharded),
    float32, of the parameter's shape, and copies: nothing changes but by `set`, `set_frozen`,
    `change_state` and `reset_state`. All ranks make the same calls, in the same order.
    """

    model: "nn.Module"
    trained: "dict[str, nn.Parameter]"  # the trained parameters, by their names in `model`

    def gradient(self, parameter: "nn.Parameter") -> "Tensor":
        """The gradient of the whole global batch, not clipped yet; zero where there is none.

        Raises `RuntimeError` outside of `before_step`.
        """

    def rate(self, parameter: "nn.Parameter") -> float:
        """The learning rate of a trained parameter in this step."""

    def value(self, parameter: "nn.Parameter") -> "Tensor":
        """A trained parameter as the optimizer holds it: in float32, also a bfloat16 one."""

    def set(self, parameter: "nn.Parameter", value: "Tensor") -> None:
        """Overwrite a trained parameter, in the model and where the optimizer holds it; its moments
        are unchanged.
        """

    def reset_state(
        self, parameters: "nn.Parameter | Iterable[nn.Parameter]", *, steps: bool = True
    ) -> None:
        """Zero the moments of trained parameters, and with `steps` the step count of the bias
        correction, which may belong to a whole group of the optimizer.

        Raises `ValueError` for an incomplete group, `TypeError` for an optimizer with other state
        than moments of the weight's shape and a step.
        """

    def change_state(
        self, parameter: "nn.Parameter", change: "Callable[[dict[str, Tensor]], dict[str, Tensor]]"
    ) -> None:
        """Replace the moments of a trained parameter, name -> tensor, first moment first, by what
        `change` returns. Raises `TypeError` as `reset_state` does.
        """

    def whole(self, parameter: "nn.Parameter") -> "Tensor":
        """A copy of any weight in its own dtype, gathered where it is sharded."""

    def set_frozen(self, parameter: "nn.Parameter", value: "Tensor") -> None:
        """Overwrite a frozen weight, also a sharded one. Raises `ValueError` for a trained one."""
