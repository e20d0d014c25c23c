"""Tokens. The law: a prompt's tokens are a prefix of its joint tokens with any answer, targets
stand over the answer alone, cutting never touches the answer, and a tokenizer is a function of
its texts."""

import hashlib
import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from fixtures.model import MINIATURES, in_processes, process, texts, tokenizer  # noqa: F401

from finrepro.catalogue import reader
from finrepro.data import files
from finrepro.data.corpora.folders import copy_tokenizer
from finrepro.data.tokenizer_files import FILES, is_bare_gpt2, tokenizer_digest, version_of
from finrepro.data.tokens import IGNORE, SPECIAL, Encoded, encode, train_tokenizer
from finrepro.errors import CellFailed, UsageError
from finrepro.evidence.place import Place
from finrepro.kinds import kind_module
from finrepro.models.build import load_tokenizer
from finrepro.running.base import open_base

FAMILIES = tuple(SPECIAL)
ASKED = tuple(
    (name, template)
    for name, entry in reader.entries("tasks").items()
    for template in (entry.get("templates") or ("",))
)
AWKWARD = (
    "",
    " ",
    "ends in a space ",
    "ends in a line\n",
    "$AAPL +3.5% \U0001f680\U0001f680 \u2014 caf\u00e9 \u5e02\u573a",
    "tab\tand \u00a0 hard space",
    "{braces} and 'quotes' \"too\"",
    "1234567890" * 30,
    "<|endoftext|> in the text",
)


@cache
def miniature_tokenizer(name: str, place: Place) -> Any:
    """The tokenizer that a miniature is really given."""
    return open_base(reader.pretraining(reader.model(name)), place)[1]


@pytest.fixture(scope="session")
def empty_place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    from finrepro.evidence.store import open_store

    return Place(open_store(tmp_path_factory.mktemp("tokens")))


