"""The lines of a run's .jsonl files, each a JSON object: losses, samples of the monitor, and one
prediction an example in each of the three ways that a task is answered.
"""

from typing import Annotated

from typing_extensions import TypedDict

from finrepro.evidence.described import closed, of


@closed
class LossLine(TypedDict):
    """loss.jsonl: an optimizer step."""

    step: Annotated[int, of("from 0")]
    loss: Annotated[float, of("mean over the supervised tokens of the global batch", "nats/token")]
    grad_norm: Annotated[float, of("norm of the gradient before it is clipped")]
    lr: Annotated[float, of("learning rate of the step")]
    seconds: Annotated[float, of("since training began, over all attempts", "s")]


@closed
class SystemLine(TypedDict):
    """system.jsonl: a sample of what the process uses, one a second."""

    time: Annotated[float, of("since 1970, UTC", "s")]
    cpu_utilization_percentage: Annotated[float, of("of one core; above 100 on several", "%")]
    process_memory_gib: Annotated[float, of("resident size of the process", "GiB")]
    system_memory_usage_percentage: Annotated[float, of("of the machine's memory", "%")]


@closed
class ChosenLine(TypedDict):
    """predictions.jsonl, of a task with choices: the likeliest is the prediction."""

    task: Annotated[str, of("the task")]
    id: Annotated[str, of("of the example: dataset/split/number")]
    gold: Annotated[str, of("the label")]
    prediction: Annotated[str | None, of("the label of the likeliest choice")]
    logprobs: Annotated[dict[str, float], of("by choice, summed over its tokens", "nats")]


@closed
class GeneratedLine(TypedDict):
    """predictions.jsonl, of a task that is answered freely."""

    task: Annotated[str, of("the task")]
    id: Annotated[str, of("of the example: dataset/split/number")]
    gold: Annotated[str, of("the label")]
    output: Annotated[str, of("what the model wrote, greedily")]
    prediction: Annotated[str | None, of("what the task reads in it; null: nothing")]


@closed
class TextLine(TypedDict):
    """predictions.jsonl, of a task of language modelling."""

    task: Annotated[str, of("the task")]
    id: Annotated[str, of("of the text: dataset/split/number")]
    logprob: Annotated[float, of("of the text, summed over its tokens", "nats")]
    tokens: Annotated[int, of("that were predicted", "tokens")]
    bytes: Annotated[int, of("of the text in UTF-8", "bytes")]
