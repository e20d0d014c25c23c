"""CoNLL files of one token a line and its entity tag, an empty line after each sentence,
`-DOCSTART-` before each document.

Written for FIN (Salinas Alvarado, Verspoor and Baldwin, 2015), whose tags are IO: `I-PER` inside a
person, `O` outside, so that two entities of one type side by side are one.
"""

from finrepro.data.examples import Example, Splits
from finrepro.data.files import DatasetConfig, check_rows
from finrepro.data.text_fields import decoded
from finrepro.errors import EnvironmentFault
from finrepro.settings import Count, settings

DOCUMENT = "-DOCSTART-"


@settings
class Config(DatasetConfig):
    """`files` maps a split to its file. A tag's type is one of `types`, or one of `dropped`, which
    are read as outside.
    """

    token_column: Count
    tag_column: Count
    types: tuple[str, ...]
    dropped: tuple[str, ...]


def read(contents: dict[str, bytes], name: str, config: Config) -> Splits:
    """Split name -> sentences in file order, those without an entity included.

    `text` is the tokens and `label` the tags, both joined by single spaces; `source` names the
    document. Raises `EnvironmentFault` on a malformed line, an unknown tag, or another number of
    sentences than recorded.
    """
    splits: dict[str, tuple[Example, ...]] = {}
    for split, content in contents.items():
        examples: list[Example] = []
        document = 0
        for block in decoded(content, name, split).split("\n\n"):
            lines = [line.split(" ") for line in block.split("\n") if line]
            if not lines:
                continue
            if lines[0][config.token_column] == DOCUMENT:
                document += 1
                continue
            try:
                tokens = [fields[config.token_column] for fields in lines]
                tags = [_tag(fields[config.tag_column], config) for fields in lines]
            except (IndexError, KeyError) as error:
                raise EnvironmentFault(
                    f"dataset '{name}', split '{split}', sentence {len(examples)}: "
                    f"no such column or tag ({error})."
                ) from None
            examples.append(
                Example(
                    id=f"{name}/{split}/{len(examples)}",
                    text=" ".join(tokens),
                    label=" ".join(tags),
                    source=f"{split} {document}",
                )
            )
        check_rows(name, split, config.files[split], len(examples), "sentences")
        splits[split] = tuple(examples)
    return splits


def _tag(tag: str, config: Config) -> str:
    """The tag, that of a dropped type as `O`. Raises `KeyError` for an unknown one."""
    prefix, _, kind = tag.partition("-")
    if tag == "O" or (prefix in ("I", "B") and kind in config.dropped):
        return "O"
    if prefix not in ("I", "B") or kind not in config.types:
        raise KeyError(tag)
    return tag