@pytest.fixture(scope="session")
def real_gpt2(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """GPT-2's own tokenizer, from the files that stand in its checkpoint."""
    source = data_dir / "gpt2_tokenizer"
    if not source.is_dir():
        pytest.skip(f"FINREPRO_DATA_DIR is {data_dir}, which has no gpt2_tokenizer/")
    folder = tmp_path_factory.mktemp("gpt2")
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((source / name).read_bytes())
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    return load_tokenizer(folder)


def questions(name: str, template: str, folder: Path | None) -> list[tuple[str, str]]:
    """Each (prompt, answer) that the task asks: of the development and the test split, and over
    awkward texts.
    """
    spec = reader.task(name, template)
    module, config = kind_module("tasks", spec.task.kind), spec.task.config
    available = tuple(
        name
        for name in ("development", "test")
        if files.dataset_missing_reason(spec.dataset, folder, (name,)) is None
    )
    splits = files.load(spec.dataset, folder, available).splits
    examples = [
        example
        for name in available
        for example in splits[name][: 60 if name == "development" else 240]
    ]
    examples += [
        type(examples[0])(id=f"x/{i}", text=text, label=examples[0].label)
        for i, text in enumerate(AWKWARD)
    ]
    return [
        (module.prompt(example, config), answer)
        for example in examples
        for answer in module.choices(example, config) or (module.target(example, config),)
    ]


def prompts_are_prefixes(tokens: Any, pairs: list[tuple[str, str]]) -> None:
    """The law, without `encode`: cut the joint tokens where the prompt's end and both halves
    read as they were written.
    """
    for (prompt, answer), encoded in zip(
        pairs, encode(tokens, pairs, 10**6, end=False), strict=True
    ):
        head = tokens(prompt)["input_ids"] or [tokens.bos_token_id]
        joint = tokens(prompt + answer)["input_ids"]
        assert list(encoded.ids[: encoded.answer_start]) == head
        assert list(encoded.ids[len(encoded.ids) - len(joint) :]) == joint
        if prompt and answer:
            assert tokens.decode(encoded.ids[encoded.answer_start :]) == answer


def folder_for(name: str, request: pytest.FixtureRequest) -> Path | None:
    """None if the task's data is embedded, else the data directory, or a visible skip."""
    embedded = reader.task(
        name, next((t for n, t in ASKED if n == name), "")
    ).dataset.config.embedded
    return None if embedded else request.getfixturevalue("data_dir")


@pytest.mark.parametrize(("name", "template"), ASKED)
@pytest.mark.parametrize("model", MINIATURES)
def test_a_prompts_tokens_are_a_prefix_with_every_tasks_template_and_answer(
    model: str, name: str, template: str, request: pytest.FixtureRequest, empty_place: Place
) -> None:
    prompts_are_prefixes(
        miniature_tokenizer(model, empty_place),
        questions(name, template, folder_for(name, request)),
    )


@pytest.mark.parametrize(("name", "template"), ASKED)
def test_a_prompts_tokens_are_a_prefix_with_gpt2s_real_tokenizer(
    name: str, template: str, request: pytest.FixtureRequest, real_gpt2: Any
) -> None:
    assert len(real_gpt2) == 50257
    prompts_are_prefixes(real_gpt2, questions(name, template, folder_for(name, request)))


def test_gpt2s_real_tokenizer_makes_one_token_of_each_label(real_gpt2: Any) -> None:
    labels = (" negative", " neutral", " positive")
    encoded = encode(real_gpt2, [("Answer:", label) for label in labels], 64, end=True)
    assert [example.ids for example in encoded] == [
        (33706, 25, token, 50256) for token in (4633, 8500, 3967)
    ]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("answer", [" positive", "positive"])
def test_a_template_that_ends_in_a_space_is_refused(family: str, answer: str) -> None:
    with pytest.raises(UsageError, match="must end without a space"):
        encode(tokenizer(family), [("Sentiment: ", answer)], 64, end=True)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_prompt_that_merges_with_its_answer_is_refused(family: str) -> None:
    vocabulary = sorted(tokenizer(family).get_vocab())
    merged = next(
        token for token in vocabulary if token.isascii() and token.isalpha() and len(token) > 1
    )
    with pytest.raises(UsageError, match="not a prefix"):
        encode(tokenizer(family), [(merged[:-1], merged[-1])], 64, end=True)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("end", [True, False])
def test_targets_stand_over_the_answer_alone(family: str, end: bool) -> None:
    tokens = tokenizer(family)
    (encoded,) = encode(tokens, [("Shares fell.\nSentiment:", " negative")], 64, end=end)
    answer = [
        *tokens(" negative", add_special_tokens=False)["input_ids"],
        *([tokens.eos_token_id] if end else []),
    ]
    targets = encoded.targets()
    assert len(targets) == len(encoded.ids)
    assert targets[: encoded.answer_start - 1] == [IGNORE] * (encoded.answer_start - 1)
    assert targets[encoded.answer_start - 1 : -1] == answer
    assert targets[-1] == IGNORE
    assert encoded.num_supervised == len(answer) == sum(target != IGNORE for target in targets)
    assert all(
        following == target
        for target, following in zip(targets, encoded.ids[1:], strict=False)
        if target != IGNORE
    )


def cut_is_lawful(full: Encoded, cut: Encoded, limit: int, begin: int | None) -> None:
    """At most `limit` tokens; the answer and the beginning-of-text token are there; the prompt's
    end is what is kept.
    """
    assert len(cut.ids) == min(limit, len(full.ids))
    assert cut.ids[cut.answer_start :] == full.ids[full.answer_start :]
    head = cut.ids[: cut.answer_start]
    assert head
    if begin is not None:
        assert head[0] == begin
        head = head[1:]
    assert not head or full.ids[: full.answer_start][-len(head) :] == head


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_keeps_the_answer_and_the_beginning_of_text(family: str) -> None:
    tokens = tokenizer(family)
    pair = ("The company reported net sales of EUR 12 mn in the quarter.\nSentiment:", " positive")
    (full,) = encode(tokens, [pair], 10**6, end=True)
    begin = tokens.bos_token_id if family == "llama" else None
    shortest = full.num_supervised + 1
    for limit in range(shortest, len(full.ids) + 2):
        (cut,) = encode(tokens, [pair], limit, end=True)
        cut_is_lawful(full, cut, limit, begin)
    with pytest.raises(CellFailed, match=f"does not fit max_seq_len {shortest - 1}"):
        encode(tokens, [pair], shortest - 1, end=True)
    limit = len(full.ids) - 3
    for mutant in (
        Encoded(full.ids[:limit], full.answer_start),  # cut at the end: the answer is lost
        Encoded(full.ids[3:], full.answer_start - 3),  # cut at the beginning, with its token
        full,
    ):
        if mutant is not full and mutant.ids[0] == full.ids[3] and begin is None:
            continue  # GPT-2 has no beginning-of-text token to lose
        with pytest.raises(AssertionError):
            cut_is_lawful(full, mutant, limit, begin)


@pytest.mark.parametrize("family", FAMILIES)
def test_with_an_empty_prompt_the_first_token_is_predicted_from_the_beginning_of_text(
    family: str,
) -> None:
    tokens = tokenizer(family)
    text = "Oil prices rise."
    (encoded,) = encode(tokens, [("", text)], 64, end=True)
    plain = tokens(text, add_special_tokens=False)["input_ids"]
    assert encoded.ids == (tokens.bos_token_id, *plain, tokens.eos_token_id)
    assert encoded.answer_start == 1
    assert encoded.targets() == [*plain, tokens.eos_token_id, IGNORE]


def test_llama_begins_a_text_with_its_token_and_gpt2_does_not() -> None:
    assert set(FAMILIES) == {"gpt2", "llama"}
    for family, begins in (("llama", True), ("gpt2", False)):
        tokens = tokenizer(family)
        ids = tokens("Oil prices rise.")["input_ids"]
        assert (ids[0] == tokens.bos_token_id) is begins
        assert tokens.bos_token_id not in ids[1:]
        assert tokens.decode(ids, skip_special_tokens=True) == "Oil prices rise."


@pytest.mark.parametrize("model", MINIATURES)
def test_a_miniatures_tokenizer_has_exactly_its_vocabulary_and_its_special_tokens(
    model: str, empty_place: Place
) -> None:
    tokens, architecture = miniature_tokenizer(model, empty_place), reader.model(model).architecture
    assert len(tokens) == tokens.vocab_size == architecture["vocab_size"]
    assert sorted(tokens.get_vocab().values()) == list(range(architecture["vocab_size"]))
    assert (tokens.bos_token_id, tokens.eos_token_id) == (
        architecture["bos_token_id"],
        architecture["eos_token_id"],
    )


def test_too_few_texts_for_the_vocabulary_are_refused() -> None:
    with pytest.raises(CellFailed, match="the model has 512"):
        train_tokenizer(["a few words"], "gpt2", 512)


DIGESTS = """
import sys, tempfile
from pathlib import Path
from fixtures.model import texts
from finrepro.data.tokenizer_files import tokenizer_digest
from finrepro.data.tokens import SPECIAL, train_tokenizer
for family in SPECIAL:
    folder = Path(tempfile.mkdtemp())
    train_tokenizer(texts(), family, 512).save_pretrained(folder)
    print(family, tokenizer_digest(folder))
"""


@pytest.mark.slow
def test_the_same_texts_give_the_same_tokenizer_file_in_every_process(tmp_path: Path) -> None:
    for family in FAMILIES:
        tokenizer(family).save_pretrained(tmp_path / family)
    available = "".join(f"{family} {tokenizer_digest(tmp_path / family)}\n" for family in FAMILIES)
    assert in_processes(DIGESTS, [(), ()], ["1", "2024"]) == [available, available]
    assert len({tokenizer_digest(tmp_path / family) for family in FAMILIES}) == len(FAMILIES)


def test_a_digest_of_version_1_is_of_the_vocabulary_and_changes_with_its_texts(
    tmp_path: Path,
) -> None:
    tokenizer("gpt2").save_pretrained(tmp_path / "one")
    train_tokenizer(texts()[:700], "gpt2", 512).save_pretrained(tmp_path / "two")
    old = hashlib.sha256((tmp_path / "one" / "tokenizer.json").read_bytes()).hexdigest()
    assert tokenizer_digest(tmp_path / "one", version=1) == old
    for version in (1, 2):
        digests = [tokenizer_digest(tmp_path / name, version) for name in ("one", "two")]
        assert digests[0] != digests[1] and {version_of(str(each)) for each in digests} == {version}


def test_a_digest_is_of_every_file_that_tokenizes(tmp_path: Path) -> None:
    tokenizer("gpt2").save_pretrained(tmp_path)
    digests = {tokenizer_digest(tmp_path)}
    for name in FILES:
        if name in ("tokenizer.json", "tokenizer_config.json"):
            continue
        (tmp_path / name).write_text("{}", encoding="utf-8")
        digests.add(tokenizer_digest(tmp_path))
    assert len(digests) == len(FILES) - 1
    assert len({tokenizer_digest(tmp_path, version=1) for _ in digests}) == 1


def test_a_digest_sees_the_settings_that_tokenize_and_no_other(tmp_path: Path) -> None:
    tokenizer("gpt2").save_pretrained(tmp_path)
    path, digest = tmp_path / "tokenizer_config.json", tokenizer_digest(tmp_path)
    values = json.loads(path.read_text(encoding="utf-8"))

    def with_(settings: dict[str, Any], **options: Any) -> str | None:
        path.write_text(json.dumps(settings, **options), encoding="utf-8")
        return tokenizer_digest(tmp_path)

    assert with_(dict(reversed(values.items())), indent=7) == digest
    assert with_(values | {"chat_template": "x", "name_or_path": "/y"}) == digest
    changes = ({"eos_token": "a"}, {"add_prefix_space": True}, {"add_bos_token": True})
    assert len({digest, *(with_(values | change) for change in changes)}) == 1 + len(changes)


def test_two_files_of_gpt2_and_their_copy_with_the_settings_added_are_one_tokenizer(
    tmp_path: Path,
) -> None:
    source = tmp_path / "source"
    source.mkdir()
    (source / "vocab.json").write_text("{}")
    (source / "merges.txt").write_text("")
    assert is_bare_gpt2(source)
    copy_tokenizer(source, tmp_path)
    copy = tmp_path / "tokenizer"
    assert (copy / "tokenizer_config.json").is_file() and not is_bare_gpt2(copy)
    assert tokenizer_digest(copy) == tokenizer_digest(source)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_tokenizer_is_read_back_the_same(family: str, tmp_path: Path) -> None:
    tokenizer(family).save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    pairs = [(text, " positive") for text in AWKWARD if text.strip()]
    pairs = [pair for pair in pairs if not pair[0].endswith(" ")]
    assert encode(again, pairs, 64, end=True) == encode(tokenizer(family), pairs, 64, end=True)
    assert (again.bos_token_id, again.eos_token_id) == (
        tokenizer(family).bos_token_id,
        tokenizer(family).eos_token_id,
    )
