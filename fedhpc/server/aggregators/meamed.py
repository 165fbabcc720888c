"""The mean around the median of the updates, coordinate-wise (MeaMed, Xie et al. 2018, arXiv 1802.10116)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhpc.lazy import Tensor, torch
from fedhpc.server.aggregators._byzantine import Byzantine, in_order
from fedhpc.server.aggregators.median import middle

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class MeaMed(Byzantine):
    """The mean, in every coordinate, of the C - f values that are closest to the median."""

    def combine(self, cohort: Cohort) -> Tensor:
        cut = self.wrong(cohort.expected)
        return cohort.by_coordinate(lambda values: mean_around_median(values, cut))


def mean_around_median(values: Tensor, cut: int) -> Tensor:
    """The mean of all but the `cut` values of a column that are farthest from its median: (C, n) -> (n,).

    In order, the values that stay are neighbours. They begin one further up for each of the first `cut` values that is
    farther from the median than the one C - cut above it.
    """
    ordered = in_order(values)
    median, stay = middle(ordered), len(ordered) - cut
    begin = torch.zeros(ordered.shape[1], dtype=torch.int64)
    for low, high in zip(ordered[:cut], ordered[stay:], strict=True):
        begin += median - low > high - median
    total = torch.zeros(ordered.shape[1], dtype=ordered.dtype)
    for row, value in enumerate(ordered):
        total += torch.where((begin <= row) & (row < begin + stay), value, 0.0)
    return total / stay
