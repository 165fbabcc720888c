"""A metric computes one number from what the model did with the evaluated items."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray


def _none() -> NDArray[np.int64]:
    return np.empty(0, np.int64)


@dataclass(frozen=True)
class Outputs:
    """What the model did with the evaluated items; the parts no metric needs are left empty."""

    # losses: over all supervised tokens (target and eos)
    nll_sum: float = 0.0  # negative log-likelihood, nats
    tokens: int = 0
    # labels: one per example
    labels: NDArray[np.int64] = field(default_factory=_none)
    predictions: NDArray[np.int64] = field(default_factory=_none)
    # texts: one per item; references[i] are those of texts[i], at least one
    texts: Sequence[str] = ()
    references: Sequence[Sequence[str]] = ()
    # rankings: one per question: the rank, from 1, of the first passage that is right; 0: none of those found is
    ranks: NDArray[np.int64] = field(default_factory=_none)


class Metric(ABC):
    """One number that says how well a model did. A file of this folder has one class derived from this."""

    #: The part of `Outputs` that it is computed from.
    needs: ClassVar[Literal["losses", "labels", "texts", "rankings"]]
    #: Whether the larger of two values is the better one.
    higher_is_better: ClassVar[bool]

    @abstractmethod
    def compute(self, outputs: Outputs) -> float:
        """The number; `outputs` has at least one item."""


def columns(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """References as sacrebleu wants them: the j-th of every item, None where an item has fewer."""
    most = max(map(len, references))
    return [[refs[j] if j < len(refs) else None for refs in references] for j in range(most)]
