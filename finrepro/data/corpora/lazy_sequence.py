"""Sequences whose items are computed on access."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

T_co = TypeVar("T_co", covariant=True)


class LazySequence(Sequence[T_co]):
    """A subclass gives `__len__` and `at`; a slice is the list of its items. Raises `IndexError`
    outside the sequence.
    """

    __slots__ = ()

    @abstractmethod
    def at(self, index: int) -> T_co:
        """The item at an index from 0 to the last one."""

    def has(self, index: int) -> bool:
        """Whether there is an item at this index, which is at least 0."""
        return index < len(self)

    @overload
    def __getitem__(self, index: int) -> T_co: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[T_co]: ...
    def __getitem__(self, index: int | slice) -> T_co | Sequence[T_co]:
        """An item, or several."""
        if isinstance(index, slice):
            return [self.at(position) for position in range(*index.indices(len(self)))]
        position = index if index >= 0 else index + len(self)
        if position < 0 or not self.has(position):
            raise IndexError(index)
        return self.at(position)
