"""Typed, frozen settings: YAML in, checked values out, and every error in one line.

`@settings` makes a frozen, keyword-only dataclass whose fields pydantic checks strictly. Values are
read as JSON so that YAML's lists become tuples, while `1e-4` (a string in YAML 1.1) is refused
where a number is wanted.
"""

import dataclasses
import json
import re
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, dataclass_transform

import pydantic
import yaml

from finrepro import bounds
from finrepro.errors import UsageError, unknown

T = TypeVar("T")

Positive = Annotated[int, pydantic.Field(gt=0)]
Count = Annotated[int, pydantic.Field(ge=0)]
PositiveFloat = Annotated[float, pydantic.Field(gt=0)]
Share = Annotated[float, pydantic.Field(gt=0, lt=1)]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def settings(cls: type[T]) -> type[T]:
    """Turn a class into a frozen, keyword-only dataclass with strict types and no unknown keys."""
    decorate = pydantic.dataclasses.dataclass(
        frozen=True, kw_only=True, config=pydantic.ConfigDict(extra="forbid", strict=True)
    )
    return decorate(cls)  # type: ignore[return-value]


def later(default: Any) -> Any:
    """A setting that was added when there were results already. At its default it is left out of
    the plain values, hence of a run's identity, so that earlier results keep theirs.
    """
    return dataclasses.field(default=default, metadata={"later": True})


class _Loader(yaml.CSafeLoader):
    """YAML in which a mapping's keys are text, each once; plain YAML lets the last of several
    equal keys win in silence.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for (at, _), key in zip(node.value, keys, strict=True):
            if not isinstance(key, str):
                raise yaml.MarkedYAMLError(
                    problem=f"the key {key!r} is not text: quote it", problem_mark=at.start_mark
                )
            if keys.count(key) > 1:
                raise yaml.MarkedYAMLError(
                    problem=f"the key '{key}' stands here twice", problem_mark=at.start_mark
                )
        return dict(super().construct_mapping(node, deep))


def _check_depth(text: str) -> None:
    """Raise `TooLarge` before the loader, which recurses in C, meets what is nested too deeply; the
    parser of events does not recurse.
    """
    # Below the first, a level takes a bracket or a column of what stands before a line's text.
    columns = max(map(len, re.findall(r"^[-? ]*", text, re.MULTILINE)))
    if columns + text.count("[") + text.count("{") < bounds.DEPTH:
        return
    depth = 0
    for event in yaml.parse(text, Loader=yaml.CSafeLoader):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        if depth > bounds.DEPTH:
            raise bounds.TooLarge(bounds.TOO_DEEP)


def read_yaml(path: Path) -> dict[str, Any]:
    """Parse a YAML mapping. Raises `UsageError` with file and line when it is malformed."""
    try:
        text = bounds.read_text(path, bounds.SETTINGS_BYTES)
        _check_depth(text)
        value = yaml.load(text, Loader=_Loader)
        bounds.check_nodes(value)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "unreadable characters"
        raise UsageError(f"{path}{where}: not valid YAML ({problem}).") from None
    except bounds.TooLarge as error:
        raise UsageError(f"{path}: {error}.") from None
    # PyYAML's, for scalars as 2024-13-45
    except (ValueError, KeyError, AttributeError, RecursionError) as error:
        raise UsageError(f"{path}: not valid YAML ({' '.join(str(error).split())}).") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path}: expected a mapping of names to settings.")
    return value


def build(cls: type[T], values: dict[str, Any], where: str) -> T:
    """Check `values` against the settings class `cls`.

    Raises `UsageError` that starts with `where` and names the wrong key or type, and the allowed
    keys.
    """
    names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
    for key in values:
        if key not in names:
            raise UsageError(f"{where}: {unknown('setting', str(key), names)}")
    try:
        return _validator(cls).validate_json(json.dumps(values, allow_nan=False))  # type: ignore[arg-type]
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        # settings that do not go together, in the class's own words
        if not first["loc"] and "ctx" in first:
            raise UsageError(f"{where}: {first['ctx'].get('error', first['msg'])}.") from None
        field = ".".join(str(key) for key in first["loc"]) or "settings"
        value = first.get("input")
        raise UsageError(f"{where}.{field}: {first['msg']} (got {value!r}).") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where}: {error}.") from None


@cache
def _validator(cls: type) -> Any:
    """pydantic's check of a class, made once: making it costs more than the check."""
    return pydantic.TypeAdapter(cls)


@settings
class Choice:
    """A resolved catalogue entry: which file implements it, under which name it is listed, and
    its settings.
    """

    name: str
    kind: str
    config: Any


def plain(value: Any) -> Any:
    """Settings as JSON-able values, with `kind` beside the settings and catalogue names left out.

    A name is for people: renaming an entry must not make its results unfindable.
    `dataclasses.asdict` alone would drop the class, so that two kinds with equal settings would be
    taken for the same thing.
    """
    if isinstance(value, Choice):
        return {"kind": value.kind, **plain(value.config)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [
            field
            for field in dataclasses.fields(value)
            if not field.metadata.get("later") or getattr(value, field.name) != field.default
        ]
        return {field.name: plain(getattr(value, field.name)) for field in fields}
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def without(value: Any, keys: frozenset[str]) -> Any:
    """`value` with the mapping entries named in `keys` dropped at every depth."""
    if isinstance(value, dict):
        return {key: without(item, keys) for key, item in value.items() if key not in keys}
    return [without(item, keys) for item in value] if isinstance(value, list) else value


def text(value: Any, dropped: frozenset[str]) -> str:
    """`value` as `plain`, `without` what is `dropped`, in JSON with sorted keys and no spaces.

    Settings are frozen and keep their text: a table's thousands of cells share a few dozen models,
    adapters and tasks.
    """
    if isinstance(value, tuple):
        return f"[{','.join(text(item, dropped) for item in value)}]"
    texts: dict[frozenset[str], str] = (
        vars(value).setdefault("_texts", {}) if dataclasses.is_dataclass(value) else {}
    )
    if dropped not in texts:
        texts[dropped] = json.dumps(
            without(plain(value), dropped), sort_keys=True, separators=(",", ":")
        )
    return texts[dropped]
