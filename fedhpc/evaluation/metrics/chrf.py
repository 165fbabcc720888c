"""chrF, 0 to 100, of the corpus (Popović 2015): the F2 score of character 1- to 6-grams, as sacrebleu computes it by
default. With several references the best one of each item counts."""

from __future__ import annotations

from fedhpc.evaluation.metrics.base import Metric, Outputs, columns


class ChrF(Metric):
    """How many character sequences the texts share with their references, over the whole corpus."""

    needs = "texts"
    higher_is_better = True

    def compute(self, outputs: Outputs) -> float:
        """Corpus chrF of the texts against all references of each."""
        from sacrebleu.metrics import CHRF

        return float(CHRF().corpus_score(list(outputs.texts), columns(outputs.references)).score)
