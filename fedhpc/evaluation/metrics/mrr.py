"""Mean reciprocal rank of a search, 0 to 1 (Voorhees 1999): the mean of 1 / rank of the first right passage, 0 where
none is among the k that are returned."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedhpc.evaluation.metrics.base import ItemMetric, Outputs


class MRR(ItemMetric):
    """How far up in the list of passages the first right one stands."""

    needs = "rankings"
    higher_is_better = True
    lowest, highest = 0.0, 1.0

    def of_items(self, outputs: Outputs) -> NDArray[np.float64]:
        """1 / rank."""
        ranks = outputs.ranks.astype(np.float64)
        return np.divide(1.0, ranks, out=np.zeros_like(ranks), where=ranks > 0)
