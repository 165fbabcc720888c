"""Answer containment, 0 to 1: the share of texts that hold one of their references as a run of words, without case,
punctuation and articles: for models that answer in sentences, where exact match is too strict."""

from __future__ import annotations

from fedhpc.evaluation.metrics._answers import within, words
from fedhpc.evaluation.metrics.base import Metric, Outputs


class Contains(Metric):
    """How often a text contains one of its references."""

    needs = "texts"
    higher_is_better = True

    def compute(self, outputs: Outputs) -> float:
        """The mean over items of any reference in the text."""
        pairs = zip(outputs.texts, outputs.references, strict=True)
        right = [any(within(words(reference), words(text)) for reference in references) for text, references in pairs]
        return sum(right) / len(right)
