"""Text to token ids: prompt and answer tokenized as one string; and the miniatures' tokenizer."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from finrepro.errors import CellFailed, UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The target of a position that is not supervised; PyTorch's and Transformers' convention.
IGNORE = -100


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of prompt and answer; the answer begins at `answer_start`, which is at least 1."""

    ids: tuple[int, ...]
    answer_start: int

    @property
    def pieces(self) -> "tuple[Encoded, ...]":
        """The parts between which there is no attention: an example is one piece, a window of
        running text has a piece a document.
        """
        return (self,)

    @property
    def piece_lengths(self) -> tuple[int, ...]:
        """The length of each piece."""
        return (len(self.ids),)

    @property
    def num_supervised(self) -> int:
        """The number of tokens of the answer, which are learned or scored."""
        return len(self.ids) - self.answer_start

    def targets(self) -> list[int]:
        """For each position the id to predict there; `IGNORE` before the prompt's last position
        and at the answer's last.
        """
        return [*[IGNORE] * (self.answer_start - 1), *self.ids[self.answer_start :], IGNORE]


def cut(text: Encoded, max_seq_len: int) -> list[Encoded]:
    """A text without a prompt, cut into sequences of at most `max_seq_len` tokens. Each begins with
    the last token of the one before, as context, so that every token is predicted exactly once.
    """
    step = max_seq_len - 1
    starts = range(0, max(1, len(text.ids) - 1), step)
    return [Encoded(text.ids[start : start + max_seq_len], 1) for start in starts]


def encode(
    tokenizer: "PreTrainedTokenizerFast",
    pairs: Sequence[tuple[str, str]],
    max_seq_len: int,
    *,
    end: bool,
) -> list[Encoded]:
    """Tokenize (prompt, answer) pairs jointly; `end` adds the end-of-text token to the answer.

    A sequence over `max_seq_len` tokens loses the beginning of its prompt (after the
    beginning-of-text token), never its answer. Raises `UsageError` if a prompt ends in a space or
    its tokens are not a prefix of the joint tokens, `CellFailed` if an answer alone is too long.
    """
    # The choices of an example share their prompt: it is tokenized once.
    unique = list(dict.fromkeys(prompt for prompt, _ in pairs))
    prompt_ids = dict(
        zip(unique, tokenizer(unique, return_attention_mask=False)["input_ids"], strict=True)
    )
    joint = tokenizer([prompt + answer for prompt, answer in pairs], return_attention_mask=False)[
        "input_ids"
    ]
    # Answers to the same prompt follow the same tokens of it, so that they can be compared: the
    # longest answer decides how much of the prompt is dropped.
    longest = dict.fromkeys(unique, 0)
    for (prompt, _), ids in zip(pairs, joint, strict=True):
        longest[prompt] = max(longest[prompt], len(ids) - len(prompt_ids[prompt]))
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    encoded = []
    for (prompt, answer), ids in zip(pairs, joint, strict=True):
        head = prompt_ids[prompt]
        if prompt.endswith(" ") or ids[: len(head)] != head:
            fault = (
                "has a space too many"
                if prompt.endswith(" ")
                else "has tokens that are not a prefix of the joint ones"
            )
            raise UsageError(
                f"the prompt ending in {prompt[-20:]!r} {fault} with the answer {answer!r}: "
                "a template must end without a space, and an answer begin with one."
            )
        if not head:  # nothing before the answer: it is predicted from the beginning-of-text token
            head, ids = [start], [start, *ids]
        if end:
            ids = [*ids, tokenizer.eos_token_id]
        excess = len(head) + longest[prompt] + end - max_seq_len
        if excess > 0:
            keep = 1 if head[0] == start else 0
            if len(head) - keep - excess < 1 - keep:
                raise CellFailed(
                    f"an answer of {len(ids) - len(head)} tokens "
                    f"does not fit max_seq_len {max_seq_len}."
                )
            ids = ids[:keep] + ids[keep + excess :]
            head = head[:keep] + head[keep + excess :]
        encoded.append(Encoded(tuple(ids), len(head)))
    return encoded


SPECIAL = {
    "gpt2": {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"},
    "llama": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"},
}


def train_tokenizer(
    texts: Iterable[str], family: str, vocab_size: int
) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, like the family's own.

    Deterministic: the same texts in the same order give the same file. Llama's adds the
    beginning-of-text token, GPT-2's does not. Raises `CellFailed` if the texts give fewer tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special: dict[str, Any] = SPECIAL[family]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=sorted(set(special.values())),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise CellFailed(
            f"the texts give {tokenizer.get_vocab_size()} tokens, the model has {vocab_size}."
        )
    if family == "llama":
        begin = special["bos_token"]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
