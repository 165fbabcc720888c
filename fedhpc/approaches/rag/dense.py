"""Exact search by inner product over vectors on a grid.

Vectors of length 1 are rounded to multiples of 2^-11. Inner products of such vectors are multiples of 2^-22, and by
Cauchy and Schwarz all their partial sums stay well below 2^24 of these units, up to which a float32 holds every
integer. So faiss's float32 products are exact whatever the order in which they are added up, and a passage has the same
score for a question in every index, in every batch, on every rank. The rounding moves a score by about 2e-4.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.approaches.rag.ranking import Int64, top
from fedhpc.errors import UserError

Int16 = NDArray[np.int16]
_UNIT = 2.0**11


def on_grid(vectors: NDArray[Any]) -> Int16:
    """Vectors of length 1, float (n, D), in units of 2^-11."""
    return np.rint(np.asarray(vectors, np.float64) * _UNIT).astype(np.int16)


def products(questions: Int16, vectors: Int16) -> Int64:
    """Inner products in units of 2^-22, exact: (Q, D), (n, D) -> (Q, n)."""
    # In float32 for BLAS, which has no integers; exact, see the module.
    return (questions.astype(np.float32) @ vectors.astype(np.float32).T).astype(np.int64)


def require() -> Any:
    """The module faiss. UserError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError(
            "method.index: dense search needs the library faiss: pip install 'fedhpc[rag]'; lexical needs none"
        ) from None
    return faiss


class Dense:
    """A flat faiss index over vectors (n, D) on the grid. Ties go to the lower place."""

    def __init__(self, vectors: Int16) -> None:
        self.vectors = vectors
        self._index = require().IndexFlatIP(vectors.shape[1])
        self._index.add(vectors.astype(np.float32))

    def scores(self, questions: Int16) -> Int64:
        """Every vector's score: (Q, n)."""
        return products(questions, self.vectors)

    def search(self, questions: Int16, k: int) -> tuple[Int64, Int64]:
        """Scores and places of the k best, best first: each (Q, min(k, n))."""
        n = len(self.vectors)
        k = min(k, n)
        # One more than asked for: faiss keeps any of those that tie for the last place.
        found, places = self._index.search(questions.astype(np.float32), min(k + 1, n))
        scores = found.astype(np.int64)
        order = np.lexsort((places, -scores), axis=1)[:, :k]
        scores_k, places_k = (np.take_along_axis(a, order, axis=1) for a in (scores, places))
        if k < n:
            for row in np.flatnonzero(scores[:, k] == scores[:, k - 1]):
                everything = self.scores(questions[row : row + 1])
                places_k[row] = top(everything, k)[0]
                scores_k[row] = everything[0, places_k[row]]
        return scores_k, places_k
