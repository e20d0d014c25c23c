"""Law: an answer about entities means the same places to whoever writes and whoever reads it,
and is scored as seqeval scores tags.
"""

import dataclasses

import numpy as np
import pytest
from fixtures.model import broken
from hypothesis import given, settings
from hypothesis import strategies as st

from finrepro.catalogue import reader
from finrepro.data import files
from finrepro.data.examples import Example
from finrepro.kinds import kind_module
from finrepro.statistics.bootstrap import intervals, paired_differences

SPEC = reader.task("fin_ner", "short")
TASK, CONFIG = kind_module("tasks", SPEC.task.kind), SPEC.task.config
SPLITS = files.load(SPEC.dataset, None).splits
TAGS = ["O", "I-PER", "I-ORG", "I-LOC"]
# Few different words, so that names repeat and overlap; many lengths.
SENTENCES = st.lists(
    st.tuples(st.sampled_from(["a", "A", "aa", "b", ",", "PER", "#1"]), st.sampled_from(TAGS)),
    min_size=1,
    max_size=14,
)


def sentence(text: str, tags: str = "") -> Example:
    return Example(id="x", text=text, label=tags or " ".join("O" for _ in text.split(" ")))


def scores(examples: tuple[Example, ...], predictions: list[str | None]) -> dict[str, float]:
    rows = [{"gold": e.label, "prediction": p} for e, p in zip(examples, predictions, strict=True)]
    return {
        key: float(value)
        for key, value in TASK.score(TASK.tally(rows, CONFIG).sum(0), CONFIG).items()
    }


def right(example: Example) -> None:
    assert TASK.parse(TASK.target(example, CONFIG), example, CONFIG) == TASK.span_text(
        TASK.spans(example.label)
    )


@settings(deadline=None, derandomize=True, max_examples=400)
@given(words=SENTENCES)
def test_the_right_answer_is_read_as_the_gold_entities(words: list[tuple[str, str]]):
    right(sentence(" ".join(token for token, _ in words), " ".join(tag for _, tag in words)))


def test_without_the_number_of_the_occurrence_another_place_is_read(
    monkeypatch: pytest.MonkeyPatch,
):
    """The planted mutant: the number matters where the next place of a name is not the one
    meant.
    """
    example = sentence("the Lender and the Lender", "O O O O I-PER")
    assert TASK.target(example, CONFIG) == " Lender, PER #2"
    assert TASK.parse("Lender, PER", example, CONFIG) == "1-1/PER"
    law = TASK.target
    monkeypatch.setattr(TASK, "target", lambda *given: law(*given).split(" #")[0])
    broken(right, example)


def test_every_sentence_of_the_corpus_is_answered_to_the_point():
    for examples in SPLITS.values():
        for example in examples:
            right(example)


def test_no_right_answer_is_cut_with_the_tokens_of_gpt2(data_dir):
    from tokenizers import ByteLevelBPETokenizer

    folder = data_dir / "gpt2_tokenizer"
    tokenizer = ByteLevelBPETokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    lengths = [
        len(tokenizer.encode(TASK.target(e, CONFIG)).ids) for rows in SPLITS.values() for e in rows
    ]
    assert max(lengths) == 121 and max(lengths) + 1 <= TASK.new_tokens(CONFIG)


def test_the_corpus_has_the_published_counts():
    config = SPEC.dataset.config
    kept = dataclasses.replace(config, types=("PER", "ORG", "LOC", "MISC"), dropped=())
    contents = {
        role: path.read_bytes()
        for role, (_, path) in (files.locate(SPEC.dataset, None) or {}).items()
    }
    whole = kind_module("datasets", SPEC.dataset.kind).read(contents, "fin_ner", kept)
    assert {split: len(rows) for split, rows in whole.items()} == {"train": 1164, "test": 303}
    assert {split: len({e.source for e in rows}) for split, rows in whole.items()} == {
        "train": 5,
        "test": 3,
    }

    def count(rows: tuple[Example, ...]) -> dict[str, int]:
        kinds = [kind for example in rows for *_, kind in TASK.spans(example.label)]
        return {kind: kinds.count(kind) for kind in sorted(set(kinds))}

    assert count(whole["train"]) == {"LOC": 171, "MISC": 7, "ORG": 243, "PER": 747}
    assert count(whole["test"]) == {"LOC": 39, "MISC": 7, "ORG": 56, "PER": 216}
    assert count(SPLITS["test"]) == {"LOC": 39, "ORG": 56, "PER": 216}
    assert sum(not TASK.spans(e.label) for e in SPLITS["test"]) == 205, (
        "sentences without an entity are kept"
    )
    for rows in SPLITS.values():
        assert all(len(e.text.split(" ")) == len(e.label.split(" ")) for e in rows)


