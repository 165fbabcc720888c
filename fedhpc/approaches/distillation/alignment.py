"""Translates knowledge from one tokenizer to another by minimum edit distance.

The method is that of FedMKT (Fan et al. 2024, arXiv 2406.02224), after FuseLLM (Wan et al. 2024, arXiv 2401.10491).

Tokens: a token of one vocabulary stands for the token of the other with the smallest edit distance between their texts;
of several such tokens, for the first. Positions: the two tokenisations of a text are matched by dynamic programming,
with the same distance as the cost (dynamic time warping). A position receives knowledge where it is matched with
exactly one position of the other side, whose token stands for its own; elsewhere nothing is known. (FedMKT puts
certainty about the text's own token there. Here a model learns that token if nothing else is known.)
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import numpy as np

from fedhpc.approaches.distillation.knowledge import (
    Int32,
    Int64,
    Knowledge,
    largest_sums,
    one_hot,
    position_offsets,
    targets_of,
)
from fedhpc.data.tokens import Examples
from fedhpc.objectives.base import PredictedObjective

_UNIT = 2**24


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions of characters that turn a into b (Levenshtein 1966)."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        before, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (x != y))
    return row[-1]


class Vocabularies:
    """Maps each token of the vocabulary `of` to the token of the vocabulary `to` that it stands for."""

    def __init__(self, of: Sequence[str], to: Sequence[str]) -> None:
        """Take two vocabularies, each as the texts of its tokens by id."""
        self._of = of
        self._exact: dict[str, int] = {}
        for number, text in enumerate(to):
            self._exact.setdefault(text, number)
        self._lengths = np.array([len(text) for text in to])
        self._codes = np.zeros((len(to), max(self._lengths.max(), 1)), np.int32)
        for number, text in enumerate(to):
            self._codes[number, : len(text)] = [ord(c) for c in text]
        self._known: dict[int, int] = {}

    def __call__(self, ids: Int32) -> Int32:
        """The token of `to` for each of `ids`, of any shape. An id without a text stands for the token of id 0."""
        distinct, inverse = np.unique(ids, return_inverse=True)
        for number in distinct.tolist():
            if number not in self._known:
                text = self._of[number] if number < len(self._of) else ""
                self._known[number] = self._exact.get(text, -1)
                if self._known[number] < 0:
                    self._known[number] = int(np.argmin(self.distances(text)))
        tokens = np.array([self._known[number] for number in distinct.tolist()], np.int32)
        return tokens[inverse].reshape(ids.shape)

    def distances(self, text: str) -> Int64:
        """The edit distances between `text` and all tokens of `to`: (V,)."""
        width = self._codes.shape[1]
        row = np.broadcast_to(np.arange(width + 1), (len(self._codes), width + 1)).copy()
        for i, c in enumerate(text, 1):
            above = row.copy()
            row[:, 0] = i
            differs = self._codes != ord(c)
            for j in range(1, width + 1):
                row[:, j] = np.minimum(np.minimum(above[:, j], row[:, j - 1]) + 1, above[:, j - 1] + differs[:, j - 1])
        return row[np.arange(len(row)), self._lengths]


def matched(of: Sequence[str], to: Sequence[str]) -> list[list[int]]:
    """Match two tokenisations of a text: for each token of `to`, the indices of its tokens in `of`, ascending.

    The match is the path from both beginnings to both ends with the smallest sum of edit distances. Each step goes one
    token further in `of`, in `to` or in both; a step in both is preferred where it costs the same. For example,
    ["now", " get", "s"] and ["now", " gets"] give [[0], [1, 2]].
    """
    distance = cache(edit_distance)
    total = np.full((len(of) + 1, len(to) + 1), np.inf)
    total[0, 0] = 0
    for i, a in enumerate(of, 1):
        for j, b in enumerate(to, 1):
            total[i, j] = distance(a, b) + min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
    matches: list[list[int]] = [[] for _ in to]
    i, j = len(of), len(to)
    while i > 0 and j > 0:
        matches[j - 1].append(i - 1)
        best = min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
        if total[i - 1, j - 1] == best:
            i, j = i - 1, j - 1
        elif total[i - 1, j] == best:
            i -= 1
        else:
            j -= 1
    return [tokens[::-1] for tokens in matches]


class Alignment:
    """Translates knowledge about the examples `of` into the tokens of `to`: the same texts in another tokenisation."""

    def __init__(
        self,
        objective: PredictedObjective,
        of: Examples,
        of_texts: Sequence[str],
        to: Examples,
        to_texts: Sequence[str],
    ) -> None:
        """of_texts, to_texts: the two vocabularies, as `knowledge.token_texts` gives them."""
        self.vocabularies = Vocabularies(of_texts, to_texts)
        self.targets = targets_of(objective, to)
        from_targets = targets_of(objective, of)
        starts, to_starts = position_offsets(objective, of), position_offsets(objective, to)
        #: For each position of `to`, the position of `of` that its knowledge comes from, or -1 for none: (S,).
        self.position = np.full(len(self.targets), -1, np.int64)
        for e in range(len(to)):
            theirs = from_targets[starts[e] : starts[e + 1]]
            ours = self.targets[to_starts[e] : to_starts[e + 1]]
            stands_for = self.vocabularies(theirs)
            texts = [of_texts[t] for t in theirs.tolist()], [to_texts[t] for t in ours.tolist()]
            for position, tokens in enumerate(matched(*texts)):
                if len(tokens) == 1 and stands_for[tokens[0]] == ours[position]:
                    self.position[to_starts[e] + position] = starts[e] + tokens[0]

    @property
    def share(self) -> float:
        """The share of positions that receive knowledge from the other side."""
        return float((self.position >= 0).mean())

    def __call__(self, knowledge: Knowledge, k: int) -> Knowledge:
        """Translate knowledge to the positions of `to`, where it keeps the k likeliest classes.

        The probabilities of classes that stand for the same class are added. A position about which nothing is known
        gets certainty about its target, with confidence 0.
        """
        aligned = np.flatnonzero(self.position >= 0)
        source = self.position[aligned]
        classes = self.vocabularies(knowledge.index[source])
        units = np.rint(knowledge.probability[source].astype(np.float64) * _UNIT).astype(np.int64)
        where = np.broadcast_to(np.arange(len(aligned))[:, None], classes.shape)
        index, sums = largest_sums(len(aligned), k, where.ravel(), classes.astype(np.int64).ravel(), units.ravel())
        translated = one_hot(self.targets, k)
        translated.index[aligned] = index
        translated.probability[aligned] = sums / _UNIT
        assert translated.confidence is not None
        translated.confidence[aligned] = 1 if knowledge.confidence is None else knowledge.confidence[source]
        return translated
