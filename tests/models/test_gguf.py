"""A GGUF file becomes a checkpoint. The law: every tensor is what `gguf` decodes, to the bit; the
model computes what Transformers' own reading of the file does; the tokenizer splits text by the
rule that the file names.
"""

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import regex
import torch
from fixtures.gguf_files import ARCHITECTURE, MERGES, TOKENS, in_gguf, interleaved, write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.convert_slow_tokenizer import bytes_to_unicode

from finrepro.catalogue import reader
from finrepro.errors import EnvironmentFault
from finrepro.evidence.manifest import file_digest
from finrepro.models import packaged
from finrepro.models.build import load_tokenizer
from finrepro.models.gguf_file import GgufModel, read_gguf
from finrepro.models.gguf_tokenizer import build_tokenizer

TEXTS = [
    "the 12 in 3,142.50 at 12%",
    "up  5 points\n\n5 more\n5",
    "   three blanks, then\ttabs\t7",
    "$TSLA +12.5% -- it's the 1st of 2 in-line\r\n results  ",
    "<|im_start|>user\nthe 12<|im_end|>",
    "caf\u00e9 \u00bd \u0665 \u6f22\u5b57 \U0001f680 12",
    "",
]
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path)
    return path


def expect_equal_tensors(read: GgufModel, heads: int, pairs: int) -> None:
    """Ours, with the rows of query and key as the file has them, are those of `gguf`."""
    decoded = {
        tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
        for tensor in gguf.GGUFReader(read.path).tensors
    }
    for tensor in read.tensors:
        ours, name = tensor.decode(), in_gguf(tensor.name)
        if "attn_q" in name or "attn_k" in name:
            ours = interleaved(ours, heads if "attn_q" in name else pairs)
        assert ours.dtype == np.float32 and ours.shape == decoded[name].shape
        assert np.array_equal(ours.view(np.uint32), decoded.pop(name).view(np.uint32)), name
    assert not decoded


def expect_equal_logits(path: Path, folder: Path, ids: torch.Tensor, vocabulary: int) -> None:
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    theirs = AutoModelForCausalLM.from_pretrained(
        path.parent,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    ).eval()
    with torch.no_grad():
        logits = theirs(ids).logits
        difference = (ours(ids).logits - logits).abs().max()
    assert logits.shape[-1] == vocabulary and logits.std() > 0.1
    assert difference <= 1e-5 * logits.abs().max()


