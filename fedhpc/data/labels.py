"""The classes of `data.label`: their order, and which of them a model's head has."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from collections.abc import Set as AbstractSet
from decimal import Decimal
from typing import NamedTuple

UNLABELLED = "-1"  # what data sets of the hub have in place of a hidden label
_NUMBER = re.compile(r"[+-]?\d+(\.\d+)?([eE][+-]?\d+)?")
_INDEX = re.compile(r"(?:LABEL_)?(0|[1-9]\d*)")  # what transformers calls a class without a name, or its index alone


class InHead(NamedTuple):
    """The classes of the data in the order of the rows of a head."""

    classes: list[str]
    by_name: bool  # whether the head calls them so; else names that differ in case, or indices, were taken for them


def is_number(name: str) -> bool:
    """Whether a text is a number."""
    return _NUMBER.fullmatch(name) is not None


def no_class(training: AbstractSet[str]) -> set[str]:
    """The texts that stand for a label that is not there: the empty one and the hub's -1, unless training has them.

    Beside words in the training rows -1 is no label either; beside other numbers it is a class.
    """
    is_class = any(map(is_number, training - {UNLABELLED}))
    return {"", UNLABELLED} - (training if is_class else training - {UNLABELLED})


def class_order(names: Iterable[str], head: Sequence[str] = ()) -> list[str]:
    """The distinct `names` in order: that of the rows of `head` if these are its classes, else by size or by text.

    By size where all are numbers. The empty text comes first. head: as `in_head` takes it; if it has all of the
    names and more, these are classes too, or its rows would lose their meaning.
    """
    classes = sorted(set(names))
    if len(classes) > 1 and set(classes) < set(head) and len(set(head)) == len(head):
        return list(head)
    ordered = in_head(classes, head)
    if ordered is not None:
        return ordered.classes
    if all(is_number(name) for name in classes if name):
        classes.sort(key=lambda name: (name != "", Decimal(name or 0)))
    return classes


def in_head(classes: Sequence[str], head: Sequence[str]) -> InHead | None:
    """The `classes` by the rows of a head, whose own names for them are `head`; None where they cannot be told apart.

    Their names are the same, or but for case, or the classes are indices of rows: 0, 1, ... or LABEL_0, LABEL_1, ...
    A row that has an index for a name is known by that alone.
    """
    ways: list[tuple[Sequence[object], Sequence[object]]] = [
        (list(head), list(classes)),
        ([name.casefold() for name in head], [name.casefold() for name in classes]),
        ([_index(name, row) for row, name in enumerate(head)], [_index(name) for name in classes]),
    ]
    for number, (rows, ours) in enumerate(ways):
        if len(set(rows)) == len(rows) == len(ours) and set(rows) == set(ours):
            return InHead([classes[ours.index(row)] for row in rows], number == 0)
    return None


def _index(name: str, row: int = -1) -> int:
    """3 of the names 3 and LABEL_3; `row` of others."""
    match = _INDEX.fullmatch(name)
    return int(match[1]) if match else row
