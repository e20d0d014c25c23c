"""Score a model on a task: per-example answers, metrics with intervals, and the best constant
answer beside them.
"""

import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from finrepro.catalogue.spec import Evaluation, TaskSpec
from finrepro.data.encoded import encode_once
from finrepro.data.examples import Example
from finrepro.data.tokens import cut, encode
from finrepro.errors import NotFinite
from finrepro.evaluation.generation import generate
from finrepro.evaluation.log_likelihood import choice_log_likelihoods, text_log_likelihoods
from finrepro.evaluation.share_out import Progress
from finrepro.kinds import task_of
from finrepro.statistics.bootstrap import Interval, intervals, paired_differences

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerFast

Row = dict[str, Any]  # one example's answer, as a line of predictions.jsonl


@dataclass(frozen=True)
class Evaluated:
    """A task's scores (`{task, metric, value, low, high, n, constant, ...}`) and per-example
    rows.
    """

    scores: list[dict[str, Any]]
    rows: list[Row]


def evaluate(
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerFast",
    task: TaskSpec,
    examples: Sequence[Example],
    settings: Evaluation,
    max_seq_len: int,
    progress: Progress | None = None,
    ends: Collection[int] | None = None,
) -> Evaluated:
    """Answer every example and score the answers. The model is left in evaluation mode.

    `ends` are the tokens that end a generated answer (None: the tokenizer's end of text).

    Every rank of a cell calls it with the same arguments; the examples are shared out, and every
    rank gets the whole result.
    """
    model.eval()
    rows = answer(model, tokenizer, task, examples, settings, max_seq_len, progress, ends)
    return Evaluated(score_rows(task, examples, rows, settings), rows)


def answer(
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerFast",
    task: TaskSpec,
    examples: Sequence[Example],
    settings: Evaluation,
    max_seq_len: int,
    progress: Progress | None = None,
    ends: Collection[int] | None = None,
) -> list[Row]:
    """One row an example, in the order of the examples.

    With choices: the choice with the largest summed log-probability (no length norm; the first of
    equals) is the prediction. Without, in a task that has `new_tokens`: what its `parse` reads in
    the generated text, None where it reads nothing. Else: the text's own log-probability. Raises
    `NotFinite`, on every rank, when a log-probability, or a logit of a generated token, is NaN or
    infinite: the likeliest of such choices would be the first.
    """
    family = task_of(task.task)
    if family.new_tokens() is not None:
        return _generated(model, tokenizer, task, examples, settings, max_seq_len, progress, ends)
    prompts = [family.prompt(example) for example in examples]
    options = [family.choices(example) or () for example in examples]
    rows: list[Row] = []
    common = [{"task": task.task.name, "id": example.id} for example in examples]
    if not options[0]:
        pairs = [
            (prompt, family.target(example))
            for prompt, example in zip(prompts, examples, strict=True)
        ]
        parts = [
            cut(text, max_seq_len) for text in encode(tokenizer, pairs, sys.maxsize, end=False)
        ]
        all_parts = [part for of in parts for part in of]
        logprobs_of = iter(text_log_likelihoods(model, all_parts, settings.max_tokens, progress))
        for row, (_, text), of in zip(common, pairs, parts, strict=True):
            logprob = sum(next(logprobs_of) for _ in of)
            expect_finite(str(row["id"]), [logprob])
            tokens = sum(part.num_supervised for part in of)
            rows.append({**row, "logprob": logprob, "tokens": tokens, "bytes": len(text.encode())})
        return rows
    pairs = [
        (prompt, choice)
        for prompt, choices in zip(prompts, options, strict=True)
        for choice in choices
    ]
    encoded = iter(encode_once(tokenizer, pairs, max_seq_len, end=False))
    items = [[next(encoded) for _ in choices] for choices in options]
    answered = choice_log_likelihoods(model, items, settings.max_tokens, progress)
    for row, example, choices, values in zip(common, examples, options, answered, strict=True):
        expect_finite(example.id, values)
        prediction = family.parse(choices[int(np.argmax(values))], example)
        logprobs = dict(zip((choice.strip() for choice in choices), values, strict=True))
        rows.append({**row, "gold": example.label, "prediction": prediction, "logprobs": logprobs})
    return rows


