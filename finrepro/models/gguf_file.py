"""A GGUF file of a Llama model: its settings as Transformers' configuration has them, and its
tensors, decoded, in Transformers' names and order of rows.

The format is https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the package `gguf` reads
and decodes it. It trusts what it reads, so that only files with an expected sha256 come here.
"""

import math
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro.errors import EnvironmentFault

if TYPE_CHECKING:
    import numpy as np

MAGIC, VERSION, QUANTIZATION_VERSION = b"GGUF", 3, 2
STORED = ("F32", "Q4_1", "Q8_0")  # whose decoded values a test holds to the bit
ARCHITECTURE = "llama"
# Every `llama.` key that is understood: another one may change what is computed.
KEYS = (
    "attention.head_count",
    "attention.head_count_kv",
    "attention.layer_norm_rms_epsilon",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
)
NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
TENSOR = re.compile(r"(?:blk\.(?P<block>\d+)\.)?(?P<part>\w+)\.weight")


@dataclass(frozen=True, slots=True)
class GgufTensor:
    """A tensor by Transformers' name; `decode` computes its values, float32 of this shape."""

    name: str
    shape: tuple[int, ...]
    decode: "Callable[[], np.ndarray]"

    @property
    def bytes(self) -> int:
        """Of its decoded values."""
        return 4 * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class GgufModel:
    """A file's metadata by key, the configuration that they say, and the tensors."""

    path: Path
    fields: dict[str, Any]
    config: dict[str, Any]
    tensors: tuple[GgufTensor, ...]

    @property
    def bytes(self) -> int:
        """Of all tensors, decoded."""
        return sum(tensor.bytes for tensor in self.tensors)


def read_gguf(path: Path) -> GgufModel:
    """The model in a GGUF file. Raises `EnvironmentFault` for a file that is truncated, is of
    another format or version, or holds a model or tensors that are not understood here.
    """
    import gguf

    _check_version(path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, OverflowError) as error:  # UnicodeDecodeError too
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise EnvironmentFault(f"{path}: truncated or damaged GGUF file ({reason}).") from None
    _check_fields(path, fields)
    tied = all(tensor.name != "output.weight" for tensor in reader.tensors)
    config = _config(path, fields, tied)
    tensors = tuple(_tensor(path, tensor, config) for tensor in reader.tensors)
    return GgufModel(path, fields, config, tensors)


def _check_version(path: Path) -> None:
    """Raise `EnvironmentFault` unless the file begins as GGUF of the version that is read here."""
    try:
        with path.open("rb") as file:
            start = file.read(8)
    except OSError as error:
        raise EnvironmentFault(f"{path}: cannot be read ({error.strerror}).") from None
    if len(start) < 8 or start[:4] != MAGIC:
        raise EnvironmentFault(f"{path}: truncated, or no GGUF file.")
    version = struct.unpack("<I", start[4:])[0]
    if version != VERSION:
        raise EnvironmentFault(f"{path}: GGUF version {version}; read here: {VERSION}.")


def _check_fields(path: Path, fields: dict[str, Any]) -> None:
    architecture = fields.get("general.architecture")
    if architecture != ARCHITECTURE:
        raise EnvironmentFault(
            f"{path}: a GGUF file of architecture {architecture!r}; read here: {ARCHITECTURE!r}."
        )
    quantization = fields.get("general.quantization_version", QUANTIZATION_VERSION)
    if quantization != QUANTIZATION_VERSION:
        raise EnvironmentFault(
            f"{path}: quantization version {quantization}; read here: {QUANTIZATION_VERSION}."
        )
    prefix = f"{ARCHITECTURE}."
    unknown = {key for key in fields if key.startswith(prefix)} - {prefix + key for key in KEYS}
    if unknown:
        raise EnvironmentFault(f"{path}: the setting {min(unknown)} is not understood here.")


def _config(path: Path, fields: dict[str, Any], tied: bool) -> dict[str, Any]:
    """The content of config.json."""

    def value(key: str) -> Any:
        if f"{ARCHITECTURE}.{key}" not in fields:
            raise EnvironmentFault(f"{path}: lacks the setting {ARCHITECTURE}.{key}.")
        return fields[f"{ARCHITECTURE}.{key}"]

    heads, width = value("attention.head_count"), value("embedding_length")
    if width % heads or value("rope.dimension_count") != width // heads:
        raise EnvironmentFault(
            f"{path}: rotary embeddings of {value('rope.dimension_count')} of the "
            f"{width / heads:g} dimensions of a head are not understood here."
        )
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "attention_bias": False,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "dtype": "float32",
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "intermediate_size": value("feed_forward_length"),
        "max_position_embeddings": value("context_length"),
        "mlp_bias": False,
        "num_attention_heads": heads,
        "num_hidden_layers": value("block_count"),
        "num_key_value_heads": value("attention.head_count_kv"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "rms_norm_eps": value("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_type": "default", "rope_theta": value("rope.freq_base")},
        "tie_word_embeddings": tied,
        "vocab_size": value("vocab_size"),
    }


def _tensor(path: Path, tensor: Any, config: dict[str, Any]) -> GgufTensor:
    match = TENSOR.fullmatch(tensor.name)
    if match is None or match["part"] not in NAMES:
        raise EnvironmentFault(f"{path}: the tensor {tensor.name} is not understood here.")
    if tensor.tensor_type.name not in STORED:
        raise EnvironmentFault(
            f"{path}: {tensor.name} is stored as {tensor.tensor_type.name}; "
            f"read here: {', '.join(STORED)}."
        )
    prefix = f"model.layers.{match['block']}." if match["block"] else ""
    heads = {
        "attn_q": config["num_attention_heads"],
        "attn_k": config["num_key_value_heads"],
    }.get(match["part"])
    shape = tuple(int(size) for size in reversed(tensor.shape))
    if heads and shape[0] != heads * config["head_dim"]:
        raise EnvironmentFault(
            f"{path}: {tensor.name} has {shape[0]} rows, "
            f"{heads} heads have {heads * config['head_dim']}."
        )
    name = f"{prefix}{NAMES[match['part']]}.weight"
    return GgufTensor(name, shape, partial(_decoded, tensor, heads))


def _decoded(tensor: Any, heads: int | None) -> "np.ndarray":
    """A tensor's values in float32, contiguous; rows of `heads` heads in Transformers' order.

    GGUF's rotary embedding turns neighbouring rows of a head, Transformers' turns a row of its
    first half with one of its second: the file has the rows of each head interleaved.
    """
    import gguf
    import numpy as np

    values = gguf.dequantize(tensor.data, tensor.tensor_type)
    if heads:
        paired = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
        values = paired.swapaxes(1, 2).reshape(values.shape)
    return np.ascontiguousarray(values, dtype="<f4")
