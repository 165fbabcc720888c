"""Chooses the clients that a question is sent to: those with a centroid close to it.

A client tells the server a few centroids of its vectors (spherical k-means, Dhillon and Modha 2001) in place of the
vectors themselves, and a question goes to the m clients whose nearest centroid is closest to it. This is resource
selection for distributed retrieval (Callan 2000) with dense vectors.
"""

from __future__ import annotations

import numpy as np

from fedhpc.approaches.rag.dense import Int16, on_grid, products
from fedhpc.approaches.rag.ranking import CLIENT, COLUMNS, KEY, ORDER, SCORE, Int64, nothing
from fedhpc.rng import generator

_ITERATIONS = 10


def centroids(vectors: Int16, count: int, seed: int, client: int) -> Int16:
    """Compute at most `count` centroids of a client's vectors (n, D): vectors of length 1, on the grid."""
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


def closeness(questions: Int16, centroids_of: dict[int, Int16]) -> Int64:
    """Score every client for every question, as entries of a ranked list: (Q, number of clients, 5).

    KEY and CLIENT of an entry are the client; its score is that of the nearest centroid.
    """
    entries = nothing(len(questions), len(centroids_of))
    for i, (client, centres) in enumerate(centroids_of.items()):
        score = products(questions, centres).max(axis=1)
        entries[:, i, ORDER] = entries[:, i, SCORE] = score
        entries[:, i, KEY] = entries[:, i, CLIENT] = client
    assert entries.shape[2] == COLUMNS
    return entries


def _unit(centres: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(centres, axis=1, keepdims=True)
    normalised: np.ndarray = centres / np.where(norms > 0, norms, 1)
    return normalised
