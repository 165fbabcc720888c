"""Preferences: pairs of answers to one prompt, and single answers that people want or not."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from fedhpc.data.sources import Table, refuse
from fedhpc.data.templates import Template
from fedhpc.data.tokens import Tokens, ranges
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
    equal = [number for number, (one, other) in enumerate(zip(chosen, rejected, strict=True)) if one == other]
    if not equal:
        return table, None
    where, count = table.locations[equal[0]], len(table.rows)
    if len(equal) == count:
        raise UserError(
            f"{where}: data.chosen and data.rejected are the same text here and in all {count} rows",
            key="data.rejected",
        )
    left_out = set(equal)
    return (
        table.select([number for number in range(count) if number not in left_out]),
        f"data.rejected: {len(equal)} of {count} rows are left out, like {where}, whose two answers are the same",
    )


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


def interleaved(chosen: Tokens, rejected: Tokens, bos: bool) -> Tokens:
    """The rows of pairs: 2e is the better answer to prompt e and 2e + 1 the worse one.

    A pair is left out where one of the two is. Both stand behind the same tokens: where one answer leaves less room for
    the prompt, the other's loses as much of its front. bos: whether a row begins with a token that stays there.
    """
    overlong = None
    if chosen.overlong is not None and rejected.overlong is not None:
        overlong = np.maximum(chosen.overlong, rejected.overlong)
        chosen, rejected = (one.select(np.flatnonzero(overlong[one.overlong == 0] == 0)) for one in (chosen, rejected))
    fronts = np.stack([chosen.prompt_lengths, rejected.prompt_lengths], axis=1).astype(np.int64)
    excess = fronts - fronts.min(axis=1, keepdims=True)  # (n, 2)
    starts = np.stack([chosen.offsets[:-1], rejected.offsets[:-1] + len(chosen.ids)], axis=1)
    ends = np.stack([chosen.offsets[1:], rejected.offsets[1:] + len(chosen.ids)], axis=1)
    first = starts + bos * (excess > 0)  # behind what stays
    pieces = np.stack([starts, first, first + excess, ends], axis=2).reshape(-1, 4)
    ids = np.concatenate([chosen.ids, rejected.ids])[ranges(pieces[:, ::2].ravel(), pieces[:, 1::2].ravel())]
    offsets = np.concatenate([[0], np.cumsum((ends - starts - excess).ravel())])
    lengths = (fronts - excess).astype(np.int32).ravel()
    lost = None
    if chosen.lost is not None and rejected.lost is not None:
        lost = (np.stack([chosen.lost, rejected.lost], axis=1) + excess).astype(np.int32).ravel()
    return Tokens(ids, offsets, lengths, lost, overlong=overlong)
