"""The schema of results for other programs and for people: docs/result.schema.json (JSON Schema
draft 2020-12) and docs/results.md. `python -m finrepro.evidence.schema_page` writes both anew.
"""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pydantic

from finrepro import PROJECT, strict_json
from finrepro.evidence.schema import FORMAT, Result
from finrepro.evidence.schema_rows import (
    ChosenLine,
    GeneratedLine,
    LossLine,
    SystemLine,
    TextLine,
)

SCHEMA, PAGE = "docs/result.schema.json", "docs/results.md"
DRAFT = "https://json-schema.org/draft/2020-12/schema"
LINES = (LossLine, ChosenLine, GeneratedLine, TextLine, SystemLine)

INTRODUCTION = f"""# What a result says

Made by `python -m finrepro.evidence.schema_page` from `finrepro/evidence/schema*.py`, the types
that the writers are checked against; `result.schema.json` beside it is the same as JSON Schema.

A run is a folder, `results/runs/<run_id>/`:

| file | holds |
|---|---|
| `result.json` | settings, scores, costs, data and environment: this page, from *Result* on |
| `predictions.jsonl` | a line for each example: *ChosenLine*, *GeneratedLine* or *TextLine* |
| `loss.jsonl` | a line for each optimizer step: *LossLine* |
| `system.jsonl` | what the process used: *SystemLine* |
| `weights/` | what was trained: an adapter in PEFT's format, or a whole model |
| `error.txt` | the traceback of a run that failed, in place of the four above |
| `manifest.sha256` | the sha256 of every other file; `sha256sum -c manifest.sha256` checks them |

Every number is finite. A key in *italics* may be absent.

`format` is the version of this description, {FORMAT}. A result of another version is
refused by its name, and nothing of it is touched.
"""


def json_schema() -> dict[str, Any]:
    """The JSON Schema of result.json; `$defs` has those of the lines of the .jsonl files too."""
    schema = _plain(pydantic.TypeAdapter(Result).json_schema())
    for line in LINES:
        schema["$defs"][line.__name__] = _plain(pydantic.TypeAdapter(line).json_schema())
    return {"$schema": DRAFT, **schema}


def _plain(value: Any, names: bool = False) -> Any:
    """Without the titles that pydantic makes of names; `names` where keys are names themselves."""
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _plain(item, key in ("properties", "$defs", "patternProperties"))
        for key, item in value.items()
        if names or key != "title"
    }


def page() -> str:
    """docs/results.md."""
    schema = json_schema()
    parts = {"Result": schema} | schema["$defs"]
    order = ["Result", *_in_order(schema, schema["$defs"]), *(line.__name__ for line in LINES)]
    tables = [_table(name, parts[name]) for name in dict.fromkeys(order)]
    return "\n".join([INTRODUCTION, *tables])


def _in_order(part: dict[str, Any], parts: dict[str, Any]) -> Iterator[str]:
    """Names of the parts that a part refers to, each followed by its own."""
    for shape in part.get("properties", {}).values():
        for name in _references(shape):
            yield name
            yield from _in_order(parts[name], parts)


def _references(shape: dict[str, Any]) -> list[str]:
    inner = [shape, *shape.get("anyOf", []), shape.get("items", {})]
    return [item["$ref"].removeprefix("#/$defs/") for item in inner if "$ref" in item]


def _table(name: str, part: dict[str, Any]) -> str:
    if not part.get("properties"):
        return f"## {name}\n\n{part['description']} It is empty.\n"
    shapes = part["properties"].items()
    rows = [_row(key, shape, key in part.get("required", ())) for key, shape in shapes]
    rows += [
        _row(f"{pattern.strip('^')}...", shape, False)
        for pattern, shape in part.get("patternProperties", {}).items()
    ]
    head = ["| key | type | unit | meaning |", "|---|---|---|---|"]
    description = textwrap.fill(" ".join(part["description"].split()), 100)
    return "\n".join([f"## {name}", "", description, "", *head, *rows, ""])


def _row(key: str, shape: dict[str, Any], required: bool) -> str:
    name = f"`{key}`" if required else f"*`{key}`*"
    return f"| {name} | {_type(shape)} | {shape.get('unit', '')} | {shape['description']} |"


def _type(shape: dict[str, Any]) -> str:
    if "$ref" in shape:
        return str(shape["$ref"].removeprefix("#/$defs/"))
    if "anyOf" in shape:
        return " or ".join(_type(item) for item in shape["anyOf"])
    if "const" in shape or "enum" in shape:
        return ", ".join(f"`{value}`" for value in shape.get("enum", [shape.get("const")]))
    if shape.get("type") == "array":
        return f"list of {_type(shape['items'])}"
    inner = shape.get("additionalProperties")
    if shape.get("type") == "object" and isinstance(inner, dict):
        return f"name -> {_type(inner)}"
    return str(shape.get("type", "any"))


def write(folder: Path = PROJECT) -> None:
    """Write both files."""
    (folder / SCHEMA).write_text(
        strict_json.dumps(json_schema(), indent=1) + "\n", encoding="utf-8"
    )
    (folder / PAGE).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    write()
