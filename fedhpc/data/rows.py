"""The rows of a split, kept outside of memory: their texts lie in an unnamed file, and are read piece by piece.

A data set may be larger than memory. What stays in memory of a row is how long its texts are, 4 bytes for each. The
file is in the folder for temporary files ($TMPDIR) and is gone with the process.
"""

from __future__ import annotations

import os
import tempfile
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from string import digits
from typing import BinaryIO, TypeVar, overload

import numpy as np

from fedhpc.data.partitioners.base import Int64
from fedhpc.data.templates import Template
from fedhpc.errors import UserError

_T = TypeVar("_T")

AT_ONCE = 1024  # rows that are in memory at once
_DIGITS = 18  # that a number of 64 bits always has room for


def unnamed_file() -> BinaryIO:
    """An empty file for what is larger than memory, which is gone when it is closed. UserError where there is none."""
    try:
        return tempfile.TemporaryFile(prefix="fedhpc-", buffering=0)
    except OSError as error:
        raise _no_room(error) from None


def write(file: BinaryIO, content: bytes | memoryview) -> None:
    """Put bytes at the end of an unnamed file. UserError where there is no room."""
    left = memoryview(content)
    if not left.nbytes:  # which cannot be cast
        return
    left = left.cast("B")
    try:
        while left:
            left = left[file.write(left) :]
    except OSError as error:
        raise _no_room(error) from None


def _no_room(error: OSError) -> UserError:
    return UserError(
        f"the rows cannot be kept in {tempfile.gettempdir()}: {error.strerror or error}",
        key="data.source",
        remedy="name a folder on a disk with as much room as the data in the environment variable TMPDIR",
    )


class Rows(Sequence[dict[str, str]]):
    """Rows of a table, each a text for every column."""

    def __init__(
        self, columns: Sequence[str], file: BinaryIO, starts: Int64, lengths: np.ndarray, order: Int64
    ) -> None:
        """starts (ceil(n / AT_ONCE),): where each AT_ONCE rows begin; lengths uint32 (n, C): bytes of the texts.

        order: which of them these rows are.
        """
        self.columns = tuple(columns)
        self._file, self._starts, self._lengths, self._order = file, starts, lengths, order

    @classmethod
    def of(cls, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Rows:
        """Keep rows that are given as their texts, in the order of the columns."""
        builder = RowsBuilder(columns)
        for row in rows:
            builder.add(row)
        return builder.rows()

    def select(self, keep: Int64) -> Rows:
        """Some of these rows, which share the texts."""
        return Rows(self.columns, self._file, self._starts, self._lengths, self._order[keep])

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> dict[str, str]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, str]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, str] | list[dict[str, str]]:
        if isinstance(index, slice):
            return self._as_dicts(self._order[index])
        return self._as_dicts(self._order[[index]])[0]

    def __iter__(self) -> Iterator[dict[str, str]]:
        for start in range(0, len(self), AT_ONCE):
            yield from self[start : start + AT_ONCE]

    def column(self, name: str) -> Iterator[str]:
        """The texts of one column, row by row."""
        for start in range(0, len(self), AT_ONCE):
            yield from self.texts(slice(start, start + AT_ONCE), [name])[0]

    def texts(self, rows: slice, names: Sequence[str]) -> list[list[str]]:
        """The texts of some rows, column by column."""
        return self._read(self._order[rows], [self.columns.index(name) for name in names])

    def _as_dicts(self, numbers: Int64) -> list[dict[str, str]]:
        columns = self._read(numbers, range(len(self.columns)))
        if not columns:
            return [{} for _ in numbers]
        return [dict(zip(self.columns, texts, strict=True)) for texts in zip(*columns, strict=True)]

    def _read(self, numbers: Int64, columns: Sequence[int]) -> list[list[str]]:
        """The texts of rows that are given by where they stand in the file, column by column."""
        columns_of_texts: list[list[str]] = [[""] * len(numbers) for _ in columns]
        if not columns:
            return columns_of_texts
        blocks = numbers // AT_ONCE
        for block in np.unique(blocks).tolist():
            at = np.flatnonzero(blocks == block)
            within = numbers[at] - block * AT_ONCE
            first, last = int(within.min()), int(within.max()) + 1
            lengths = self._lengths[block * AT_ONCE : block * AT_ONCE + last]
            ends = np.cumsum(lengths, dtype=np.int64).reshape(lengths.shape)
            begin = int(ends[first - 1, -1]) if first else 0
            content = self._bytes(int(self._starts[block]) + begin, int(ends[-1, -1]) - begin)
            for texts, column in zip(columns_of_texts, columns, strict=True):
                stops = ends[within, column] - begin
                bounds = zip(at.tolist(), (stops - lengths[within, column]).tolist(), stops.tolist(), strict=True)
                for row, start, stop in bounds:
                    texts[row] = content[start:stop].decode()
        return columns_of_texts

    def _bytes(self, start: int, count: int) -> bytes:
        pieces = []
        while count:
            piece = os.pread(self._file.fileno(), count, start)
            if not piece:
                raise OSError("the file of the rows has become shorter")
            pieces.append(piece)
            start, count = start + len(piece), count - len(piece)
        return b"".join(pieces)


