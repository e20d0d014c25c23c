"""Documents streamed from a dataset on the hub: only the shards made of them are stored."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from finrepro.data.hub_client import reason_of
from finrepro.data.preparing.documents import Document, Fault
from finrepro.data.preparing.sources import no_text_reason
from finrepro.errors import EnvironmentFault


@dataclass(frozen=True)
class HubSplit:
    """A split of a dataset on the hub. `revision` is a commit; None: the newest, and the index
    records that none was pinned. `field` is the text's.
    """

    id: str
    revision: str | None
    split: str
    field: str = "text"
    subset: str | None = None

    @property
    def description(self) -> dict[str, Any]:
        """What the index records of the source."""
        return {
            "hub": self.id,
            "revision": self.revision,
            "split": self.split,
            "field": self.field,
            "subset": self.subset,
        }

    @property
    def size(self) -> None:
        """None: the number of bytes is not known before."""
        return

    def read(self, fault: Fault) -> Iterator[tuple[str, Document]]:
        """(address, document); rows are numbered from 1. Raises `EnvironmentFault` when the hub
        does not answer.
        """
        where = f"hf://datasets/{self.id}@{self.revision or 'main'}, split {self.split}"
        try:
            rows = self._stream()
        except ImportError as error:
            raise EnvironmentFault(
                f"could not read {where}: the package '{error.name}' is not installed."
            ) from None
        # The hub's client and its transport raise errors that they do not export.
        except Exception as error:
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
                    f"could not read {where}, row {number}: {reason_of(error)}; "
                    "run the same command again to go on."
                ) from None
            text = row.get(self.field)
            if isinstance(text, str):
                yield where, Document(text, number)
            else:
                fault(where, number, no_text_reason(self.field, row))

    def _stream(self) -> Iterator[dict[str, Any]]:
        import logging

        import datasets

        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it announces every retry
        return iter(
            datasets.load_dataset(
                self.id, self.subset, revision=self.revision, split=self.split, streaming=True
            )
        )
