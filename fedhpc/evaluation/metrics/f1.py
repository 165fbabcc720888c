"""F1 of short answers, 0 to 1: the overlap of an answer's words with those of a reference.

A word counts as often as it occurs; case, punctuation and articles do not count (SQuAD; Rajpurkar et al. 2016, arXiv
1606.05250, section 6.1). The best reference of each item counts, and the result is the mean over items.
"""

from __future__ import annotations

from collections import Counter

import numpy as np
from numpy.typing import NDArray

from fedhpc.evaluation.metrics._answers import words
from fedhpc.evaluation.metrics.base import ItemMetric, Outputs


class F1(ItemMetric):
    """How much the words of a text overlap with those of its best reference."""

    needs = "texts"
    higher_is_better = True
    lowest, highest = 0.0, 1.0

    def of_items(self, outputs: Outputs) -> NDArray[np.float64]:
        """The largest F1 over the item's references."""
        pairs = zip(outputs.texts, outputs.references, strict=True)
        return np.array([max(_f1(words(text), words(ref)) for ref in references) for text, references in pairs])


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:  # only articles: as in SQuAD 2.0
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))
