"""chrF, 0 to 100, of the corpus (Popović 2015): the F2 score of character 1- to 6-grams, as sacrebleu computes it by
default. With several references the best one of each item counts."""

from __future__ import annotations

from fedhpc.evaluation.metrics import _sacrebleu
from fedhpc.evaluation.metrics._intervals import Interval
from fedhpc.evaluation.metrics.base import Metric, Outputs


class ChrF(Metric):
    """How many character sequences the texts share with their references, over the whole corpus."""

    needs = "texts"
    higher_is_better = True
    lowest, highest = 0.0, 100.0

    def compute(self, outputs: Outputs) -> float:
        """Corpus chrF of the texts against all references of each."""
        from sacrebleu.metrics import CHRF

        return _sacrebleu.score(CHRF(), outputs)

    def interval(self, outputs: Outputs) -> Interval:
        """The interval over resampled items."""
        from sacrebleu.metrics import CHRF

        return _sacrebleu.interval(CHRF(), outputs)
