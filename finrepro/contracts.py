"""The contracts of the kinds: what a module in one of their folders has to define, and what it may.

A kind is one module, whose file name is the `kind` of catalogue entries. It has no base class and
is registered nowhere: it defines functions and constants of the names below, and its settings as a
class `Config`. An abstract method, or a name without a value, is required; all else has the default
below. A function takes its contract's parameters in their order, and `config`, if it needs its
settings, anywhere among them. `finrepro.kinds` finds the modules, checks each against its contract
and binds it to settings: `adapter_of(spec.adapter).apply(model, spec.seed)`.

`Model` is an entry of models.yaml, `nn.Module` a model of torch. What lists, plans or tabulates
imports no torch: modules import it inside of functions that compute.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from finrepro.settings import Choice

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn
    from torch.optim import Optimizer

    from finrepro.catalogue.published import Published
    from finrepro.catalogue.spec import Model, RunSpec, Train
    from finrepro.data.examples import Example, Splits
    from finrepro.methods.optimizer_view import OptimizerView
    from finrepro.reporting.cell_result import CellResult
    from finrepro.reporting.curves import Chart
    from finrepro.reporting.dots import Panel
    from finrepro.reporting.table import Table


@runtime_checkable
class StepHooks(Protocol):
    """A method's hooks around each step, counted from 0. An optimizer's are nearest to its update:
    `before_step` after the adapter's, `after_step` before it.
    """

    def before_step(self, view: "OptimizerView", step: int, max_steps: int) -> None:
        """Between the last backward pass of a step and the clipping of its gradients."""
        return

    def after_step(self, view: "OptimizerView", step: int, max_steps: int) -> None:
        """After an update whose loss and gradient were finite."""
        return


@runtime_checkable
class Configured(Protocol):
    """A kind with settings: `config` is what it is bound to, an instance of its `Config`."""

    Config: type[Any]  # frozen and strict (`@settings`)
    config: Any


@runtime_checkable
class Prepare(Protocol):
    """A layer's weight (out, in), float32 -> the weight to quantize instead, and named tensors.
    `quantized`: a weight -> its value after quantization.
    """

    def __call__(
        self, name: str, weight: "Tensor", quantized: "Callable[[Tensor], Tensor]", seed: int
    ) -> "tuple[Tensor, dict[str, Tensor]]": ...


@runtime_checkable
class ExtraLoss(Protocol):
    """A scalar that is added to the objective once a step, and to no loss that is recorded."""

    def __call__(self, model: "nn.Module") -> "Tensor": ...


@runtime_checkable
class ReadExport(Protocol):
    """The base with the export in `folder` on it."""

    def __call__(self, model: "nn.Module", folder: Path) -> "nn.Module": ...


@runtime_checkable
class Adapter(Configured, StepHooks, Protocol):
    """Which parameters are trained, and what is exported."""

    WHOLE_MODEL: bool = False  # the export is a model by itself
    RESETS_MOMENTS: bool = False  # the optimizer has to know how to zero its moments
    NOT_EXPORTED: Mapping[str, str] = {}  # format of an export -> why it is refused
    prepare: Prepare | None = None  # called for each layer of `config.target_modules`
    extra_loss: ExtraLoss | None = None
    read: ReadExport | None = None  # None: PEFT reads the export

    @abstractmethod
    def supports(self, model: "Model", quantizer: Choice, zero_stage: int) -> str | None:
        """Why it cannot adapt a model stored so; None if it can."""

    @abstractmethod
    def trainable_parameters(self, model: "Model") -> int:
        """How many numbers are trained, from the architecture alone; 0: the cell trains nothing."""

    @abstractmethod
    def apply(
        self, model: "nn.Module", seed: int, prepared: "dict[str, dict[str, Tensor]] | None" = None
    ) -> "nn.Module":
        """The adapted model, all else frozen. `prepared`, layer -> tensors, is from `prepare`."""

    @abstractmethod
    def export(self, model: "nn.Module", folder: Path) -> None:
        """Write what was trained: a PEFT folder, if nothing below says else."""

    def supports_training(self, train: "Train") -> str | None:
        """Why these training settings cannot do; None if they can."""
        return None

    def not_compiled(self) -> str | None:
        """Why torch.compile cannot trace it; None if it can."""
        return None

    def exported_parameters(self, model: "Model", max_steps: int) -> int:
        """How many numbers the exported file holds."""
        return self.trainable_parameters(model)

    def lr_scale(self, name: str) -> float:
        """The factor to the learning rate of the parameter of this name."""
        return 1.0

    def lr_factor(self, step: int, max_steps: int) -> float:
        """The factor to the schedule's learning rate at a step."""
        return 1.0

    def state(self, model: "nn.Module") -> Any:
        """What resuming needs beside trained parameters and optimizer, the same on every rank:
        tensors, numbers, strings, lists and dicts of them.
        """
        return None

    def load_state(self, model: "nn.Module", state: Any) -> None:
        """Restore `state`, with the trained parameters loaded, before the first step."""
        return

    def own_base(self, quantizer: Choice) -> str | None:
        """Why `apply` leaves another base than the quantizer made; None if it does not."""
        return None

    def on_own_base(self, weights: Path, folder: Path) -> Path:
        """The folder of the export on that base: `weights`, or `folder`, written from them."""
        return weights


@runtime_checkable
class Linear(Protocol):
    """A frozen layer around a stored weight, with the bias (out,) of the layer it replaces."""

    def __call__(self, stored: Any, bias: "Tensor | None") -> "nn.Module": ...


