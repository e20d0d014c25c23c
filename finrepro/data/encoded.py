"""Examples that are tokenized once a process: the cells of a table share tokenizers and data."""

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from finrepro.data.tokens import Encoded, encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CAPACITY = 8  # sets of examples: training and test of a few tasks, for two tokenizers


@dataclass(frozen=True)
class Packed:
    """Encoded examples in two flat arrays, 4 bytes a token, so that what is kept for later cells
    hardly adds to the memory that theirs is measured as.
    """

    ids: "array[int]"
    bounds: "array[int]"  # where each example begins in `ids`, and the end of the last one
    answer_starts: "array[int]"

    @classmethod
    def of(cls, examples: Sequence[Encoded]) -> "Packed":
        """The examples, packed."""
        ids, bounds = array("i"), array("q", [0])
        for example in examples:
            ids.extend(example.ids)
            bounds.append(len(ids))
        return cls(ids, bounds, array("i", [example.answer_start for example in examples]))

    def unpacked(self) -> list[Encoded]:
        """The examples again."""
        return [
            Encoded(tuple(self.ids[start:end]), answer_start)
            for (start, end), answer_start in zip(
                pairwise(self.bounds), self.answer_starts, strict=True
            )
        ]


_packed: OrderedDict[bytes, Packed] = OrderedDict()  # the least recently used one is first


def encode_once(
    tokenizer: "PreTrainedTokenizerFast",
    pairs: Sequence[tuple[str, str]],
    max_seq_len: int,
    *,
    end: bool,
) -> list[Encoded]:
    """As `finrepro.data.tokens.encode`, from memory where this process has encoded equal pairs
    with an equal tokenizer before.
    """
    key = _key(tokenizer, pairs, max_seq_len, end)
    if key in _packed:
        _packed.move_to_end(key)
        return _packed[key].unpacked()
    examples = encode(tokenizer, pairs, max_seq_len, end=end)
    _packed[key] = Packed.of(examples)
    if len(_packed) > CAPACITY:
        _packed.popitem(last=False)
    return examples


def _key(
    tokenizer: "PreTrainedTokenizerFast",
    pairs: Sequence[tuple[str, str]],
    max_seq_len: int,
    end: bool,
) -> bytes:
    """sha256 of everything that the token ids depend on."""
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    digest = hashlib.sha256(repr((special, max_seq_len, end)).encode())
    digest.update(tokenizer.backend_tokenizer.to_str().encode())
    digest.update(repr(pairs).encode())
    return digest.digest()
