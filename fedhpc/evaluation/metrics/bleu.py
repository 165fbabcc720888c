"""BLEU, 0 to 100, of the corpus (Papineni et al. 2002), as sacrebleu computes it by default (Post 2018,
arXiv 1804.08771): 4-grams, 13a tokenisation, case kept, exponential smoothing. Items may differ in the number of
their references."""

from __future__ import annotations

from fedhpc.evaluation.metrics import _sacrebleu
from fedhpc.evaluation.metrics._intervals import Interval
from fedhpc.evaluation.metrics.base import Metric, Outputs


class Bleu(Metric):
    """How many word sequences the texts share with their references, over the whole corpus."""

    needs = "texts"
    higher_is_better = True
    lowest, highest = 0.0, 100.0

    def compute(self, outputs: Outputs) -> float:
        """Corpus BLEU of the texts against all references of each."""
        from sacrebleu.metrics import BLEU

        return _sacrebleu.score(BLEU(), outputs)

    def interval(self, outputs: Outputs) -> Interval:
        """The interval over resampled items."""
        from sacrebleu.metrics import BLEU

        return _sacrebleu.interval(BLEU(), outputs)
