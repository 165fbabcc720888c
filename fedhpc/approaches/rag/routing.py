"""Which clients are worth asking: those with a centroid close to the question.

A client registers a few centroids of its vectors (spherical k-means, Dhillon and Modha 2001) in place of the vectors;
a question goes to the m clients whose nearest centroid is closest. As in resource selection for distributed retrieval
(Callan 2000) with dense representations.
"""

from __future__ import annotations

import numpy as np

from fedhpc.approaches.rag.dense import Int16, on_grid, products
from fedhpc.approaches.rag.ranking import CLIENT, COLUMNS, KEY, ORDER, SCORE, Int64, nothing
from fedhpc.rng import generator

_ITERATIONS = 10


def centroids(vectors: Int16, count: int, seed: int, client: int) -> Int16:
    """At most `count` centroids of length 1 of the client's vectors (n, D), on the grid."""
    points = vectors.astype(np.float64)
    start = generator(seed, "centroids", client).choice(len(points), min(count, len(points)), replace=False)
    centres = points[np.sort(start)]
    for _ in range(_ITERATIONS):
        nearest = np.argmax(products(vectors, on_grid(_unit(centres))), axis=1)
        # A centroid that lost all its points stays where it is.
        centres = np.stack(
            [points[nearest == c].sum(axis=0) if (nearest == c).any() else centres[c] for c in range(len(centres))]
        )
    return on_grid(_unit(centres))


def closeness(questions: Int16, known: dict[int, Int16]) -> Int64:
    """Every client as an entry of a ranked list, its key and owner being its number: (Q, len(known), 5)."""
    entries = nothing(len(questions), len(known))
    for i, (client, centres) in enumerate(known.items()):
        score = products(questions, centres).max(axis=1)
        entries[:, i, ORDER] = entries[:, i, SCORE] = score
        entries[:, i, KEY] = entries[:, i, CLIENT] = client
    assert entries.shape[2] == COLUMNS
    return entries


def _unit(centres: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(centres, axis=1, keepdims=True)
    found: np.ndarray = centres / np.where(norms > 0, norms, 1)
    return found
