"""Corpus scores of the package sacrebleu, of items that may differ in the number of their references."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.evaluation.metrics._intervals import Interval, by_bootstrap
from fedhpc.evaluation.metrics.base import Outputs


def score(metric: Any, outputs: Outputs) -> float:
    """The corpus score of the texts against all references of each."""
    return float(metric.corpus_score(list(outputs.texts), _columns(outputs.references)).score)


def interval(metric: Any, outputs: Outputs) -> Interval:
    """The interval of the corpus score over resampled items, from sacrebleu's counts of each item.

    Its own resampling (n_bootstrap) raises a TypeError where one sample of chrF scores nothing and another something
    (findings/sacrebleu_chrf_confidence.sh).
    """
    counts = np.array(metric._extract_corpus_statistics(list(outputs.texts), _columns(outputs.references)))

    def of(drawn: NDArray[np.int64]) -> float:
        return float(metric._compute_score_from_stats(counts[drawn].sum(axis=0).tolist()).score)

    return by_bootstrap(of, len(counts))


def _columns(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu wants them: the j-th of every item, None where an item has fewer."""
    most = max(map(len, references))
    return [[refs[j] if j < len(refs) else None for refs in references] for j in range(most)]
