"""No mixing: the aggregator is given the updates themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedhpc.server.preaggregators.base import Preaggregator

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class Unmixed(Preaggregator):
    """Leaves the updates as they are."""

    def mixed(self, cohort: Cohort, draws: np.random.Generator) -> Cohort:
        return cohort