def _generated(
    model: "nn.Module",
    tokenizer: "PreTrainedTokenizerFast",
    task: TaskSpec,
    examples: Sequence[Example],
    settings: Evaluation,
    max_seq_len: int,
    progress: Progress | None,
    ends: Collection[int] | None,
) -> list[Row]:
    """Rows of a task that is answered freely, greedily.

    Prompt and answer together have at most `max_seq_len` tokens, as in training: an answer ends
    there at the latest. A prompt loses its beginning where it would leave an answer less than half
    of them, or than `new_tokens`.
    """
    family = task_of(task.task)
    new_tokens = family.new_tokens()
    assert new_tokens is not None
    pairs = [(family.prompt(example), "") for example in examples]
    room = max_seq_len - min(new_tokens, max_seq_len // 2)
    prompts = [prompt.ids for prompt in encode_once(tokenizer, pairs, room, end=False)]
    limits = [min(new_tokens, max_seq_len - len(prompt)) for prompt in prompts]
    end_tokens = [tokenizer.eos_token_id] if ends is None else ends
    answers = generate(model, prompts, limits, end_tokens, settings.max_tokens, progress)
    rows = []
    for example, ids in zip(examples, answers, strict=True):
        if ids is None:
            raise NotFinite(f"{example.id}: a logit of its answer is NaN or infinite.")
        output = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        prediction = family.parse(output, example)
        row = {"task": task.task.name, "id": example.id, "gold": example.label}
        rows.append({**row, "output": output, "prediction": prediction})
    return rows


def expect_finite(example_id: str, logprobs: Sequence[float]) -> None:
    """Raises `NotFinite` when a log-probability of the example is NaN or infinite."""
    for logprob in logprobs:
        if not math.isfinite(logprob):
            raise NotFinite(f"{example_id}: the log-probability of an answer is {logprob}.")


def score_rows(
    task: TaskSpec, examples: Sequence[Example], rows: Sequence[Row], settings: Evaluation
) -> list[dict[str, Any]]:
    """Metrics of given answers, from the rows alone: an auditor recomputes them without a model.

    Raises `NotFinite` for one that is too large to be a number, as the perplexity at 710 nats a
    token.
    """
    family = task_of(task.task)
    options: dict[str, Any] = {
        "resamples": settings.resamples,
        "confidence": settings.confidence,
        "seed": settings.seed,
    }
    clusters = [family.cluster(example) for example in examples]
    tally = family.tally(rows)
    for metric, value in family.score(tally.sum(0)).items():
        if not np.isfinite(value):
            raise NotFinite(f"{task.task.name}: its {metric} is {value}.")
    constants = {}
    for reply in family.constant_answers():
        predictions = [family.constant(reply, e) for e in examples]
        constants[reply] = family.tally(
            [{**row, "prediction": p} for row, p in zip(rows, predictions, strict=True)]
        )
    gains: dict[str, dict[str, Interval]] = {}  # over each constant answer that is some best one
    scores = []
    for metric, interval in intervals(tally, clusters, family.score, **options).items():
        entry: dict[str, Any] = {
            "task": task.task.name,
            "metric": metric,
            "value": interval.value,
            "low": interval.low,
            "high": interval.high,
            "n": len(rows),
            "constant": None,
            "constant_answer": None,
        }
        if constants:
            sign = -1 if metric == "unparsable_rate" else 1
            best = max(
                constants,
                key=lambda reply: sign * float(family.score(constants[reply].sum(0))[metric]),
            )
            if best not in gains:
                gains[best] = paired_differences(
                    tally, constants[best], clusters, family.score, **options
                )
            gain = gains[best][metric]
            entry |= {
                "constant": float(family.score(constants[best].sum(0))[metric]),
                "constant_answer": best,
                "gain": gain.value,
                "gain_low": gain.low,
                "gain_high": gain.high,
            }
        scores.append(entry)
    return scores
