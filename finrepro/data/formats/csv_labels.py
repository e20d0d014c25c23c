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
from finrepro.errors import EnvironmentFault
from finrepro.settings import settings


@settings
class Config(DatasetConfig):
    """`files` maps a split to its file; `labels` maps the file's code to the label's name."""

    text_column: str
    label_column: str
    labels: dict[str, str]


def read(contents: dict[str, bytes], name: str, config: Config) -> Splits:
    """Split name -> examples in file order. Raises `EnvironmentFault` on a missing column or an
    unknown label code.
    """
    splits = {}
    for split, content in contents.items():
        rows = list(csv.DictReader(io.StringIO(content.decode("utf-8"), newline="")))
        try:
            splits[split] = tuple(
                Example(
                    id=f"{name}/{split}/{row}",
                    text=values[config.text_column].strip(),
                    label=config.labels[values[config.label_column]],
                )
                for row, values in enumerate(rows)
            )
        except KeyError as error:
            raise EnvironmentFault(
                f"dataset '{name}', split '{split}': no column or label {error}."
            ) from None
        check_rows(name, split, config.files[split], len(rows))
    return splits
