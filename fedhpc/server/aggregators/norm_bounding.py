"""The mean of updates that are cut to a largest norm (norm thresholding, Sun et al. 2019, arXiv 1911.07963)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from fedhpc.lazy import Tensor
from fedhpc.registry import Section
from fedhpc.server.aggregators.base import Aggregator

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class NormBounding(Aggregator):
    """The weighted mean (server.weighting) of the updates, each shortened to `norm` where it is longer."""

    class Options(Section):
        norm: float | None = Field(
            None, gt=0, description="largest L2 norm of an update; default the median of the round's"
        )

    def combine(self, cohort: Cohort) -> Tensor:
        norms = cohort.norms().numpy()
        return cohort.weighted_sum(cohort.shares / cohort.shares.sum() * shortened(norms, self.options.norm))


def shortened(norms: np.ndarray, most: float | None) -> np.ndarray:
    """By which factor each vector gets no longer than `most`, or than their median: float64 (C,), at most 1."""
    limit = np.median(norms) if most is None else most
    return np.divide(limit, norms, out=np.ones_like(norms), where=norms > limit)
