"""Ranked lists of passages, and how the lists of several indexes are merged into one.

A list is an int64 array (Q, k, 5): for each of Q questions its k best entries, best first, with the columns below. No
two entries are equal in rank: they are sorted by `ORDER`, then `SCORE`, both descending, then by `KEY` and `CLIENT`
ascending. So merging is associative and commutative, and a tree of merges of lists of k entries gives what one sort of
everything would.

Without `distinct`, two clients that hold the same text give two entries with one key.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Int64 = NDArray[np.int64]

# ORDER: what lists are merged by. SCORE: of the index. KEY, SOURCE: 63 bits of a hash of the chunk and of the passage
# that it is cut from. CLIENT: the owner.
ORDER, SCORE, KEY, SOURCE, CLIENT = range(5)
COLUMNS = 5
_NOTHING = (-(2**62), 0, 0, 0, -1)  # where there are fewer than k entries
_SMOOTHING = 60  # of reciprocal rank fusion (Cormack, Clarke and Buettcher 2009, section 2)
SCALE_BITS = 22  # scores are multiples of 2^-22


def nothing(questions: int, k: int) -> Int64:
    """A list without any entries: (questions, k, 5)."""
    return np.broadcast_to(np.array(_NOTHING, np.int64), (questions, k, COLUMNS)).copy()


def filled(ranked: Int64) -> NDArray[np.bool_]:
    """Which elements of a list are entries, and not just filling: bool (Q, k)."""
    is_entry: NDArray[np.bool_] = ranked[..., CLIENT] >= 0
    return is_entry


def best(entries: Int64, k: int, distinct: bool = False) -> Int64:
    """The k best of m entries for each question: (Q, m, 5) -> (Q, k, 5).

    distinct: of entries with the same key, keep only the best.
    """
    ordered = _sorted(entries)
    if distinct:
        # Among entries with one key the first in the order stays: sorts are stable.
        by_key = np.argsort(ordered[..., KEY], axis=1, kind="stable")
        keys = np.take_along_axis(ordered[..., KEY], by_key, axis=1)
        again = np.zeros_like(keys, dtype=bool)
        again[:, 1:] = keys[:, 1:] == keys[:, :-1]
        repeated = np.empty_like(again)
        np.put_along_axis(repeated, by_key, again, axis=1)
        repeated &= filled(ordered)
        ordered[repeated] = _NOTHING
        ordered = _sorted(ordered)
    missing = k - ordered.shape[1]
    if missing > 0:
        return np.concatenate([ordered, nothing(len(ordered), missing)], axis=1)
    return ordered[:, :k]


def top(scores: Int64, k: int) -> Int64:
    """The indices of the k highest of (Q, n) scores, of equal ones the lower index first: (Q, min(k, n)).

    |scores| must be below 2^40. ValueError for more than 2^22 scores a question.
    """
    n = scores.shape[1]
    k, bits = min(k, n), max(n - 1, 1).bit_length()
    if bits > 22:
        raise ValueError(f"{n} chunks in one index are more than {2**22}")
    # Score and index in one number, so that no two are equal and a partial sort is enough.
    both = (scores << bits) | np.arange(n - 1, -1, -1)
    candidates = np.argpartition(-both, k - 1, axis=1)[:, :k] if k < n else np.broadcast_to(np.arange(n), both.shape)
    order = np.argsort(-np.take_along_axis(both, candidates, axis=1), axis=1)
    indices: Int64 = np.take_along_axis(candidates, order, axis=1)
    return indices


def reciprocal_ranks(rankings: list[Int64]) -> Int64:
    """Reciprocal rank fusion: the sum over rankings of 1 / (60 + rank), in units of 2^-22.

    rankings: scores (Q, n) of the same n entries in ascending order of their keys. Ranks count from 1.
    """
    total = np.zeros_like(rankings[0])
    for scores in rankings:
        order = top(scores, scores.shape[1])
        ranks = np.empty_like(order)
        np.put_along_axis(ranks, order, np.broadcast_to(np.arange(1, order.shape[1] + 1), order.shape), axis=1)
        total += np.rint(2.0**SCALE_BITS / (_SMOOTHING + ranks)).astype(np.int64)
    return total


def first_hits(ranked: Int64, gold: list[set[int]]) -> Int64:
    """For each question, the rank (from 1) of its first entry whose passage is a gold one; 0 where none is."""
    ranks = np.zeros(len(ranked), np.int64)
    for i, sources in enumerate(gold):
        hits = np.isin(ranked[i, :, SOURCE], list(sources)) & (ranked[i, :, CLIENT] >= 0)
        if hits.any():
            ranks[i] = int(np.argmax(hits)) + 1
    return ranks


def _sorted(entries: Int64) -> Int64:
    keys: tuple[NDArray[Any], ...] = (
        entries[..., CLIENT], entries[..., KEY], -entries[..., SCORE], -entries[..., ORDER],
    )  # fmt: skip
    order = np.lexsort(keys, axis=1)
    return np.take_along_axis(entries, order[..., None], axis=1)
