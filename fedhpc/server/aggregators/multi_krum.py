"""Multi-Krum: the mean of the updates that Krum likes best (Blanchard et al. 2017, arXiv 1703.02757, section 5)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedhpc.lazy import Tensor
from fedhpc.server.aggregators._byzantine import gram_of
from fedhpc.server.aggregators.krum import Krum as _Krum
from fedhpc.server.aggregators.krum import scores

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class MultiKrum(_Krum):
    """The mean, unweighted, of the C - f updates with the lowest scores."""

    def combine(self, cohort: Cohort) -> Tensor:
        f = self.wrong(cohort.expected)
        stay = np.argsort(scores(gram_of(cohort), f), kind="stable")[: len(cohort) - f]
        weights = np.zeros(len(cohort))
        weights[stay] = 1 / len(stay)
        return cohort.weighted_sum(weights)
