"""Documents from a dataset of the hub, streamed: nothing is stored but the shards that are made
of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finrepro.data.hub_client import reason_of
from finrepro.data.preparing.documents import Document, Fault
from finrepro.data.preparing.sources import missing
from finrepro.errors import EnvironmentFault


@dataclass(frozen=True)
class Hub:
    """A split of a hub dataset at a revision (a commit; None: whatever is there, which the index
    then says).
    """

    id: str
    revision: str | None
    split: str
    field: str = "text"
    subset: str | None = None

    @property
    def description(self) -> dict[str, Any]:
        """What the index says of the source."""
        return {
            "hub": self.id,
            "revision": self.revision,
            "split": self.split,
            "field": self.field,
            "subset": self.subset,
        }

    @property
    def size(self) -> None:
        """Not known before."""
        return

    def read(self, fault: Fault) -> Iterator[tuple[str, Document]]:
        """(address, document); a row's number counts from 1. Raises `EnvironmentFault` when the
        hub cannot be had.
        """
        where = f"hf://datasets/{self.id}@{self.revision or 'main'}, split {self.split}"
        try:
            rows = self._stream()
        except ImportError as error:
            raise EnvironmentFault(
                f"could not read {where}: the package '{error.name}' is not installed."
            ) from None
        except (
            Exception
        ) as error:  # the hub's client and its transport raise errors that they do not export
            raise EnvironmentFault(f"could not read {where}: {reason_of(error)}") from None
        number = 0
        while True:
            number += 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except Exception as error:
                raise EnvironmentFault(
                    f"could not read {where}, row {number}: {reason_of(error)}; run the same command again to go on."
                ) from None
            text = row.get(self.field)
            if isinstance(text, str):
                yield where, Document(text, number)
            else:
                fault(where, number, missing(self.field, row))

    def _stream(self) -> Iterator[dict[str, Any]]:
        import logging

        import datasets

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry
        return iter(
            datasets.load_dataset(
                self.id, self.subset, revision=self.revision, split=self.split, streaming=True
            )
        )
