"""The text of a value, which templates, labels and filters see: one value is one text, whatever it is stored in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any

import numpy as np


def is_missing(value: Any) -> bool:
    """Whether a value is null or not a number, which is how pandas and Parquet write that there is none."""
    return value is None or (isinstance(value, (float, np.floating, Decimal)) and bool(value != value))


def text(value: Any) -> str:
    """Turn a value into its text: 3 and 3.0 become "3", true "true", null and NaN the empty text.

    Numbers that are not whole have the fewest digits that tell them from the other numbers of their width: float32 0.1
    is "0.1". A list of one value stands for that value. ValueError for longer lists, objects and bytes.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, str) and value.isascii():
        return value
    if is_missing(value):
        return ""
    if isinstance(value, (bool, np.bool_)):
        return "true" if value else "false"
    if isinstance(value, (float, np.floating, Decimal)):
        return _number(value)
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        raise ValueError(f"a chat of {len(value)} turns: write it as a text, for instance with apply_chat_template")
    if isinstance(value, list):
        raise ValueError(f"a list of {len(value)}: give each its own row, or join them to one text")
    if isinstance(value, dict):
        keys = ", ".join(map(str, list(value)[:5]))
        raise ValueError(f"a dict of {len(value)} ({keys}): name what is used of it with a dot, as in column.key")
    if isinstance(value, bytes):
        raise ValueError(f"a bytes of {len(value)}: use one text or number")
    result = str(value)
    try:
        result.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at position {error.start}, which is no character") from None
    if "\ufdd0" in result or "\ufdd1" in result:  # fedhpc.data.encoding marks special tokens with them
        raise ValueError("U+FDD0 or U+FDD1, which Unicode keeps for the inside of programs")
    return result


def is_character_text(value: str) -> bool:
    """Whether all of a Python string is characters that a text may have, so that it is its own text."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\ufdd0" not in value and "\ufdd1" not in value


class CellKind:
    """What the cells of a column of CSV are, which has texts alone: numbers or booleans if all of them are, else texts.

    A number is what Python and pandas write for one, so 007, 1.10 and 1E5 are texts, and so is all of a column that has
    one of them. In a column of numbers or booleans an empty cell is null; among texts it is the empty text.
    """

    def __init__(self) -> None:
        # How all cells that were added can be read, and whether one of them has a value.
        self._readers: dict[Callable[[str], bool | int | float | None], bool] = {_as_boolean: False, _as_number: False}

    def add(self, cells: Iterable[str]) -> None:
        """Take in cells of the column, of any file that has it."""
        distinct = set(cells) - {""} if self._readers else set()
        for read in list(self._readers):
            values = [*map(read, distinct)]
            if None in values:
                del self._readers[read]
            elif not all(map(is_missing, values)):
                self._readers[read] = True

    def values(self, cells: Iterable[str]) -> list[Any]:
        """The values of cells of the column; all of its cells have been added."""
        for read, has_values in self._readers.items():
            if has_values:
                return [read(cell) if cell else None for cell in cells]
        return list(cells)


_BOOLEANS = {text: value for value in (True, False) for text in (str(value), str(value).lower(), str(value).upper())}


def _as_boolean(cell: str) -> bool | None:
    return _BOOLEANS.get(cell)


def _as_number(cell: str) -> int | float | None:
    for read in (int, float):
        try:
            value: int | float = read(cell)
        except ValueError:
            continue
        if str(value) == cell or (cell == "NaN" and value != value):
            return value
    return None


def _number(value: float | np.floating[Any] | Decimal) -> str:
    """The text of a number with a point: without it where the number is whole, so -0.0 is "0" and 1e20 has no "e"."""
    exact = value if isinstance(value, Decimal) else Decimal(str(value))
    if exact.is_finite() and exact == exact.to_integral_value():
        return str(int(exact))
    if not isinstance(value, Decimal):
        return str(value)
    as_float = str(float(exact))
    return as_float if Decimal(as_float) == exact else f"{exact:f}".rstrip("0")
