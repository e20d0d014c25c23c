"""`cell` in result.json: what a run is in the names of the catalogue, and how it was computed."""

from typing import Annotated

from typing_extensions import TypedDict

from finrepro.evidence.described import closed, of


@closed
class Attention(TypedDict):
    """Implementations of attention."""

    train: Annotated[str | None, of("in training; null: nothing was trained")]
    evaluate: Annotated[str | None, of("in evaluation; null: nothing was scored")]


@closed
class Layout(TypedDict):
    """Layout of the micro-batches."""

    used: Annotated[str | None, of("padded or bins; null: nothing was trained")]
    seconds: Annotated[
        dict[str, float], of("of a step, by layout, where they were measured to choose", "s")
    ]


@closed
class GraphDifference(TypedDict):
    """Between compiled and eager execution, as a share of the eager value."""

    loss: Annotated[float, of("of the loss")]
    gradient_norm: Annotated[float, of("of the norm of the whole gradient")]
    gradient: Annotated[float, of("of the gradient of the parameter where it is largest")]


@closed
class GraphComparison(TypedDict):
    """Compiled and eager execution of the first micro-batch on one rank."""

    loss: Annotated[float, of("eager", "nats/token")]
    compiled_loss: Annotated[float, of("compiled", "nats/token")]
    gradient_norm: Annotated[float, of("eager")]
    compiled_gradient_norm: Annotated[float, of("compiled")]
    off: Annotated[GraphDifference, of("how far compiled execution is off")]
    seconds: Annotated[float, of("of the compiled pass, compilation included", "s")]


@closed
class Tolerance(TypedDict):
    """The largest difference that is accepted."""

    loss: Annotated[float, of("of the loss and of the gradient's norm")]
    gradient: Annotated[float, of("of the gradient of any parameter")]


@closed
class Proof(TypedDict):
    """That compiled training is the same training, by a process that trained."""

    backend: Annotated[str, of("of torch.compile")]
    tolerance: Annotated[Tolerance, of("the largest difference that is accepted")]
    ranks: Annotated[list[GraphComparison], of("what was compared, by rank")]


@closed
class CellFacts(TypedDict):
    """What the run is, in the names of the catalogue, and how it was computed."""

    model: Annotated[str, of("entry of configs/models.yaml")]
    quantizer: Annotated[str, of("entry of configs/quantizers.yaml")]
    adapter: Annotated[str, of("entry of configs/adapters.yaml")]
    train_on: Annotated[str, of("entry of configs/tasks.yaml or configs/mixes.yaml")]
    seed: Annotated[int, of("of initialisation and order of examples")]
    scale: Annotated[
        str,
        of(
            "smoke: a miniature; open: a small open model; neither is set against published "
            "values; or paper"
        ),
    ]
    weights: Annotated[str, of("pretrained, random or scratch")]
    devices: Annotated[int, of("ranks, one a device")]
    batch: Annotated[int, of("in an optimizer step, over all devices", "examples")]
    device_type: Annotated[str | None, of("cpu or cuda; null: the run did not finish")]
    attention: Annotated[Attention | None, of("which attention computed")]
    layout: Annotated[Layout | None, of("which layout the micro-batches had")]
    compilation: Annotated[
        list[Proof], of("of compiled training, a proof by each process that trained")
    ]
    notes: Annotated[list[str], of("remarks for whoever reads the table")]
