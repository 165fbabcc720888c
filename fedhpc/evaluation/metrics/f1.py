"""F1 of short answers, 0 to 1: the overlap of an answer's words with those of a reference.

A word counts as often as it occurs; case, punctuation and articles do not count (SQuAD; Rajpurkar et al. 2016, arXiv
1606.05250, section 6.1). The best reference of each item counts, and the result is the mean over items.
"""

from __future__ import annotations

from collections import Counter

from fedhpc.evaluation.metrics._answers import words
from fedhpc.evaluation.metrics.base import Metric, Outputs


class F1(Metric):
    """How much the words of a text overlap with those of its best reference."""

    needs = "texts"
    higher_is_better = True

    def compute(self, outputs: Outputs) -> float:
        """The mean over items of the largest F1 over the item's references."""
        pairs = zip(outputs.texts, outputs.references, strict=True)
        scores = [max(_f1(words(text), words(reference)) for reference in references) for text, references in pairs]
        return sum(scores) / len(scores)


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:  # only articles: as in SQuAD 2.0
        return float(answer == reference)
    common = sum((Counter(answer) & Counter(reference)).values())
    return 2 * common / (len(answer) + len(reference))
