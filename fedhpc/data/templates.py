"""Templates build a text from the columns of a row: with mr = "Aromi is a bar", "{mr} :" gives "Aromi is a bar :".

`{{` and `}}` stand for braces. Between braces there is a column name and nothing else, taken literally: no indices,
conversions or formats. {a.b} is the column of that name or, where there is none, the value b of the dict in column a.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat

from fedhpc.errors import UserError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[^{}]+|[{}]")


@dataclass(frozen=True)
class Template:
    """A parsed template: texts with column names between them. "{mr} :" has the texts "" and " :" around mr."""

    texts: tuple[str, ...]  # one more than columns
    columns: tuple[str, ...]

    def render(self, row: Mapping[str, str]) -> str:
        """The text for a row, given as values by column."""
        pieces = [self.texts[0]]
        for column, following in zip(self.columns, self.texts[1:], strict=True):
            pieces += (row[column], following)
        return "".join(pieces)

    def render_all(self, columns: Sequence[Sequence[str]], count: int) -> list[str]:
        """The texts of `count` rows. columns: the values of each of `self.columns`."""
        pieces: list[Iterable[str]] = [repeat(self.texts[0], count)]
        for values, following in zip(columns, self.texts[1:], strict=True):
            pieces += (values, repeat(following, count))
        return list(map("".join, zip(*pieces, strict=True)))

    def with_texts(self, change: Callable[[str], str]) -> Template:
        """The template with `change` of each text between the columns."""
        return replace(self, texts=tuple(map(change, self.texts)))


def parse(template: str, key: str) -> Template:
    """Parse the template that the configuration key `key` holds; UserError for a brace without its other half."""
    texts, columns = [""], []
    for match in _PIECE.finditer(template):
        piece, column = match[0], match[1]
        if column is not None:
            columns.append(column)
            texts.append("")
        elif piece in ("{", "}"):
            raise UserError(
                f"{key}: lone '{piece}' at position {match.start()} of {template!r}; write a column as "
                f"{{column}}, a brace as {piece * 2}"
            )
        else:
            texts[-1] += piece[0] if piece in ("{{", "}}") else piece
    return Template(tuple(texts), tuple(columns))
