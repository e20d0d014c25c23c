"""The tokenizer that a GGUF file describes: its vocabulary and merges under the rule by which it
says that text is split.

Transformers knows some of those rules. For one that it does not know it takes GPT-2's without a
word, and other token ids come of it.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from finrepro.errors import EnvironmentFault

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PREFIX = "tokenizer.ggml."
# Settings that are understood, and the only value of those that have one.
EXPECTED: dict[str, Any] = {
    "model": "gpt2",  # byte-level BPE
    "pre": "smollm",
    "add_space_prefix": False,
    "add_bos_token": False,
}
READ = (
    "tokens",
    "token_type",
    "merges",
    *(f"{role}_token_id" for role in ("bos", "eos", "unknown", "padding")),
)
NORMAL, CONTROL = 1, 3  # kinds of tokens; a control token is never made of text


def build_tokenizer(path: Path, fields: dict[str, Any]) -> "PreTrainedTokenizerFast":
    """The tokenizer of a GGUF file with these metadata, and its chat template. Raises
    `EnvironmentFault` naming a setting that is not understood.
    """
    from transformers import PreTrainedTokenizerFast

    settings = {
        key.removeprefix(PREFIX): value for key, value in fields.items() if key.startswith(PREFIX)
    }
    for key, value in settings.items():
        if key not in READ and EXPECTED.get(key) != value:
            expected = f", expected {EXPECTED[key]!r}" if key in EXPECTED else ""
            raise EnvironmentFault(
                f"{path}: {PREFIX}{key} is {value!r}{expected}: not understood here."
            )
    absent = [
        key for key in ("model", "pre", "tokens", "token_type", "merges") if key not in settings
    ]
    if absent:
        raise EnvironmentFault(f"{path}: lacks the setting {PREFIX}{absent[0]}.")
    tokens = settings["tokens"]
    names = {
        f"{ours}_token": tokens[settings[f"{role}_token_id"]]
        for ours, role in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"{role}_token_id" in settings
    }
    return PreTrainedTokenizerFast(
        tokenizer_object=_backend(path, settings),
        model_max_length=fields["llama.context_length"],
        chat_template=fields.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        **names,
    )


def _backend(path: Path, settings: dict[str, Any]) -> "Tokenizer":
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, kinds = settings["tokens"], settings["token_type"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    merges = [tuple(merge.split(" ")) for merge in settings["merges"]]
    if len(vocabulary) != len(tokens) or len(kinds) != len(tokens) or set(map(len, merges)) - {2}:
        raise EnvironmentFault(f"{path}: the vocabulary or its merges are damaged.")
    if set(kinds) - {NORMAL, CONTROL}:
        raise EnvironmentFault(
            f"{path}: tokens of the kinds {sorted(set(kinds) - {NORMAL, CONTROL})} "
            "are not understood here."
        )
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    # The rule `smollm`: every digit stands alone, the rest is split as GPT-2's is.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in control])
    return tokenizer
