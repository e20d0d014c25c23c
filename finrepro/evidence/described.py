"""A typed dictionary whose keys say what they mean, and in which unit: of the files of a run."""

from typing import Any

import pydantic

# A dictionary with no other keys than those that are described.
closed = pydantic.with_config(pydantic.ConfigDict(extra="forbid"))


def of(meaning: str, unit: str | None = None) -> Any:
    """The meaning and the unit of a key, for `Annotated`."""
    extra: Any = {"unit": unit} if unit else None
    return pydantic.Field(description=meaning, json_schema_extra=extra)