def test_the_embedded_files_are_those_of_the_data_folder(data_dir):
    for file in SPEC.dataset.config.files.values():
        original = data_dir / "ner_fin" / file.path.rpartition("/")[2]
        assert original.read_bytes() == (files.EMBEDDED / file.path).read_bytes()


def test_the_development_split_is_one_agreement():
    assert {e.source for e in SPLITS["development"]} == {"train 5"}
    assert "train 5" not in {e.source for e in SPLITS["train"]}


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("Ann Lee, PER", "0-1/PER"),
        ("  Ann  Lee , per \n", "0-1/PER"),
        ("AnnLee, PER", "0-1/PER"),  # white space is not compared
        ("Acme, Inc., ORG", "4-6/ORG"),
        ("Ann, PER\nAnn, PER", "0-0/PER 8-8/PER"),
        ("Ann, PER #2\nAnn, PER #1", "8-8/PER 0-0/PER"),
        ("Ann, PER\nAnn, PER #1", "0-0/PER ?/PER"),  # a repeated place
        ("Ann, PER\nAnn, ORG #1", "0-0/PER 0-0/ORG"),
        ("Ann, PER #3", "?/PER"),
        ("Acme, ORG\nLee, PER", "4-4/ORG ?/PER"),  # Lee stands before Acme only
        ("Ann, PER\nAnn Lee, PER", "0-0/PER ?/PER"),
        ("Bob, PER", "?/PER"),
        ("An, PER", "?/PER"),  # whole tokens
        ("ann, PER", "?/PER"),
        ("Ann, PER\nblah blah", "0-0/PER ?"),
        ("Ann, PER\nnone", "0-0/PER ?"),
        ("Ann, DATE\nLee, PER", "? 1-1/PER"),
        ("Ann, PER\n\nText: more, ORG", "0-0/PER"),  # the first paragraph counts
        ("none", ""),
        (" None.", ""),
        ("none\n\nAnn, PER", ""),
        ("none\nnone", None),
        ("", None),
        (" \n\n ", None),
        ("Ann", None),
        (", PER", None),
        ("Ann, PER #0", None),
        ("Ann, PER and Lee, PERSON", None),
        ("There are no entities.", None),
        ("," * 50_000, None),
        (" " * 50_000 + "a, b", None),
    ],
)
def test_a_line_is_one_place_or_a_wrong_claim(output: str, said: str | None):
    assert TASK.parse(output, sentence("Ann Lee runs the Acme , Inc. with Ann"), CONFIG) == said


@settings(deadline=None, derandomize=True, max_examples=300)
@given(
    pairs=st.lists(
        st.lists(st.tuples(*[st.sampled_from(TAGS)] * 2), min_size=1, max_size=12),
        min_size=1,
        max_size=6,
    )
)
def test_the_scores_are_seqevals(pairs: list[list[tuple[str, str]]]):
    import warnings

    from seqeval.metrics import f1_score, precision_score, recall_score

    gold = [[one for one, _ in each] for each in pairs]
    said = [[two for _, two in each] for each in pairs]
    examples = tuple(sentence(" ".join("w" for _ in tags), " ".join(tags)) for tags in gold)
    ours = scores(examples, [TASK.span_text(TASK.spans(" ".join(tags))) for tags in said])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about what is undefined: 0, here as there
        for name, law in (
            ("f1", f1_score),
            ("precision", precision_score),
            ("recall", recall_score),
        ):
            assert ours[f"{name}_entity"] == pytest.approx(law(gold, said, zero_division=0))
        kinds = sorted({kind for tags in gold + said for _, _, kind in TASK.spans(" ".join(tags))})
        if kinds:
            by_type = dict(
                zip(kinds, f1_score(gold, said, average=None, zero_division=0), strict=True)
            )
            for kind in CONFIG.types:
                assert ours[f"f1_{kind.lower()}"] == pytest.approx(by_type.get(kind, 0.0))


