"""ROUGE-L, 0 to 1: the F1 of the longest common subsequence of words (Lin 2004, section 3.1), as the package
rouge-score computes it without stemming. The best reference of each item counts; the mean over items."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fedhpc.evaluation.metrics.base import ItemMetric, Outputs


class RougeL(ItemMetric):
    """How long the common word sequence of a text and its best reference is."""

    needs = "texts"
    higher_is_better = True
    lowest, highest = 0.0, 1.0

    def of_items(self, outputs: Outputs) -> NDArray[np.float64]:
        """The largest F1 over the item's references."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        scores = [
            scorer.score_multi(references, text)["rougeL"].fmeasure
            for text, references in zip(outputs.texts, outputs.references, strict=True)
        ]
        return np.array(scores)
