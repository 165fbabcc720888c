"""Exact match of short answers, 0 to 1: the share of texts equal to one of their references, without case, punctuation
and articles (SQuAD; Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedhpc.evaluation.metrics._answers import words
from fedhpc.evaluation.metrics.base import ItemMetric, Outputs


class ExactMatch(ItemMetric):
    """How often a text equals one of its references."""

    needs = "texts"
    higher_is_better = True
    lowest, highest = 0.0, 1.0

    def of_items(self, outputs: Outputs) -> NDArray[np.float64]:
        """1 where text == any reference."""
        pairs = zip(outputs.texts, outputs.references, strict=True)
        right = [any(words(text) == words(reference) for reference in references) for text, references in pairs]
        return np.array(right, np.float64)
