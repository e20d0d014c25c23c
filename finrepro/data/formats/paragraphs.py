"""Running text, one paragraph a line, as WikiText: headings stand between equals signs.

An example is a paragraph. Where a file has headings, a paragraph's `source` is its article:
paragraphs of an article are one observation.
"""

import re

from finrepro.data.examples import Example, Splits
from finrepro.data.files import DatasetConfig, check_rows
from finrepro.data.text_fields import decoded
from finrepro.settings import Positive, settings

ARTICLE = re.compile(r"= ([^=].*?) =")  # " = Robert Boulter = "; sections have more signs
HEADING = re.compile(r"=.*=")


@settings
class Config(DatasetConfig):
    """`files` maps a split to its file, whose rows are its paragraphs.

    `articles` names the splits whose files have headings, with how many of their articles are taken
    (null: all).
    """

    articles: dict[str, Positive | None]


def read(contents: dict[str, bytes], name: str, config: Config) -> Splits:
    """Split name -> paragraphs in file order. Raises `EnvironmentFault` on bytes that are not
    UTF-8.
    """
    splits = {}
    for split, content in contents.items():
        lines = decoded(content, name, split).split("\n")
        examples: list[Example] = []
        article = ""
        for line in map(str.strip, lines):
            if heading := ARTICLE.fullmatch(line):
                article = heading[1] if split in config.articles else ""
            elif line and not HEADING.fullmatch(line):
                examples.append(
                    Example(
                        id=f"{name}/{split}/{len(examples)}", text=line, label="", source=article
                    )
                )
        check_rows(name, split, config.files[split], len(examples))
        sources = list(dict.fromkeys(example.source for example in examples))
        selected = set(sources[: config.articles.get(split)])
        splits[split] = tuple(example for example in examples if example.source in selected)
    return splits
