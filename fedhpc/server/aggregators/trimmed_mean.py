"""The coordinate-wise trimmed mean of the updates, unweighted (Yin et al. 2018, arXiv 1803.01498, definition 2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhpc.lazy import Tensor
from fedhpc.server.aggregators._byzantine import Byzantine, in_order, mean_of

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class TrimmedMean(Byzantine):
    """The mean of every coordinate without its f smallest and f largest values."""

    def combine(self, cohort: Cohort) -> Tensor:
        cut = self.wrong(cohort.expected)
        return cohort.by_coordinate(lambda values: trimmed(in_order(values), cut))


def trimmed(ordered: Tensor, cut: int) -> Tensor:
    """The mean of every column of ascending values without its first and last `cut`: (C, n) -> (n,)."""
    return mean_of(ordered[cut : len(ordered) - cut])
