"""A client's part of the collection: its passages in chunks, their index, and the search in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedhpc.approaches.rag.chunks import chunks
from fedhpc.approaches.rag.dense import Dense, Int16
from fedhpc.approaches.rag.encoder import Encoder
from fedhpc.approaches.rag.lexical import Lexical, Statistics
from fedhpc.approaches.rag.passages import number_of
from fedhpc.approaches.rag.ranking import (
    CLIENT,
    KEY,
    ORDER,
    SCALE_BITS,
    SCORE,
    SOURCE,
    Int64,
    best,
    nothing,
    reciprocal_ranks,
    top,
)  # fmt: skip


@dataclass(frozen=True)
class Questions:
    """Q questions as the clients get them; what the index does not use is None."""

    vectors: Int16 | None  # (Q, D)
    terms: list[list[str]] | None
    statistics: Statistics | None  # over all chunks that are searched

    def __getitem__(self, rows: Int64) -> Questions:
        return Questions(
            None if self.vectors is None else self.vectors[rows],
            None if self.terms is None else [self.terms[i] for i in rows],
            self.statistics,
        )


class Shard:
    """The chunks of a client's passages, sorted by their keys, and their index."""

    def __init__(self, client: int, passages: Sequence[str], options: Any, encoder: Encoder | None) -> None:
        """Cut and index the passages of a client; `options` are those of method rag."""
        self._client, self._options = client, options
        pieces = [
            (number_of(piece), number_of(passage), piece)
            for passage in passages
            for piece in chunks(passage, options.chunk_words, options.overlap_words)
        ]
        pieces.sort()
        copies = np.ones(len(pieces), np.int64)
        if options.distinct:
            _, firsts, copies = np.unique([key for key, _, _ in pieces], return_index=True, return_counts=True)
            pieces = [pieces[i] for i in firsts]
        self.keys: Int64 = np.array([key for key, _, _ in pieces], np.int64)
        self._sources: Int64 = np.array([source for _, source, _ in pieces], np.int64)
        self.texts = [text for _, _, text in pieces]
        self.notes: list[str] = []
        self.dense = self.lexical = None
        if not pieces:
            return
        if encoder is not None:
            vectors, self.notes = encoder.passages(self.texts)
            self.dense = Dense(vectors)
        if options.index != "dense":
            self.lexical = Lexical(self.texts, copies)

    def __len__(self) -> int:
        return len(self.texts)

    def text(self, key: int) -> str:
        """The text of the chunk with this key."""
        return self.texts[int(np.searchsorted(self.keys, key))]

    def search(self, questions: Questions, count: int, k: int, merge: str) -> Int64:
        """The client's k best chunks for each of `count` questions, as a ranked list (count, k, 5).

        merge: what lists are merged by, "score" or "reciprocal_rank".
        """
        ranked = nothing(count, k)
        if not self.texts or not count:
            return ranked
        if self._options.index == "dense" and merge == "score":
            assert self.dense is not None and questions.vectors is not None
            scores, indices = self.dense.search(questions.vectors, k)
            orders = scores
        else:
            rankings = self._scores(questions)
            total = sum(rankings[1:], rankings[0])
            order = total if merge == "score" else reciprocal_ranks(rankings)
            indices = top(order, k)
            scores, orders = (np.take_along_axis(a, indices, axis=1) for a in (total, order))
        width = indices.shape[1]
        for column, values in (
            (ORDER, orders), (SCORE, scores), (KEY, self.keys[indices]), (SOURCE, self._sources[indices]),
            (CLIENT, self._client),
        ):  # fmt: skip
            ranked[:, :width, column] = values
        if self._options.index == "lexical":
            # A chunk that shares no term with the question is not an answer to it.
            ranked[(ranked[..., CLIENT] >= 0) & (ranked[..., SCORE] <= 0)] = nothing(1, 1)[0, 0]
        return best(ranked, k, self._options.distinct)

    def _scores(self, questions: Questions) -> list[Int64]:
        """The scores of all chunks (Q, n), once for each index that is used: dense, lexical or both."""
        options, rankings = self._options, []
        if self.dense is not None and questions.vectors is not None:
            rankings.append(self.dense.scores(questions.vectors))
        if self.lexical is not None and questions.terms is not None and questions.statistics is not None:
            weight = options.lexical_weight if options.index == "hybrid" else 1.0
            rankings.append(self.lexical.scores(questions.terms, questions.statistics, options.k1, options.b, weight))
        return rankings


def score_of(values: Int64) -> np.ndarray:
    """Integer scores as the numbers they stand for: cosines, BM25 scores, or their sum."""
    return values / 2.0**SCALE_BITS