class PlainTokenizer:
    """Vocabulary and merges under the rule `smollm`, by the definition: control tokens first, every
    number alone, the rest by GPT-2's pattern, then the merges of least rank.
    """

    def __init__(self, tokens: list[str], merges: list[str], control: list[str]) -> None:
        self.ids = {token: index for index, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
        self.control, self.letters = control, bytes_to_unicode()

    def __call__(self, text: str) -> list[int]:
        found = []
        for part in re.split("(" + "|".join(map(re.escape, self.control)) + ")", text):
            if part in self.control:
                found.append(self.ids[part])
                continue
            for piece in regex.findall(r"\p{N}|\P{N}+", part):
                for word in regex.findall(GPT2, piece):
                    found += [self.ids[symbol] for symbol in self.merged(word)]
        return found

    def merged(self, word: str) -> list[str]:
        symbols = [self.letters[byte] for byte in word.encode()]
        while known := [pair for pair in pairwise(symbols) if pair in self.ranks]:
            best, joined = min(known, key=self.ranks.__getitem__), list[str]()
            while symbols:
                both = tuple(symbols[:2]) == best
                joined.append("".join(symbols[: 1 + both]))
                symbols = symbols[1 + both :]
            symbols = joined
        return symbols


TINY = PlainTokenizer(TOKENS, MERGES, TOKENS[:3])


def converted_tokenizer(path: Path, folder: Path) -> Any:
    """As a cell gets it: written, and read again by whatever Transformers makes of the folder."""
    fields = read_gguf(path).fields
    build_tokenizer(path, fields).save_pretrained(folder)
    return load_tokenizer(folder)


def test_every_tensor_is_what_gguf_decodes(file: Path) -> None:
    expect_equal_tensors(read_gguf(file), heads=6, pairs=2)


def test_the_tokenizer_is_that_of_vocabulary_and_merges_under_the_files_rule(
    file: Path, tmp_path: Path
) -> None:
    tokenizer = converted_tokenizer(file, tmp_path)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == TINY(text), text
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    names = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert (*names, tokenizer.unk_token_id, tokenizer.model_max_length) == (1, 2, 2, 0, 256)
    template = tokenizer.apply_chat_template(
        [{"role": "user", "content": "the 12"}], tokenize=False
    )
    assert template == "the 12"


def test_transformers_own_tokenizer_leaves_digits_together(file: Path) -> None:
    """Where it differs: digits after one another, after two blanks, after two line breaks."""
    theirs = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    for text, equal in {
        "the tin": True,
        "in 7": True,
        "12": False,
        "  1": False,
        "\n5": True,
        "\n\n5": False,
    }.items():
        ids = TINY(text)
        assert (theirs(text)["input_ids"] == ids) == equal, text


def test_the_settings_are_those_of_the_file(file: Path) -> None:
    config = read_gguf(file).config
    assert config["rms_norm_eps"] == 9.999999747378752e-06  # 1e-5 in float32
    plain = {key: value for key, value in ARCHITECTURE.items() if key != "rms_norm_eps"}
    assert config.items() >= plain.items()


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "architecture": ({"architecture": "qwen2"}, "architecture 'qwen2'; read here: 'llama'"),
    "type": ({"linear": "Q5_0"}, "is stored as Q5_0; read here: F32, Q4_1, Q8_0"),
    "quantization": ({"settings": {"quantization_version": 1}}, "quantization version 1"),
    "setting": (
        {"settings": {"rope.scaling.factor": 8.0}},
        "llama.rope.scaling.factor is not understood",
    ),
    "setting absent": ({"settings": {"rope.freq_base": None}}, "lacks the setting llama.rope"),
    "part of a head": ({"settings": {"rope.dimension_count": 8}}, "rotary embeddings of 8"),
    "heads": ({"settings": {"attention.head_count_kv": 3}}, "attn_k.weight has 32 rows"),
    "tensor": ({"extra_tensor": "blk.0.attn_q.bias"}, "attn_q.bias is not understood"),
    "rotary tensor": ({"extra_tensor": "rope_freqs.weight"}, "rope_freqs.weight is not"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_not_understood_is_refused_in_one_line(case: str, tmp_path: Path) -> None:
    changes, reason = BAD[case]
    write_gguf(tmp_path / "bad.gguf", **changes)
    with pytest.raises(EnvironmentFault, match=re.escape(reason)) as caught:
        read_gguf(tmp_path / "bad.gguf")
    assert "\n" not in str(caught.value) and str(tmp_path / "bad.gguf") in str(caught.value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pre": "llama-bpe"}, "tokenizer.ggml.pre is 'llama-bpe', expected 'smollm'"),
        ({"model": "llama"}, "tokenizer.ggml.model is 'llama', expected 'gpt2'"),
        ({"add_bos_token": True}, "tokenizer.ggml.add_bos_token is True, expected False"),
        ({"add_eos_token": True}, "tokenizer.ggml.add_eos_token is True: not understood"),
    ],
    ids=str,
)
def test_another_tokenizer_is_refused(change: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    write_gguf(path, tokenizer=change)
    with pytest.raises(EnvironmentFault, match=re.escape(reason)):
        build_tokenizer(path, read_gguf(path).fields)


def test_a_truncated_file_and_another_format_are_refused(file: Path, tmp_path: Path) -> None:
    content, path = file.read_bytes(), tmp_path / "bad.gguf"
    version = content[:4] + (2).to_bytes(4, "little") + content[8:]
    for wrong, reason in {
        b"": "truncated, or no GGUF",
        content[:3]: "truncated, or no GGUF",
        b"PK" + content[2:]: "truncated, or no GGUF",
        version: "GGUF version 2; read here: 3",
        content[:-1]: "truncated or damaged",
        content[: len(content) // 2]: "truncated or damaged",
        content[:3000]: "truncated or damaged",
        content[:40]: "truncated or damaged",
    }.items():
        path.write_bytes(wrong)
        with pytest.raises(EnvironmentFault, match=reason) as caught:
            read_gguf(path)
        assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_the_packaged_model_is_what_others_read(tmp_path: Path) -> None:
    """The real file: tensors, a fact it knows, and token ids on every tweet of TFNS."""
    model = reader.model("smollm2_135m")
    path = packaged.packaged_file(model)
    folder = packaged.converted(model, tmp_path, file_digest)
    read = read_gguf(path)
    expect_equal_tensors(read, heads=9, pairs=3)
    tokenizer = load_tokenizer(folder, model)
    ids = torch.tensor([tokenizer("The capital of France is")["input_ids"]])
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert tokenizer.decode(ours(ids).logits[0, -1].argmax()) == " Paris"
    tokens, merges = (read.fields[f"tokenizer.ggml.{key}"] for key in ("tokens", "merges"))
    plain = PlainTokenizer(tokens, merges, tokens[:17])
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [*TEXTS, *tweets()]
    encoded = tokenizer(texts)["input_ids"]
    others = theirs(texts)["input_ids"]
    different = [index for index, found in enumerate(encoded) if found != others[index]]
    assert sum(index >= len(TEXTS) for index in different) == 5  # tweets
    for index in {*range(100), *different}:
        assert encoded[index] == plain(texts[index]), texts[index]
    for index in different:  # by digits alone
        assert regex.search(r"\s\s?\p{N}|\p{N}\p{N}", texts[index]), texts[index]


def tweets() -> list[str]:
    from finrepro.data import files

    dataset = files.load(reader.dataset("tfns"), None)
    return [example.text for split in dataset.splits.values() for example in split]


def test_the_tiny_model_computes_what_transformers_reads(file: Path, tmp_path: Path) -> None:
    from fixtures.gguf_files import tiny_model

    read, model = read_gguf(file), tiny_model(file)
    packaged.write_checkpoint(read, model, tmp_path / "folder")
    ids = torch.arange(40)[None]
    expect_equal_logits(file, tmp_path / "folder", ids, len(TOKENS))
