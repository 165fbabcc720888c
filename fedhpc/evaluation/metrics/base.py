"""A metric computes one number from what the model did with the evaluated items."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from fedhpc.evaluation.metrics._intervals import Interval, of_mean


def _none() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


def _nothing() -> NDArray[np.float64]:
    return np.empty(0)


def _no_models() -> NDArray[np.float64]:
    return np.empty((0, 0))


@dataclass(frozen=True)
class Outputs:
    """What the model did with the evaluated items; the parts no metric needs are left empty."""

    # losses: over all supervised tokens (target and eos)
    nll_sum: float = 0.0  # negative log-likelihood, nats
    tokens: int = 0
    # the same for each distinct prompt: what its examples have in common makes them no independent draws
    prompt_nll: NDArray[np.float64] = field(default_factory=_nothing)
    prompt_tokens: NDArray[np.int64] = field(default_factory=_none)
    # labels: one per example
    labels: NDArray[np.int64] = field(default_factory=_none)
    predictions: NDArray[np.int64] = field(default_factory=_none)
    # texts: one per item; references[i] are those of texts[i], at least one
    texts: Sequence[str] = ()
    references: Sequence[Sequence[str]] = ()
    # rankings: one per question: the rank, from 1, of the first passage that is right; 0: none of those found is
    ranks: NDArray[np.int64] = field(default_factory=_none)
    # preferences: (models, items), how much higher the reward of the better answer is, in nats
    margins: NDArray[np.float64] = field(default_factory=_no_models)


class Metric(ABC):
    """One number that says how well a model did. A file of this folder has one class derived from this."""

    #: The part of `Outputs` that it is computed from.
    needs: ClassVar[Literal["losses", "labels", "texts", "rankings", "preferences"]]
    #: Whether the larger of two values is the better one.
    higher_is_better: ClassVar[bool]
    #: What it cannot be below and above.
    lowest: ClassVar[float] = -math.inf
    highest: ClassVar[float] = math.inf

    @abstractmethod
    def compute(self, outputs: Outputs) -> float:
        """The number; `outputs` has at least one item."""

    def interval(self, outputs: Outputs) -> Interval:
        """Where the number would be in 95 of 100 tests of other items, as many as these; NaN where it is not known."""
        return Interval()


class ItemMetric(Metric):
    """The mean over items of a number that each of them has."""

    @abstractmethod
    def of_items(self, outputs: Outputs) -> NDArray[np.float64]:
        """The number of every item: (n,)."""

    def compute(self, outputs: Outputs) -> float:
        return float(self.of_items(outputs).mean())

    def interval(self, outputs: Outputs) -> Interval:
        return of_mean(self.of_items(outputs))
