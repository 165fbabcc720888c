"""Recall at k of a search, 0 to 1: the share of questions whose right passage is among the k that are returned
(`method.k`)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedhpc.evaluation.metrics.base import ItemMetric, Outputs


class Recall(ItemMetric):
    """How often the right passage is among those that are returned."""

    needs = "rankings"
    higher_is_better = True
    lowest, highest = 0.0, 1.0

    def of_items(self, outputs: Outputs) -> NDArray[np.float64]:
        """1 where a question has a rank."""
        return (outputs.ranks > 0).astype(np.float64)
