"""Answer containment, 0 to 1: the share of texts that hold one of their references as a run of words, without case,
punctuation and articles: for models that answer in sentences, where exact match is too strict."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedhpc.evaluation.metrics._answers import within, words
from fedhpc.evaluation.metrics.base import ItemMetric, Outputs


class Contains(ItemMetric):
    """How often a text contains one of its references."""

    needs = "texts"
    higher_is_better = True
    lowest, highest = 0.0, 1.0

    def of_items(self, outputs: Outputs) -> NDArray[np.float64]:
        """1 where any reference is in the text."""
        pairs = zip(outputs.texts, outputs.references, strict=True)
        right = [any(within(words(reference), words(text)) for reference in references) for text, references in pairs]
        return np.array(right, np.float64)
