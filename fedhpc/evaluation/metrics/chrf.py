"""chrF, 0 to 100, of the corpus (Popović 2015): the F2 score of character 1- to 6-grams, as sacrebleu computes it by
default. With several references the best one of each item counts."""

from __future__ import annotations

from fedhpc.evaluation.metrics.base import Outputs, columns
from fedhpc.registry import Section

NEEDS = "texts"
HIGHER_IS_BETTER = True


class Options(Section):
    pass


def compute(outputs: Outputs) -> float:
    """Corpus chrF of the texts against all references of each."""
    from sacrebleu.metrics import CHRF

    return float(CHRF().corpus_score(list(outputs.texts), columns(outputs.references)).score)
