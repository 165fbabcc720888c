"""Macro-averaged F1, 0 to 1: the unweighted mean of the F1 of every class (Lewis et al. 1996).

Predictions as for accuracy. Classes that are neither a label nor a prediction of any example do not count.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedhpc.evaluation.metrics._intervals import Interval, by_bootstrap
from fedhpc.evaluation.metrics.base import Metric, Outputs


class MacroF1(Metric):
    """How well labels are predicted, every class counting the same."""

    needs = "labels"
    higher_is_better = True
    lowest, highest = 0.0, 1.0

    def compute(self, outputs: Outputs) -> float:
        """The mean over classes of 2 hits / (times labelled + times predicted)."""
        return _macro_f1(outputs.labels, outputs.predictions)

    def interval(self, outputs: Outputs) -> Interval:
        """The interval over resampled examples."""
        labels, predictions = outputs.labels, outputs.predictions
        return by_bootstrap(lambda drawn: _macro_f1(labels[drawn], predictions[drawn]), len(labels))


def _macro_f1(labels: NDArray[np.int64], predictions: NDArray[np.int64]) -> float:
    size = int(max(labels.max(), predictions.max())) + 1
    hits = np.bincount(labels[labels == predictions], minlength=size)
    total = np.bincount(labels, minlength=size) + np.bincount(predictions, minlength=size)
    seen = total > 0
    return float((2 * hits[seen] / total[seen]).mean())
