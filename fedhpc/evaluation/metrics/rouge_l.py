"""ROUGE-L, 0 to 1: the F1 of the longest common subsequence of words (Lin 2004, section 3.1), as the package
rouge-score computes it without stemming. The best reference of each item counts; the mean over items."""

from __future__ import annotations

from fedhpc.evaluation.metrics.base import Metric, Outputs


class RougeL(Metric):
    """How long the common word sequence of a text and its best reference is."""

    needs = "texts"
    higher_is_better = True

    def compute(self, outputs: Outputs) -> float:
        """The mean over items of the largest F1 over the item's references."""
        from rouge_score.rouge_scorer import RougeScorer

        scorer = RougeScorer(["rougeL"])
        scores = [
            scorer.score_multi(references, text)["rougeL"].fmeasure
            for text, references in zip(outputs.texts, outputs.references, strict=True)
        ]
        return float(sum(scores) / len(scores))
