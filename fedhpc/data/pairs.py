"""Preferences: pairs of answers to one prompt, and single answers that people want or not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from fedhpc.data.partitioners.base import Int64
from fedhpc.data.sources import Table, refuse
from fedhpc.data.templates import Template
from fedhpc.data.tokens import Spans, Tokens, ranges
from fedhpc.errors import UserError

#: From the last stretch of white space on; all of a text that has none in its middle.
_TO_LAST_SPACE = re.compile(r"(?s)(\A|\s+)\S*\Z")
_YES, _NO = ("true", "1"), ("false", "0")


def with_a_preference(table: Table, answers: Mapping[str, Template]) -> tuple[Table, str | None]:
    """The rows whose two answers differ, and a line for the log where others are left out.

    answers: the template of each, by its configuration key. UserError for an answer that is empty, and where no row is
    left.
    """
    texts = {key: [template.render(row).strip() for row in table.rows] for key, template in answers.items()}
    for key, of_rows in texts.items():
        empty = [number for number, one in enumerate(of_rows) if not one]
        if empty:
            raise UserError(
                f"{table.locations[empty[0]]}: {key} is empty here; leave the row out with data.where_not", key=key
            )
    chosen, rejected = texts.values()
    differ = [number for number, (one, other) in enumerate(zip(chosen, rejected, strict=True)) if one != other]
    return without_ties(table, differ)


def without_ties(table: Table, differ: Sequence[int]) -> tuple[Table, str | None]:
    """The rows `differ` of a table, and a line for the log where there are others, whose two answers are the same."""
    count = len(table.rows)
    if len(differ) == count:
        return table, None
    where = next(table.locations[row] for row in range(count) if row >= len(differ) or differ[row] != row)
    if not differ:
        raise UserError(f"{where}: data.chosen and data.rejected are the same here and in all {count} rows")
    line = (
        f"data.rejected: {count - len(differ)} of {count} rows are left out, like {where}, whose answers are the same"
    )
    return table.select(differ), line


def common_beginnings(table: Table, chosen: Sequence[str], rejected: Sequence[str]) -> list[list[str]]:
    """What both texts of each row begin with, up to the space in front of the word that differs; and the two rests.

    UserError where they have no word in common.
    """
    parts = []
    for one, other, where in zip(chosen, rejected, table.locations, strict=True):
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        length = len(_TO_LAST_SPACE.sub("", one[:shared]))
        if not length:
            raise UserError(
                f"{where}: data.chosen and data.rejected do not begin with the same word, so that there is no prompt; "
                "name one in data.prompt"
            )
        parts.append((one[:length], one[length:], other[length:]))
    return [list(texts) for texts in zip(*parts, strict=True)]


def desirable_of(table: Table, column: str) -> NDArray[np.bool_]:
    """Whether people want the answer of each row: bool (n,). UserError for a value that does not say so."""
    refuse(table, table.missing(column), column, "data.desirable")
    values = [row[column].lower() for row in table.rows]
    for value, row, where in zip(values, table.rows, table.locations, strict=True):
        if value not in _YES + _NO:
            raise UserError(f"{where}: data.desirable: the column '{column}' has '{row[column]}'; write true or false")
    return np.array([value in _YES for value in values])


def interleaved(chosen: Tokens, rejected: Tokens, bos: int | None) -> Tokens:
    """The rows of pairs: 2e is the better answer to prompt e and 2e + 1 the worse one.

    A pair is left out where one of the two is. Both stand behind the same tokens: where one answer leaves less room for
    the prompt, the other's loses as much of its front. bos: the token that stays there if a row begins with it.
    """
    overlong = None
    if chosen.overlong is not None and rejected.overlong is not None:
        overlong = np.maximum(chosen.overlong, rejected.overlong)
        chosen, rejected = (one.select(np.flatnonzero(overlong[one.overlong == 0] == 0)) for one in (chosen, rejected))
    both = (chosen, rejected)
    fronts = np.stack([one.prompt_lengths for one in both], axis=1).astype(np.int64)  # (n, 2)
    excess, lost = np.zeros_like(fronts), None
    if chosen.lost is not None and rejected.lost is not None:
        lost = np.stack([chosen.lost, rejected.lost], axis=1)
        excess = (fronts - fronts.min(axis=1, keepdims=True)) * (lost > 0).any(axis=1, keepdims=True)
        lost = (lost + excess).astype(np.int32).ravel()
    ids = np.concatenate([chosen.ids, rejected.ids])
    starts = np.stack([chosen.offsets[:-1], rejected.offsets[:-1] + len(chosen.ids)], axis=1)
    ends = np.stack([chosen.offsets[1:], rejected.offsets[1:] + len(chosen.ids)], axis=1)
    first = starts + ((excess > 0) & (ids[starts] == bos))  # behind what stays
    pieces = np.stack([starts, first, first + excess, ends], axis=2).reshape(-1, 4)
    twice = np.repeat(np.arange(len(fronts)), 2)
    return Tokens(
        ids=ids[ranges(pieces[:, ::2].ravel(), pieces[:, 1::2].ravel())],
        offsets=np.concatenate([[0], np.cumsum((ends - starts - excess).ravel())]),
        prompt_lengths=(fronts - excess).astype(np.int32).ravel(),
        lost=lost,
        overlong=overlong,
        spans=_interleaved_spans(chosen.spans, rejected.spans, excess),
        questions=None if chosen.questions is None else chosen.questions.select(twice),
        replies=None if chosen.replies is None else chosen.replies.select(twice),
    )


def _interleaved_spans(chosen: Spans | None, rejected: Spans | None, excess: Int64) -> Spans | None:
    """The spans of the rows of pairs, of which each begins `excess` (n, 2) tokens earlier than before."""
    if chosen is None or rejected is None:
        return None
    counts = np.stack([np.diff(chosen.offsets), np.diff(rejected.offsets)], axis=1)  # (n, 2)
    row = np.concatenate([np.repeat(2 * np.arange(len(counts)) + i, counts[:, i]) for i in (0, 1)])
    order = np.argsort(row, kind="stable")
    bounds = np.stack(
        [np.concatenate([chosen.starts, rejected.starts]), np.concatenate([chosen.ends, rejected.ends])], axis=1
    )
    moved = (bounds - excess.ravel()[row][:, None])[order].astype(np.int32)
    return Spans(np.concatenate([[0], np.cumsum(counts.ravel())]), moved[:, 0].copy(), moved[:, 1].copy())
