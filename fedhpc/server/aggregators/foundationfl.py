"""FoundationFL: a simple rule over the updates and copies of one of them (Fang et al. 2025, arXiv 2501.17381).

With the largest and the smallest value of each coordinate, g_max and g_min, the update that is copied is the one with
the largest score (equations 2 to 5)

    s_i = min(|g_i - g_max|, |g_i - g_min|).

The trimmed mean (equation 6) or the median (equation 7) is taken of the C updates and m copies of it, with as many
values cut off as there may be wrong clients (section VI-A: c = f).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fedhpc.lazy import Tensor, torch
from fedhpc.server.aggregators._byzantine import Byzantine, ByzantineOptions, in_order, rounded_down
from fedhpc.server.aggregators.median import middle
from fedhpc.server.aggregators.trimmed_mean import trimmed

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class FoundationFL(Byzantine):
    """The median or the trimmed mean of the updates and of copies of the one that is farthest from both extremes."""

    class Options(ByzantineOptions):
        rule: Literal["median", "trimmed_mean"] = Field(
            "median", description="what is taken of the updates and the copies"
        )
        synthetic: float = Field(
            0.5, ge=0, le=1, description="copies that join the updates, as a share of their number"
        )

    def combine(self, cohort: Cohort) -> Tensor:
        copies = rounded_down(self.options.synthetic, len(cohort))
        cut = self.wrong(cohort.expected)
        # Of several with the largest score the client with the lowest number.
        chosen = int(cohort.sum_over_coordinates(squares_from_extremes).numpy().min(axis=0).argmax())

        def rule(values: Tensor) -> Tensor:
            ordered = in_order(torch.cat([values, values[chosen].expand(copies, -1)]))
            return middle(ordered) if self.options.rule == "median" else trimmed(ordered, cut)

        return cohort.by_coordinate(rule)


def squares_from_extremes(values: Tensor) -> Tensor:
    """|g_i - g_max|^2 and |g_i - g_min|^2 of all updates: (C, n) -> float64 (2, C)."""
    extremes = values.amax(dim=0), values.amin(dim=0)
    return torch.stack([(values - extreme).square_().sum(dim=1) for extreme in extremes])
