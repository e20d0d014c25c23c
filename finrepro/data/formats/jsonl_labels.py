"""JSON lines with a text and a label by name, one file a split: news labelled by ChatGPT (NWGI)."""

from finrepro import bounds
from finrepro.data.examples import Example, Splits
from finrepro.data.files import DatasetConfig, check_rows
from finrepro.data.text_fields import decoded, text_of, where
from finrepro.errors import EnvironmentFault
from finrepro.settings import settings


@settings
class Columns:
    """The keys of a file's lines. `prompted`: the text stands inside FinGPT's instruction,
    between its Input and its Answer.
    """

    text: str
    label: str
    prompted: bool = False


@settings
class Config(DatasetConfig):
    """`files` and `columns` map a split to its file and its keys; `labels` are the allowed ones."""

    columns: dict[str, Columns]
    labels: tuple[str, ...]


def read(contents: dict[str, bytes], name: str, config: Config) -> Splits:
    """Split name -> examples in file order. Raises `EnvironmentFault` on a line of another form
    or an unknown label.
    """
    splits = {}
    for split, content in contents.items():
        columns, examples = config.columns[split], []
        for row, line in enumerate(json_lines(content, name, split)):
            label = str(line.get(columns.label)).strip()
            if columns.text not in line or label not in config.labels:
                raise EnvironmentFault(
                    f"{where(name, split, row + 1)}: "
                    f"no '{columns.text}', or '{columns.label}' is {line.get(columns.label)!r} "
                    f"and not one of {', '.join(config.labels)}."
                )
            place = where(name, split, row + 1)
            text = text_of(line[columns.text], columns.text, place)
            if columns.prompted:
                text = text_of(split_prompt(text)[1], f"Input of {columns.text}", place)
            examples.append(Example(id=f"{name}/{split}/{row}", text=text, label=label))
        check_rows(name, split, config.files[split], len(examples))
        splits[split] = tuple(examples)
    return splits


def json_lines(content: bytes, name: str, role: str) -> list[dict[str, object]]:
    """The objects of a JSON lines file, which may end in blank lines. Raises `EnvironmentFault`
    naming a line that is none.
    """
    rows = []
    lines = decoded(content, name, role).rstrip().split("\n")
    for number, line in enumerate(lines if lines != [""] else [], 1):
        place = where(name, role, number)
        try:
            value = bounds.loads(line)
        except ValueError as error:
            raise EnvironmentFault(f"{place}: not JSON ({error}).") from None
        if not isinstance(value, dict):
            raise EnvironmentFault(f"{place}: not a JSON object.")
        rows.append(value)
    return rows


def split_prompt(prompt: str) -> tuple[str, str]:
    """(instruction, text) of a prompt in FinGPT's form, `Instruction: ...\\nInput: ...\\nAnswer:
    `.
    """
    instruction, _, rest = prompt.partition("\nInput: ")
    return instruction, rest.rpartition("\nAnswer:")[0]
