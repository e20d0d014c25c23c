"""CoNLL files of one token a line and its entity tag, an empty line after each sentence,
`-DOCSTART-` before each document.

Written for FIN (Salinas Alvarado, Verspoor and Baldwin, 2015), whose tags are IO: `I-PER` inside a
person, `O` outside, so that two entities of one type side by side are one.
"""

from finrepro.catalogue.spec import Hub
from finrepro.data.examples import Example, Splits
from finrepro.data.files import Development, File, check_rows
from finrepro.errors import EnvironmentFault
from finrepro.settings import Count, settings

DOCUMENT = "-DOCSTART-"


@settings
class Config:
    """`files` maps a split to its file; a tag's type is one of `types`, or one of `dropped` and
    then read as outside.
    """

    version: int
    title: str
    licence: str
    embedded: bool
    hub: Hub | None
    files: dict[str, File]
    token_column: Count
    tag_column: Count
    types: tuple[str, ...]
    dropped: tuple[str, ...]
    development: Development


def needed(split: str, config: Config) -> tuple[str, ...]:
    """The files that a split is made of: its own."""
    return (split,)


def read(contents: dict[str, bytes], name: str, config: Config) -> Splits:
    """Split name -> sentences in file order, those without an entity too.

    `text` is the tokens and `label` the tags, both joined by single spaces; `source` names the
    document. Raises `EnvironmentFault` on a line or tag that is none, or another number of
    sentences.
    """
    splits: dict[str, tuple[Example, ...]] = {}
    for split, content in contents.items():
        examples: list[Example] = []
        document = 0
        for block in content.decode("utf-8").split("\n\n"):
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
                    f"dataset '{name}', split '{split}', sentence {len(examples)}: no such column or tag ({error})."
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
    """The tag, a dropped type's as `O`. Raises `KeyError` for another."""
    prefix, _, kind = tag.partition("-")
    if tag == "O" or (prefix in ("I", "B") and kind in config.dropped):
        return "O"
    if prefix not in ("I", "B") or kind not in config.types:
        raise KeyError(tag)
    return tag
