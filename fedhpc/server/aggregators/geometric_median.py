"""The geometric median of the updates by the smoothed Weiszfeld algorithm (RFA, Pillutla et al. 2022, arXiv 1912.13445,
algorithm 2), unweighted and from the server's own state on, which is an update of zero.

Every iterate is a weighted sum of the updates, so the inner products of the updates are all that it needs: the updates
are added up once, at the end.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from fedhpc.lazy import Tensor
from fedhpc.registry import Section
from fedhpc.server.aggregators._byzantine import distances_from, gram_of
from fedhpc.server.aggregators.base import Aggregator

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class GeometricMedian(Aggregator):
    """The point with the smallest sum of distances to the updates."""

    class Options(Section):
        iterations: int = Field(8, ge=1, description="steps of the Weiszfeld algorithm")
        smoothing: float = Field(1e-6, gt=0, description="distances below it count as this long")

    def combine(self, cohort: Cohort) -> Tensor:
        return cohort.weighted_sum(weiszfeld(gram_of(cohort), self.options.iterations, self.options.smoothing))


def weiszfeld(gram: np.ndarray, iterations: int, smoothing: float) -> np.ndarray:
    """The weights (C,) of the updates, 1 in all, after some iterations. gram: their inner products, (C, C)."""
    weights = np.zeros(len(gram))
    for _ in range(iterations):
        closeness = 1 / np.maximum(distances_from(gram, weights), smoothing)
        weights = closeness / closeness.sum()
    return weights
