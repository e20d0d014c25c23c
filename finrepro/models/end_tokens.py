"""Which tokens end a generated answer."""

from pathlib import Path
from typing import TYPE_CHECKING

from finrepro.errors import EnvironmentFault
from finrepro.models.safetensors import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

GENERATION = "generation_config.json"


def end_tokens(folder: Path | None, tokenizer: "PreTrainedTokenizerFast") -> tuple[int, ...]:
    """The tokenizer's end-of-text token, and every `eos_token_id` of the base's
    generation_config.json, in ascending order.

    Chat models end a turn with another token than a text, and list both there: Llama-3.1-Instruct
    has three. `folder` is the base's, None for random weights; without the file the tokenizer's
    token is the only one. Raises `EnvironmentFault` for a file that says something else than token
    ids.
    """
    of_model: object = None
    if folder is not None and (folder / GENERATION).is_file():
        of_model = read_json(folder / GENERATION).get("eos_token_id")
    listed = of_model if isinstance(of_model, list) else [] if of_model is None else [of_model]
    if not all(type(token) is int for token in listed):
        raise EnvironmentFault(
            f"{folder}/{GENERATION}: eos_token_id is {of_model!r}, "
            "expected a token id or a list of them."
        )
    own = tokenizer.eos_token_id
    return tuple(sorted({*listed, *([] if own is None else [int(own)])}))
