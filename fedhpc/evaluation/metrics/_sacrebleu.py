"""Corpus scores of the package sacrebleu, of items that may differ in the number of their references."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from fedhpc.evaluation.metrics._intervals import RESAMPLES, Interval
from fedhpc.evaluation.metrics.base import Outputs


def score(metric: Any, outputs: Outputs) -> float:
    """The corpus score of the texts against all references of each."""
    return float(metric.corpus_score(list(outputs.texts), _columns(outputs.references)).score)


def interval(metric: Any, outputs: Outputs) -> Interval:
    """sacrebleu's own: resampled items, with a seed of its own (SACREBLEU_SEED)."""
    resampled = metric.corpus_score(list(outputs.texts), _columns(outputs.references), n_bootstrap=RESAMPLES)
    printed = json.loads(resampled.format(width=6, signature=str(metric.get_signature()), is_json=True))
    if "confidence" not in printed:  # no text scores anything
        return Interval(0.0, 0.0, "bootstrap")
    middle, half = printed["confidence_mean"], printed["confidence_var"]
    return Interval(middle - half, middle + half, "bootstrap")


def _columns(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu wants them: the j-th of every item, None where an item has fewer."""
    most = max(map(len, references))
    return [[refs[j] if j < len(refs) else None for refs in references] for j in range(most)]
