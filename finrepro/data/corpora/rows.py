"""Sequences whose items are computed when they are asked for."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import TypeVar, overload

T_co = TypeVar("T_co", covariant=True)


class Rows(Sequence[T_co]):
    """A length and `at` make one; a slice is the list of its items. Raises `IndexError` for a
    row that there is not.
    """

    __slots__ = ()

    @abstractmethod
    def at(self, row: int) -> T_co:
        """The item of a row from 0 to the last one."""

    def has(self, row: int) -> bool:
        """Whether there is a row of this number, from 0."""
        return row < len(self)

    @overload
    def __getitem__(self, row: int) -> T_co: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[T_co]: ...
    def __getitem__(self, row: int | slice) -> T_co | Sequence[T_co]:
        """An item, or several."""
        if isinstance(row, slice):
            return [self.at(each) for each in range(*row.indices(len(self)))]
        inside = row if row >= 0 else row + len(self)
        if inside < 0 or not self.has(inside):
            raise IndexError(row)
        return self.at(inside)