def test_a_wrong_answer_scores_less_than_one_and_rambling_costs_precision():
    examples = SPLITS["test"]
    answers = [TASK.target(example, CONFIG) for example in examples]
    perfect = scores(
        examples, [TASK.parse(a, e, CONFIG) for a, e in zip(answers, examples, strict=True)]
    )
    assert perfect == {**dict.fromkeys(perfect, 1.0), "unparsable_rate": 0.0}
    number = next(n for n, example in enumerate(examples) if TASK.spans(example.label))
    rambling = [*answers[:number], answers[number] + "\nand so on", *answers[number + 1 :]]
    worse = scores(
        examples, [TASK.parse(a, e, CONFIG) for a, e in zip(rambling, examples, strict=True)]
    )
    assert worse["precision_entity"] == pytest.approx(311 / 312) and worse["recall_entity"] == 1
    said = [TASK.parse(a, e, CONFIG) for a, e in zip(answers, examples, strict=True)]
    silent = scores(examples, [*said[:number], None, *said[number + 1 :]])
    assert silent["f1_entity"] < 1 and silent["unparsable_rate"] == pytest.approx(1 / 303)


def test_silence_is_wrong_where_there_is_nothing_to_find():
    examples = (sentence("nothing here"), sentence("Ann", "I-PER"))
    assert scores(examples, ["", "0-0/PER"])["f1_entity"] == 1
    assert scores(examples, [None, "0-0/PER"])["precision_entity"] == 0.5


def test_the_constant_answers_are_those_of_the_corpus():
    examples = SPLITS["test"]
    nothing, known = TASK.constant_answers(CONFIG)
    assert set(
        scores(examples, [TASK.constant(nothing, e, CONFIG) for e in examples]).values()
    ) == {0.0}
    found = scores(examples, [TASK.constant(known, e, CONFIG) for e in examples])
    assert (
        found["recall_entity"] == pytest.approx((129 + 62) / 311) and found["precision_entity"] == 1
    )
    assert found["f1_entity"] == pytest.approx(0.761, abs=5e-4)


@pytest.mark.parametrize("template", reader.entries("tasks")["fin_ner"]["templates"])
def test_a_repeated_prompt_finds_nothing(template: str):
    config = reader.task("fin_ner", template).task.config
    examples = SPLITS["test"]
    prompts = [TASK.prompt(example, config) for example in examples]
    assert all(prompt == prompt.rstrip() and "{text}" not in prompt for prompt in prompts)
    for outputs in (prompts, [prompt + prompt for prompt in prompts]):
        found = scores(
            examples, [TASK.parse(o, e, config) for o, e in zip(outputs, examples, strict=True)]
        )
        assert found["f1_entity"] == found["recall_entity"] == 0


def test_intervals_resample_sentences_and_the_gain_over_the_constant_is_paired():
    examples = SPLITS["test"]
    rows = [
        {"gold": e.label, "prediction": TASK.span_text(TASK.spans(e.label)[:1])} for e in examples
    ]
    known = [
        {"gold": e.label, "prediction": TASK.constant(TASK.constant_answers(CONFIG)[1], e, CONFIG)}
        for e in examples
    ]
    clusters = [TASK.cluster(e) for e in examples]
    assert len(set(clusters)) == 299
    options = {"resamples": 300, "confidence": 0.95, "seed": 0}
    one, two = TASK.tally(rows, CONFIG), TASK.tally(known, CONFIG)
    interval = intervals(one, clusters, lambda sums: TASK.score(sums, CONFIG), **options)[
        "f1_entity"
    ]
    assert 0 < interval.low < interval.value < interval.high < 1
    gain = paired_differences(one, two, clusters, lambda sums: TASK.score(sums, CONFIG), **options)[
        "f1_entity"
    ]
    assert gain.low < gain.value < gain.high
    assert np.isfinite([gain.low, gain.high]).all()


def test_the_task_generates():
    assert (
        TASK.choices(SPLITS["test"][0], CONFIG) is None
        and TASK.new_tokens(CONFIG) == CONFIG.max_new_tokens
    )
