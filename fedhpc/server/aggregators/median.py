"""The coordinate-wise median of the updates, unweighted (Yin et al. 2018, arXiv 1803.01498, definition 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhpc.lazy import Tensor
from fedhpc.server.aggregators._byzantine import in_order
from fedhpc.server.aggregators.base import Aggregator

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class Median(Aggregator):
    """The median of every coordinate, of an even number of clients the mean of the middle two."""

    def combine(self, cohort: Cohort) -> Tensor:
        return cohort.by_coordinate(lambda values: middle(in_order(values)))


def middle(ordered: Tensor) -> Tensor:
    """The median of every column of ascending values: (C, n) -> (n,)."""
    count = len(ordered)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
