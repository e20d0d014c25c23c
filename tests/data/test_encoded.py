"""Examples that are tokenized once a process."""

from typing import Any

import pytest

from finrepro.data import encoded
from finrepro.data.encoded import CAPACITY, Packed, encode_once
from finrepro.data.tokens import Encoded, encode, train_tokenizer

PAIRS = [(f"The share of firm {number} rose. Mood:", " positive") for number in range(20)]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is really encoded, with nothing remembered before."""
    seen: list[Any] = []
    monkeypatch.setattr(encoded, "_packed", type(encoded._packed)())

    def recorded(tokenizer: Any, pairs: Any, max_seq_len: int, *, end: bool) -> list[Encoded]:
        seen.append((pairs, max_seq_len, end))
        return encode(tokenizer, pairs, max_seq_len, end=end)

    monkeypatch.setattr(encoded, "encode", recorded)
    return seen


def tokenizer(family: str = "gpt2", vocab_size: int = 270) -> Any:
    texts = [prompt + answer for prompt, answer in PAIRS]
    return train_tokenizer(texts, family, vocab_size)


def test_equal_pairs_are_encoded_once_also_with_an_equal_tokenizer(calls: list[Any]) -> None:
    first = encode_once(tokenizer(), PAIRS, 64, end=True)
    again = encode_once(tokenizer(), list(PAIRS), 64, end=True)
    assert len(calls) == 1
    assert again == first == encode(tokenizer(), PAIRS, 64, end=True)
    assert again is not first


def test_whatever_changes_the_ids_is_encoded_anew(calls: list[Any]) -> None:
    encode_once(tokenizer(), PAIRS, 64, end=True)
    others = [
        (tokenizer(), PAIRS, 64, False),
        (tokenizer(), PAIRS, 12, True),
        (tokenizer(), PAIRS[:-1], 64, True),
        (tokenizer("llama"), PAIRS, 64, True),
        (tokenizer(vocab_size=272), PAIRS, 64, True),
    ]
    for number, (other, pairs, length, end) in enumerate(others, start=2):
        assert encode_once(other, pairs, length, end=end) == encode(other, pairs, length, end=end)
        assert len(calls) == number


def test_only_the_latest_sets_are_kept(calls: list[Any]) -> None:
    one = tokenizer()
    for length in range(20, 20 + CAPACITY + 1):
        encode_once(one, PAIRS, length, end=True)
    encode_once(one, PAIRS, 20 + CAPACITY, end=True)
    assert len(calls) == CAPACITY + 1
    encode_once(one, PAIRS, 20, end=True)
    assert len(calls) == CAPACITY + 2


def test_packing_keeps_every_id_and_the_beginning_of_the_answer() -> None:
    examples = [Encoded((1, 2, 128_255), 2), Encoded((7,), 1), Encoded((5, 6), 1)]
    assert Packed.of(examples).unpacked() == examples
    assert Packed.of([]).unpacked() == []
