"""Perplexity: exp of the mean loss per supervised token (Jelinek et al. 1977); 1 is perfect.

Per token of the model's own tokenizer, so only models with the same tokenizer can be compared.
"""

from __future__ import annotations

import numpy as np

from fedhpc.evaluation.metrics._intervals import Interval
from fedhpc.evaluation.metrics.base import Metric, Outputs
from fedhpc.evaluation.metrics.loss import Loss


class Perplexity(Metric):
    """Between how many equally likely tokens the model seems to choose."""

    needs = "losses"
    higher_is_better = False
    lowest = 1.0

    def compute(self, outputs: Outputs) -> float:
        """exp(loss); infinite where a diverged model's loss exceeds what a float64 can hold."""
        with np.errstate(over="ignore"):
            return float(np.exp(Loss().compute(outputs)))

    def interval(self, outputs: Outputs) -> Interval:
        """The exponentials of the ends of the loss's interval."""
        low, high, by = Loss().interval(outputs)
        with np.errstate(over="ignore"):
            return Interval(float(np.exp(low)), float(np.exp(high)), by)
