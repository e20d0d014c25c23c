"""Small corpora of token shards, written from ids without a tokenizer."""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from finrepro.data.corpora.index import FORMAT, INDEX, Index, dtype_for
from finrepro.data.corpora.stream import TokenStream, open_corpus
from finrepro.data.preparing.writer import PREPARING, SplitWriter, write_durably
from finrepro.settings import plain

START, VOCABULARY = 0, 512


def random_documents(seed: int, count: int, longest: int = 40, vocabulary: int = VOCABULARY) -> list[list[int]]:
    """Documents of 2 to `longest` tokens, the start token first and nowhere else."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(2, longest + 1, count).tolist()
    return [[START, *generator.integers(1, vocabulary, length - 1).tolist()] for length in lengths]


def write_corpus(
    folder: Path, splits: dict[str, Sequence[Sequence[int]]], capacity: int = 100, vocabulary: int = VOCABULARY
) -> Path:
    """A corpus of these documents; ids stand for their own text."""
    (folder / PREPARING).mkdir(parents=True)
    dtype = dtype_for(vocabulary)
    written = {}
    for name, documents in splits.items():
        writer = SplitWriter(folder, name, dtype, capacity)
        for document in documents:
            ids = np.array(document, dtype)
            writer.add(hashlib.sha256(ids.tobytes()).digest(), 3 * len(ids), ids)
        written[name] = writer.finish()
    index = Index(
        format=FORMAT, tokenizer="0" * 64, vocabulary=vocabulary, start_id=START, dtype=dtype, shard_tokens=capacity,
        splits=written, source={}, options={}, counts={},
    )  # fmt: skip
    write_durably(folder / INDEX, plain(index))
    return folder


def stream_of(folder: Path, documents: Sequence[Sequence[int]], capacity: int = 100) -> TokenStream:
    """The stream of these documents as a training split."""
    return open_corpus(write_corpus(folder, {"train": documents}, capacity)).stream()
