"""Templates over columns: `"{mr} :"` puts the value of the column mr in; `{{` and `}}` are braces.

Only column names stand between braces, taken literally: no attributes, indices, conversions or formats.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from fedhpc.errors import UserError

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[^{}]+|[{}]")


@dataclass(frozen=True)
class Template:
    """A parsed template: texts and column names in turn."""

    texts: tuple[str, ...]  # one more than columns
    columns: tuple[str, ...]

    def render(self, row: Mapping[str, str]) -> str:
        pieces = [self.texts[0]]
        for column, following in zip(self.columns, self.texts[1:], strict=True):
            pieces += (row[column], following)
        return "".join(pieces)


def parse(template: str, key: str) -> Template:
    """The template of the configuration key `key`; UserError for a brace without its other half."""
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
