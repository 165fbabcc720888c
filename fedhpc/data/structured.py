"""Columns of lists and objects, such as chats: what is read of each value lies as JSON beside the texts of its row.

A value that cannot be used has the error in its place, which is raised where the value is asked for: a filter may leave
the row out before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from fedhpc.errors import UserError

Json: TypeAlias = "str | int | float | bool | list[Json] | dict[str, Json] | None"

_REFUSED = "!"  # no JSON begins so


@dataclass(frozen=True)
class Structured:
    """A column of lists and objects, and what is read of a value: (value, where its row is) -> JSON, or UserError."""

    column: str
    read: Callable[[object, str], Json]

    def written(self, value: object, location: str) -> str:
        """What is read of a value, as a text."""
        try:
            return json.dumps(self.read(value, location))
        except UserError as refused:
            error = refused
        except RecursionError:
            error = UserError(
                f"the column '{self.column}' holds lists and objects within each other, deeper than Python can read",
                place=location, remedy="mend the row, or take it out of the file",
            )  # fmt: skip
        return _REFUSED + json.dumps([error.message, error.key, error.place, error.remedy])


def parsed(written: str) -> Json:
    """What `Structured.written` has written. The UserError of a value that cannot be used."""
    if not written.startswith(_REFUSED):
        value: Json = json.loads(written)
        return value
    message, key, location, remedy = json.loads(written.removeprefix(_REFUSED))
    raise UserError(message, key=key, place=location, remedy=remedy)
