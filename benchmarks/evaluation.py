"""Scoring labels by log-likelihood against the usual loop: batch 1, up to ten generated tokens with
a KV cache, stop at end of text.

Same model (a miniature fine-tuned here for a few hundred steps), same prompts, same process, in
turn. The loop is the fast form of what FinGPT's and FinLoRA's evaluators do. Both answers are kept:
the labels must equal one-by-one scoring, the agreement with what was generated and parsed is
printed. A model fine-tuned on answers stops after its label, so the loop takes two steps; one that
has seen text alone goes on to the tenth token, as base models do.
"""

import dataclasses
import tempfile
from pathlib import Path
from typing import Any

from finrepro.kinds import kind_module
from finrepro.runtime import process

process.quiet_environment()

import torch  # noqa: E402
from _measure import interleaved, ratios, sized, write  # noqa: E402

from finrepro.catalogue import reader  # noqa: E402
from finrepro.catalogue.cells import expand  # noqa: E402
from finrepro.catalogue.selection import Selection  # noqa: E402
from finrepro.data import files  # noqa: E402
from finrepro.data.tokens import encode  # noqa: E402
from finrepro.evaluation.evaluate import answer  # noqa: E402
from finrepro.evidence.place import Place  # noqa: E402
from finrepro.evidence.store import open_store  # noqa: E402
from finrepro.models.build import build  # noqa: E402
from finrepro.running.base import embedded_tokenizer  # noqa: E402
from finrepro.training.checkpoint import Control  # noqa: E402
from finrepro.training.loop import train  # noqa: E402

EXAMPLES, REPEATS, TRAIN_STEPS = sized((400, 5, 200), (3, 1, 2))


def generated(model: Any, tokenizer: Any, prompts: list[str]) -> list[str]:
    """Ten tokens at most for each prompt, one prompt at a time."""
    outputs = []
    model.config.use_cache = True
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=10,
                do_sample=False,
                use_cache=True,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        outputs.append(
            tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )
    model.config.use_cache = False
    return outputs


def measure(name: str, trained_on: str, folder: Path) -> dict[str, Any]:
    """One miniature, trained on `answers` or on `text` alone: seconds of both, the ratio, and
    how the labels compare.
    """
    spec = expand(Selection("3", only=f"{name}-none-full-tfns-*", weights="random"), "smoke")[
        0
    ].spec
    settings = dataclasses.replace(
        spec.train,
        max_steps=TRAIN_STEPS,
        warmup_steps=sized(spec.train.warmup_steps, 1),
        global_batch_size=sized(spec.train.global_batch_size, 2),
    )
    spec = dataclasses.replace(spec, train=settings)
    device = process.setup(0, spec.threads)
    tokenizer = embedded_tokenizer(spec, Place(open_store(folder)))
    built = build(spec, None, device)
    (task,) = spec.tasks
    module, config = kind_module("tasks", task.task.kind), task.task.config
    splits = files.load(task.dataset, None).splits
    training = splits["train"][: sized(None, 2 * TRAIN_STEPS)]
    pairs = [
        (module.prompt(example, config), module.target(example, config)) for example in training
    ]
    if trained_on == "text":
        pairs = [("", example.text) for example in training]
    encoded = encode(tokenizer, pairs, spec.train.max_seq_len, end=True)
    train(
        built.model,
        encoded,
        spec,
        device,
        Control(lambda _: None, lambda: False, folder / "checkpoint"),
    )
    model = built.model.eval()

    examples = splits["development"][:EXAMPLES]
    prompts = [module.prompt(example, config) for example in examples]
    outputs: dict[str, Any] = {}

    def score(examples_: Any = examples) -> list[dict[str, Any]]:
        return answer(model, tokenizer, task, examples_, spec.evaluation, spec.train.max_seq_len)

    seconds = interleaved(
        {
            "generate_batch_1": lambda: outputs.update(text=generated(model, tokenizer, prompts)),
            "log_likelihood": lambda: outputs.update(rows=score()),
        },
        REPEATS,
    )
    labels = [row["prediction"] for row in outputs["rows"]]
    alone = [score((example,))[0]["prediction"] for example in examples]
    parsed = [
        module.parse(text, example, config)
        for text, example in zip(outputs["text"], examples, strict=True)
    ]
    return {
        "model": name,
        "trained_on": trained_on,
        "examples": len(examples),
        "seconds": seconds,
        "times_faster": ratios(seconds["generate_batch_1"], seconds["log_likelihood"]),
        "labels_equal_one_by_one": sum(a == b for a, b in zip(labels, alone, strict=True))
        / len(labels),
        "agreement_with_generated": sum(a == b for a, b in zip(labels, parsed, strict=True))
        / len(labels),
        "generated_unparsable": sum(label is None for label in parsed) / len(parsed),
        "distinct_labels": sorted(set(labels)),
    }


def main() -> None:
    """Measure every smoke model of Table 3."""
    smoke = reader.table("3").smoke
    assert smoke is not None
    models = sized(smoke.axes.model, smoke.axes.model[:1])
    with tempfile.TemporaryDirectory() as folder:
        results = [
            measure(name, trained_on, Path(folder))
            for name in models
            for trained_on in ("answers", "text")
        ]
    measures = (
        "times_faster",
        "labels_equal_one_by_one",
        "agreement_with_generated",
        "generated_unparsable",
    )
    write(
        "evaluation",
        {
            "results": results,
            "summary": {
                f"{r['model']}, {r['trained_on']}": {key: r[key] for key in measures}
                for r in results
            },
        },
    )


if __name__ == "__main__":
    main()
