"""Mean reciprocal rank of a search, 0 to 1 (Voorhees 1999): the mean of 1 / rank of the first right passage, 0 where
none is among the k that are returned."""

from __future__ import annotations

import numpy as np

from fedhpc.evaluation.metrics.base import Metric, Outputs


class MRR(Metric):
    """How far up in the list of passages the first right one stands."""

    needs = "rankings"
    higher_is_better = True

    def compute(self, outputs: Outputs) -> float:
        """The mean of 1 / rank."""
        ranks = outputs.ranks.astype(np.float64)
        return float(np.divide(1.0, ranks, out=np.zeros_like(ranks), where=ranks > 0).mean())
