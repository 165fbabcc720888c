"""Macro-averaged F1, 0 to 1: the unweighted mean of the F1 of every class (Lewis et al. 1996).

Predictions as for accuracy. Classes that are neither a label nor a prediction of any example do not count.
"""

from __future__ import annotations

import numpy as np

from fedhpc.evaluation.metrics.base import Metric, Outputs


class MacroF1(Metric):
    """How well labels are predicted, every class counting the same."""

    needs = "labels"
    higher_is_better = True

    def compute(self, outputs: Outputs) -> float:
        """The mean over classes of 2 hits / (times labelled + times predicted)."""
        labels, predictions = outputs.labels, outputs.predictions
        size = int(max(labels.max(), predictions.max())) + 1
        hits = np.bincount(labels[labels == predictions], minlength=size)
        total = np.bincount(labels, minlength=size) + np.bincount(predictions, minlength=size)
        seen = total > 0
        return float((2 * hits[seen] / total[seen]).mean())
