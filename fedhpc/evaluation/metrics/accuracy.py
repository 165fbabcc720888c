"""Accuracy: the share of examples, 0 to 1, whose most likely label is the right one.

The prediction is the label whose rendered target has the highest log-likelihood after the prompt
(Brown et al. 2020, arXiv 2005.14165, section 2.4, without normalisation by length).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedhpc.evaluation.metrics.base import ItemMetric, Outputs


class Accuracy(ItemMetric):
    """How often the most likely label is the right one."""

    needs = "labels"
    higher_is_better = True
    lowest, highest = 0.0, 1.0

    def of_items(self, outputs: Outputs) -> NDArray[np.float64]:
        """1 where prediction == label."""
        return (outputs.predictions == outputs.labels).astype(np.float64)
