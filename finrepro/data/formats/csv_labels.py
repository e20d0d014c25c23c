"""Comma-separated files with a text and a coded label, one file a split: the Twitter Financial News
Sentiment format.

The label codes of two datasets can mean different things (0, 1, 2 is bearish, bullish, neutral here
and negative, neutral, positive in Financial PhraseBank), so the map is part of the dataset's entry;
FinLoRA's file with swapped labels is what one shared map leads to.
"""

import csv
import io

from finrepro.data.examples import Example, Splits
from finrepro.data.files import DatasetConfig, check_rows
from finrepro.data.text_fields import decoded, text_of, where
from finrepro.errors import EnvironmentFault
from finrepro.settings import settings


@settings
class Config(DatasetConfig):
    """`files` maps a split to its file; `labels` maps the file's code to the label's name."""

    text_column: str
    label_column: str
    labels: dict[str, str]


def read(contents: dict[str, bytes], name: str, config: Config) -> Splits:
    """Split name -> examples in file order. Raises `EnvironmentFault`, with the line that a row
    ends in, on a missing column or text, an unknown label code, and what is no CSV.
    """
    splits = {}
    for split, content in contents.items():
        lines = csv.DictReader(io.StringIO(decoded(content, name, split), newline=""))
        examples: list[Example] = []
        try:
            for values in lines:
                place = where(name, split, lines.line_num)
                text = text_of(values[config.text_column], config.text_column, place)
                label = config.labels[values[config.label_column]]
                examples.append(
                    Example(id=f"{name}/{split}/{len(examples)}", text=text, label=label)
                )
        except KeyError as error:
            raise EnvironmentFault(
                f"{where(name, split, lines.line_num)}: no column or label {error}."
            ) from None
        except csv.Error as error:  # a field of over 131,072 characters: a quote that is not closed
            raise EnvironmentFault(
                f"{where(name, split, lines.line_num + 1)}: not CSV ({error})."
            ) from None
        splits[split] = tuple(examples)
        check_rows(name, split, config.files[split], len(examples))
    return splits
