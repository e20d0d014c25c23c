"""Running text, one paragraph a line: the layout of WikiText, whose headings stand between equals
signs.

An example is a paragraph. Where a file has its headings, the article that a paragraph belongs to is
its `source`: paragraphs of an article are one observation.
"""

import re

from finrepro.catalogue.spec import Hub
from finrepro.data.examples import Example, Splits
from finrepro.data.files import Development, File, check_rows
from finrepro.errors import EnvironmentFault
from finrepro.settings import Positive, settings

ARTICLE = re.compile(r"= ([^=].*?) =")  # " = Robert Boulter = "; sections have more signs
HEADING = re.compile(r"=.*=")


@settings
class Config:
    """`files` maps a split to its file, whose rows are its paragraphs.

    `articles` names the splits whose files have headings, with how many of their articles are taken
    (null: all).
    """

    version: int
    title: str
    licence: str
    embedded: bool
    hub: Hub | None
    files: dict[str, File]
    articles: dict[str, Positive | None]
    development: Development


def needed(split: str, config: Config) -> tuple[str, ...]:
    """The files that a split is made of: its own."""
    return (split,)


def read(contents: dict[str, bytes], name: str, config: Config) -> Splits:
    """Split name -> paragraphs in file order. Raises `EnvironmentFault` on a file that is no
    UTF-8 text.
    """
    splits = {}
    for split, content in contents.items():
        try:
            lines = content.decode("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise EnvironmentFault(
                f"dataset '{name}', split '{split}': no UTF-8 text ({error})."
            ) from None
        examples: list[Example] = []
        article = ""
        for line in map(str.strip, lines):
            if found := ARTICLE.fullmatch(line):
                article = found[1] if split in config.articles else ""
            elif line and not HEADING.fullmatch(line):
                examples.append(
                    Example(
                        id=f"{name}/{split}/{len(examples)}", text=line, label="", source=article
                    )
                )
        check_rows(name, split, config.files[split], len(examples))
        kept = list(dict.fromkeys(each.source for each in examples))[: config.articles.get(split)]
        splits[split] = tuple(each for each in examples if each.source in kept)
    return splits
