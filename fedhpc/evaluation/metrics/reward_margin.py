"""Reward margin: by how much the better answer's reward is higher than the worse one's, in nats.

Of single answers it is the reward of one that people want, and of others the reward with the opposite sign.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedhpc.evaluation.metrics.base import ItemMetric, Outputs


class RewardMargin(ItemMetric):
    """The mean difference between the rewards of the better and the worse answer."""

    needs = "preferences"
    higher_is_better = True

    def of_items(self, outputs: Outputs) -> NDArray[np.float64]:
        """The margin; with several models the mean over them."""
        margins: NDArray[np.float64] = outputs.margins.mean(axis=0)
        return margins
