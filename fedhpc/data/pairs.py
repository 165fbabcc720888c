"""Preferences: pairs of answers to one prompt, and single answers that people want or not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from itertools import takewhile

import numpy as np
from numpy.typing import NDArray

from fedhpc.data.partitioners.base import Int32, Int64
from fedhpc.data.rows import AT_ONCE, OnDemand, Rendered, unnamed_file, write
from fedhpc.data.sources import Table, refuse
from fedhpc.data.templates import Template
from fedhpc.data.tokens import Spans, Tokens, mapped, offsets_of, ranges, release
from fedhpc.errors import UserError

#: From the last stretch of white space on; all of a text that has none in its middle.
_TO_LAST_SPACE = re.compile(r"(?s)(\A|\s+)\S*\Z")
_YES, _NO = ("true", "1"), ("false", "0")


def with_a_preference(table: Table, answers: Mapping[str, Template]) -> tuple[Table, str | None]:
    """The rows whose two answers differ, and a line for the log where others are left out.

    answers: the template of each, by its configuration key. UserError for an answer that is empty, and where no row is
    left.
    """
    chosen, rejected = (Rendered(template, table.rows) for template in answers.values())
    differ, empty = np.zeros(len(table.rows), bool), dict[str, int]()  # the first row without an answer
    for row, pair in enumerate(zip(chosen, rejected, strict=True)):
        one, other = map(str.strip, pair)
        differ[row] = one != other
        for key, answer in zip(answers, (one, other), strict=True):
            if not answer:
                empty.setdefault(key, row)
    for key in answers:
        if key in empty:
            raise UserError(
                f"{table.locations[empty[key]]}: {key} is empty here; leave the row out with data.where_not", key=key
            )
    return without_ties(table, differ)


def without_ties(table: Table, differ: NDArray[np.bool_]) -> tuple[Table, str | None]:
    """The rows of a table whose two answers differ, and a line for the log where there are others."""
    count, ties = len(differ), np.flatnonzero(~differ)
    if not len(ties):
        return table, None
    where = table.locations[int(ties[0])]
    if len(ties) == count:
        raise UserError(f"{where}: data.chosen and data.rejected are the same here and in all {count} rows")
    line = f"data.rejected: {len(ties)} of {count} rows are left out, like {where}, whose answers are the same"
    return table.select(np.flatnonzero(differ)), line


def common_beginnings(table: Table, chosen: Sequence[str], rejected: Sequence[str]) -> list[Sequence[str]]:
    """What both texts of each row begin with, up to the space in front of the word that differs; and the two rests.

    UserError where they have no word in common.
    """
    lengths = np.zeros(len(chosen), np.int32)
    for row, (one, other) in enumerate(zip(chosen, rejected, strict=True)):
        shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
        lengths[row] = len(_TO_LAST_SPACE.sub("", one[:shared]))
        if not lengths[row]:
            raise UserError(
                f"{table.locations[row]}: data.chosen and data.rejected do not begin with the same word, so that there "
                "is no prompt; name one in data.prompt"
            )

    def parts(texts: Sequence[str], of_length: Callable[[int], slice]) -> Sequence[str]:
        def some(rows: slice) -> list[str]:
            return [text[of_length(n)] for text, n in zip(texts[rows], lengths[rows].tolist(), strict=True)]

        return OnDemand(len(lengths), some)

    return [parts(chosen, slice), *(parts(texts, lambda length: slice(length, None)) for texts in (chosen, rejected))]


def desirable_of(table: Table, column: str) -> NDArray[np.bool_]:
    """Whether people want the answer of each row: bool (n,). UserError for a value that does not say so."""
    refuse(table, table.missing(column), column, "data.desirable")
    wanted = np.zeros(len(table.rows), bool)
    for row, value in enumerate(table.rows.column(column)):
        wanted[row] = value.lower() in _YES
        if value.lower() not in _YES + _NO:
            raise UserError(
                f"{table.locations[row]}: data.desirable: the column '{column}' has '{value}'; write true or false"
            )
    return wanted


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
    with unnamed_file() as file:
        for at in range(0, len(fronts), AT_ONCE):
            write(file, _interleaved_ids(both, slice(at, at + AT_ONCE), excess, bos).data)
        ids = mapped(file)
    lengths = np.stack([np.diff(one.offsets) for one in both], axis=1)
    twice = np.repeat(np.arange(len(fronts)), 2)
    return Tokens(
        ids=ids,
        offsets=offsets_of((lengths - excess).ravel()),
        prompt_lengths=(fronts - excess).astype(np.int32).ravel(),
        lost=lost,
        overlong=overlong,
        spans=_interleaved_spans(chosen.spans, rejected.spans, excess),
        questions=None if chosen.questions is None else chosen.questions.select(twice),
        replies=None if chosen.replies is None else chosen.replies.select(twice),
    )


def _interleaved_ids(both: Sequence[Tokens], pairs: slice, excess: Int64, bos: int | None) -> Int32:
    """The ids of the rows of some pairs, of which each loses `excess` (n, 2) tokens of its front."""
    windows, bounds, before = [], [], 0
    for tokens in both:
        offsets = tokens.offsets[pairs.start : pairs.stop + 1]
        windows.append(np.array(tokens.ids[offsets[0] : offsets[-1]]))
        bounds.append(offsets - offsets[0] + before)
        before += len(windows[-1])
        release(tokens.ids)
    ids = np.concatenate(windows)
    starts, ends = (np.stack([of_rows[which] for of_rows in bounds], axis=1) for which in (slice(-1), slice(1, None)))
    first = starts + ((excess[pairs] > 0) & (ids[starts] == bos))  # behind what stays
    pieces = np.stack([starts, first, first + excess[pairs], ends], axis=2).reshape(-1, 4)
    return ids[ranges(pieces[:, ::2].ravel(), pieces[:, 1::2].ravel())]


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
    return Spans(offsets_of(counts.ravel()), moved[:, 0].copy(), moved[:, 1].copy())
