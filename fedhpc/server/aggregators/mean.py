"""The weighted mean of the updates (FedAvg, McMahan et al. 2017, arXiv 1602.05629, algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhpc.lazy import Tensor
from fedhpc.server.aggregators.base import Aggregator

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class Mean(Aggregator):
    """FedAvg: the sum of the clients' updates, each times its share (server.weighting) among the accepted ones."""

    sums_only = True

    def combine(self, cohort: Cohort) -> Tensor:
        return cohort.weighted_sum(cohort.shares / cohort.shares.sum())
