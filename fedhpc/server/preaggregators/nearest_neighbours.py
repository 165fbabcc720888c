"""Nearest-neighbour mixing (NNM, Allouah et al. 2023, arXiv 2302.01772, algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedhpc.server.aggregators._byzantine import ByzantineOptions, gram_of, rounded_down, squared_distances
from fedhpc.server.preaggregators.base import Preaggregator

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class NearestNeighbours(Preaggregator):
    """The mean of each update and its neighbours, C - f in all, in place of the update."""

    Options = ByzantineOptions

    def mixed(self, cohort: Cohort, draws: np.random.Generator) -> Cohort:
        count = max(1, len(cohort) - rounded_down(self.options.byzantine, cohort.expected))
        nearest = np.argsort(squared_distances(gram_of(cohort)), axis=1, kind="stable")[:, :count]
        matrix = np.zeros((len(cohort), len(cohort)))
        np.put_along_axis(matrix, nearest, 1 / count, axis=1)
        return cohort.mixed(matrix)