class RowsBuilder:
    """Writes the texts of rows to an unnamed file, one row after the other."""

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns
        self._file, self._starts, self._lengths = unnamed_file(), [0], [np.zeros((0, len(columns)), np.uint32)]
        self._texts: list[Sequence[str]] = []

    def add(self, texts: Sequence[str]) -> None:
        """Keep the next row, given as its texts in the order of the columns."""
        self._texts.append(texts)
        if len(self._texts) == AT_ONCE:
            self._put()

    def rows(self) -> Rows:
        """All rows that were added, in order."""
        self._put()
        count = sum(map(len, self._lengths))
        starts = np.array(self._starts[:-1], np.int64)
        return Rows(self.columns, self._file, starts, np.concatenate(self._lengths), np.arange(count))

    def _put(self) -> None:
        encoded = [text.encode() for text in chain.from_iterable(self._texts)]
        lengths = np.fromiter(map(len, encoded), np.uint32, len(encoded))
        self._lengths.append(lengths.reshape(len(self._texts), len(self.columns)))
        content = b"".join(encoded)
        write(self._file, content)
        self._starts.append(self._starts[-1] + len(content))
        self._texts.clear()


class OnDemand(Sequence[_T]):
    """What is made of each row when it is asked for."""

    def __init__(self, count: int, make: Callable[[slice], Sequence[_T]]) -> None:
        """make: what there is of some of `count` rows."""
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> _T: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[_T]: ...
    def __getitem__(self, index: int | slice) -> _T | Sequence[_T]:
        if isinstance(index, slice):
            return self._make(index)
        row = range(self._count)[index]
        return self._make(slice(row, row + 1))[0]

    def __iter__(self) -> Iterator[_T]:
        for start in range(0, self._count, AT_ONCE):
            yield from self._make(slice(start, start + AT_ONCE))


class Rendered(Sequence[str]):
    """What a template gives for every row; each text is made when it is asked for."""

    def __init__(self, template: Template, rows: Rows) -> None:
        self.template, self.rows = template, rows

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if not isinstance(index, slice):
            return self.template.render(self.rows[index])
        count = len(range(*index.indices(len(self))))
        return self.template.render_all(self.rows.texts(index, self.template.columns), count)

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), AT_ONCE):
            yield from self[start : start + AT_ONCE]


class Locations(Sequence[str]):
    """Where rows were read, like "train.csv:7": the number at the end apart from what stands in front of it."""

    def __init__(self, prefixes: Sequence[str], firsts: Sequence[int], numbers: Int64, order: Int64) -> None:
        """prefixes: what stands in front of the number, from the row in `firsts` on. A number of -1 is none."""
        self._prefixes, self._firsts, self._numbers, self._order = prefixes, firsts, numbers, order

    def select(self, keep: Int64) -> Locations:
        """The places of some of the rows."""
        return Locations(self._prefixes, self._firsts, self._numbers, self._order[keep])

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self._location(row) for row in self._order[index].tolist()]
        return self._location(int(self._order[index]))

    def _location(self, row: int) -> str:
        prefix, number = self._prefixes[bisect_right(self._firsts, row) - 1], int(self._numbers[row])
        return prefix if number < 0 else f"{prefix}{number}"

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), AT_ONCE):
            yield from self[start : start + AT_ONCE]


class LocationsBuilder:
    """Takes down where rows are, one after the other."""

    def __init__(self) -> None:
        self._prefixes: list[str] = []
        self._firsts: list[int] = []
        self._numbers = array("q")

    def add(self, location: str) -> None:
        """Take down where the next row is."""
        prefix = location.rstrip(digits)
        number = location[len(prefix) :]
        if not number or (number[0] == "0" and number != "0") or len(number) > _DIGITS:
            prefix, number = location, "-1"
        if not self._prefixes or self._prefixes[-1] != prefix:
            self._prefixes.append(prefix)
            self._firsts.append(len(self._numbers))
        self._numbers.append(int(number))

    def locations(self) -> Locations:
        """Where the rows are."""
        numbers = np.array(self._numbers, np.int64)
        return Locations(self._prefixes, self._firsts, numbers, np.arange(len(numbers)))
