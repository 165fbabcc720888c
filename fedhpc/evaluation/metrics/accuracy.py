"""Accuracy: the share of examples, 0 to 1, whose most likely label is the right one.

The prediction is the label whose rendered target has the highest log-likelihood after the prompt
(Brown et al. 2020, arXiv 2005.14165, section 2.4, without normalisation by length).
"""

from __future__ import annotations

from fedhpc.evaluation.metrics.base import Metric, Outputs


class Accuracy(Metric):
    """How often the most likely label is the right one."""

    needs = "labels"
    higher_is_better = True

    def compute(self, outputs: Outputs) -> float:
        """The mean of prediction == label."""
        return float((outputs.predictions == outputs.labels).mean())
