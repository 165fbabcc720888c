"""Recall at k of a search, 0 to 1: the share of questions whose right passage is among the k that are returned
(`method.k`)."""

from __future__ import annotations

from fedhpc.evaluation.metrics.base import Metric, Outputs


class Recall(Metric):
    """How often the right passage is among those that are returned."""

    needs = "rankings"
    higher_is_better = True

    def compute(self, outputs: Outputs) -> float:
        """The share of questions with a rank."""
        return float((outputs.ranks > 0).mean())
