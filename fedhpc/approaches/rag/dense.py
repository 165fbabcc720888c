"""Dense search: finds the vectors with the largest inner product, exactly, by rounding all vectors to a grid.

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
    """Round vectors of length 1, float (n, D), to whole multiples of 2^-11; returns the multiples."""
    return np.rint(np.asarray(vectors, np.float64) * _UNIT).astype(np.int16)


def products(questions: Int16, vectors: Int16) -> Int64:
    """The exact inner products, in units of 2^-22: (Q, D), (n, D) -> (Q, n)."""
    # In float32, because BLAS has no integers; it is exact, as the module's docstring shows.
    return (questions.astype(np.float32) @ vectors.astype(np.float32).T).astype(np.int64)


def require() -> Any:
    """Import the library faiss and return it. UserError where it is not installed."""
    try:
        import faiss
    except ImportError:
        raise UserError(
            "method.index: dense search needs the library faiss: pip install 'fedhpc[rag]'; lexical needs none"
        ) from None
    return faiss


class Dense:
    """A flat faiss index over vectors (n, D) on the grid. Of equal scores, the lower index comes first."""

    def __init__(self, vectors: Int16) -> None:
        self.vectors = vectors
        self._index = require().IndexFlatIP(vectors.shape[1])
        self._index.add(vectors.astype(np.float32))

    def scores(self, questions: Int16) -> Int64:
        """The score of every vector for every question: (Q, n)."""
        return products(questions, self.vectors)

    def search(self, questions: Int16, k: int) -> tuple[Int64, Int64]:
        """The scores and indices of the k best vectors, best first: each (Q, min(k, n))."""
        n = len(self.vectors)
        k = min(k, n)
        # One more than asked for: of vectors that tie for the last rank, faiss returns any.
        products_, indices = self._index.search(questions.astype(np.float32), min(k + 1, n))
        scores = products_.astype(np.int64)
        order = np.lexsort((indices, -scores), axis=1)[:, :k]
        scores_k, indices_k = (np.take_along_axis(a, order, axis=1) for a in (scores, indices))
        if k < n:
            for row in np.flatnonzero(scores[:, k] == scores[:, k - 1]):
                all_scores = self.scores(questions[row : row + 1])
                indices_k[row] = top(all_scores, k)[0]
                scores_k[row] = all_scores[0, indices_k[row]]
        return scores_k, indices_k
