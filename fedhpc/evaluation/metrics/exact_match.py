"""Exact match of short answers, 0 to 1: the share of texts equal to one of their references, without case, punctuation
and articles (SQuAD; Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1)."""

from __future__ import annotations

from fedhpc.evaluation.metrics._answers import words
from fedhpc.evaluation.metrics.base import Metric, Outputs


class ExactMatch(Metric):
    """How often a text equals one of its references."""

    needs = "texts"
    higher_is_better = True

    def compute(self, outputs: Outputs) -> float:
        """The mean over items of text == any reference."""
        pairs = zip(outputs.texts, outputs.references, strict=True)
        right = [any(words(text) == words(reference) for reference in references) for text, references in pairs]
        return sum(right) / len(right)
