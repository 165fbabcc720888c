"""Krum: the one update that is closest to its neighbours (Blanchard et al. 2017, arXiv 1703.02757, section 4).

The score of an update is the sum of its squared distances to the C - f closest ones, itself among them, as Allouah et
al. 2023 (arXiv 2302.01772) and ByzFL have it; the first paper counts one neighbour less.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedhpc.lazy import Tensor
from fedhpc.server.aggregators._byzantine import Byzantine, gram_of, squared_distances

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class Krum(Byzantine):
    """The update with the lowest score; of several the one of the client with the lowest number."""

    def fewest(self, planned: int) -> int:
        f = self.wrong(planned)
        return 2 * f + 3 if f else 1  # C > 2 f + 2, as proposition 4.2 asks for

    def combine(self, cohort: Cohort) -> Tensor:
        best = scores(gram_of(cohort), self.wrong(cohort.expected)).argmin()
        return cohort.weighted_sum(np.eye(len(cohort))[best])


def scores(gram: np.ndarray, f: int) -> np.ndarray:
    """The sum of each update's squared distances to the C - f closest: float64 (C,). gram: (C, C)."""
    total: np.ndarray = np.sort(squared_distances(gram), axis=1)[:, : len(gram) - f].sum(axis=1)
    return total