@runtime_checkable
class WeightOf(Protocol):
    """The weight (out, in) that a layer of `linear` stands for, in the dtype that it had."""

    def __call__(self, layer: Any) -> "Tensor": ...


@runtime_checkable
class Quantizer(Configured, Protocol):
    """How a linear layer's weight is stored and multiplied."""

    KEPT_APART: str | None = None  # what a method that reads a layer's weight would miss
    BESIDE: tuple[str, ...] = ()  # names of a layer's tensors that only this package reads; its
    # method `as_frozen_lora()` gives (A, B) of what they add to the layer that Transformers makes
    NOT_EXPORTED: Mapping[str, str] = {}  # format of an export -> why it is refused
    linear: Linear | None  # None: layers stay as they are
    weight: WeightOf | None = None  # None: no dense weight computes what such a layer does

    @abstractmethod
    def encode(self, weight: "Tensor") -> Any:
        """The stored form of a weight (out, in), on its device."""

    @abstractmethod
    def decode(self, stored: Any) -> "Tensor":
        """The weight (out, in) that a stored form stands for."""

    @abstractmethod
    def stored_bytes(self, stored: Any) -> int:
        """Bytes of a stored form with its scales."""

    @abstractmethod
    def layer_bytes(self, inputs: int, outputs: int, dtype_bits: int) -> int:
        """The same, from the sizes alone; `dtype_bits` are those of the model's dtype."""

    def supports(self, model: "Model", quantizer: Choice, zero_stage: int) -> str | None:
        """Why it cannot store a model at a ZeRO stage; None if it can."""
        return None

    def not_compiled(self) -> str | None:
        """Why torch.compile cannot trace its layers; None if it can."""
        return None

    def note(self, device_type: str) -> str | None:
        """What a reader of the results has to know; None if nothing."""
        return None

    def loading(self) -> dict[str, Any]:
        """Arguments of Transformers' BitsAndBytesConfig that make or read such layers."""
        return {}

    def own_base(self) -> str | None:
        """Why these arguments give another base than the run's; None if they do not."""
        return None


@runtime_checkable
class OptimizerKind(Configured, StepHooks, Protocol):
    """How the trained parameters are stepped."""

    @abstractmethod
    def build(self, named_parameters: "list[tuple[str, nn.Parameter]]", lr: float) -> "Optimizer":
        """torch's optimizer over the trained parameters, at learning rate `lr`."""

    def supports(self, spec: "RunSpec") -> str | None:
        """Why a cell that trains cannot be stepped by it; None if it can."""
        return None


@runtime_checkable
class DatasetFormat(Configured, Protocol):
    """How a dataset's files are read."""

    def needed(self, split: str) -> tuple[str, ...]:
        """The roles of the files, keys of `config.files`, that a split is made of."""
        return (split,)

    @abstractmethod
    def read(self, contents: dict[str, bytes], name: str) -> "Splits":
        """Split -> examples, from the bytes of each role; `name` is the dataset's."""


@runtime_checkable
class TaskFamily(Configured, Protocol):
    """What a model is asked, how its answer is read, and how answers are scored."""

    @abstractmethod
    def prompt(self, example: "Example") -> str:
        """The text that the model continues."""

    @abstractmethod
    def target(self, example: "Example") -> str:
        """The continuation to learn."""

    @abstractmethod
    def choices(self, example: "Example") -> tuple[str, ...] | None:
        """The answers of which the likeliest is taken; None: generated, or the text is scored."""

    def new_tokens(self) -> int | None:
        """The most tokens of an answer that is generated; None where none is."""
        return None

    @abstractmethod
    def parse(self, output: str, example: "Example") -> str | None:
        """The prediction in an answer; None if it cannot be read: counted, never dropped."""

    @abstractmethod
    def cluster(self, example: "Example") -> str:
        """What the bootstrap resamples: examples of one cluster are one observation."""

    @abstractmethod
    def constant_answers(self) -> tuple[str, ...]:
        """Names of the answers that need no model."""

    @abstractmethod
    def constant(self, answer: str, example: "Example") -> str:
        """The prediction of a constant answer."""

    @abstractmethod
    def tally(self, rows: Sequence[dict[str, Any]]) -> "np.ndarray":
        """(rows, cells), from `gold` and `prediction`: summed over rows, all that `score` needs."""

    @abstractmethod
    def score(self, sums: "np.ndarray") -> "dict[str, np.ndarray]":
        """Metric -> values (...), from summed tallies."""


@runtime_checkable
class Report(Protocol):
    """A table of cells: its rows are cells joined with their results."""

    @abstractmethod
    def build(
        self, rows: "Sequence[CellResult]", scale: str, published: "Sequence[Published]"
    ) -> "Table":
        """The table."""

    def panels(self, rows: "Sequence[CellResult]") -> "tuple[Panel, ...]":
        """Its figure of dots with intervals; empty where it has none."""
        return ()

    def charts(self, rows: "Sequence[CellResult]") -> "tuple[Chart, ...]":
        """Its figure of curves; empty where it has none."""
        return ()


@runtime_checkable
class ComputedReport(Protocol):
    """A table without cells, from models' sizes (`finrepro.sizes.account`)."""

    @abstractmethod
    def build(self, accounts: Sequence[dict[str, Any]], settings: Any) -> "Table":
        """The table."""

    @abstractmethod
    def charts(self, accounts: Sequence[dict[str, Any]]) -> "tuple[Chart, ...]":
        """Its figure of curves."""
