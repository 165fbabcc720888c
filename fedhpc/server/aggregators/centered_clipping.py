"""Centred clipping with memory (Karimireddy et al. 2021, arXiv 2012.10333, equation 3).

v <- v + 1/C sum_i (g_i - v) min(1, radius / |g_i - v|), from the aggregate v of the last round on. v is a row of the
server's among the updates, so their inner products say how far each update is from it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from fedhpc.lazy import Tensor
from fedhpc.registry import Section
from fedhpc.server.aggregators._byzantine import distances_from, gram_of
from fedhpc.server.aggregators.base import Aggregator
from fedhpc.server.aggregators.norm_bounding import shortened

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class CenteredClipping(Aggregator):
    """The last aggregate, and the mean of how the updates differ from it, each difference no longer than `radius`."""

    class Options(Section):
        radius: float | None = Field(
            None, gt=0, description="largest distance from the last aggregate; default the median of the distances"
        )
        iterations: int = Field(1, ge=1, description="times that the differences are taken and added")

    keeps_on_server = ("center",)

    def combine(self, cohort: Cohort) -> Tensor:
        cohort = cohort.with_row(cohort.memory["center"])
        total = cohort.weighted_sum(clipped(gram_of(cohort), self.options.iterations, self.options.radius))
        cohort.memory["center"] = total
        return total


def clipped(gram: np.ndarray, iterations: int, radius: float | None) -> np.ndarray:
    """The weights (C + 1,) of the updates and, last, of the centre, 1 in all. gram: their inner products."""
    weights = np.zeros(len(gram))
    weights[-1] = 1.0
    for _ in range(iterations):
        factors = shortened(distances_from(gram, weights)[:-1], radius) / (len(gram) - 1)
        weights *= 1 - factors.sum()
        weights[:-1] += factors
    return weights
