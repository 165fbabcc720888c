"""FLTrust: clients are trusted as far as they go where the server goes (Cao et al. 2021, arXiv 2012.13995).

The server trains on a few examples of its own, as a client does. The trust in an update is the cosine of its angle to
the server's, 0 where that is negative; each update gets the length of the server's, and their mean is weighted by trust
(algorithm 2).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from fedhpc.lazy import Tensor
from fedhpc.registry import Section
from fedhpc.server.aggregators._byzantine import gram_of
from fedhpc.server.aggregators.base import Aggregator

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class FLTrust(Aggregator):
    """The mean of updates as long as the server's own, weighted by trust; zero where nobody is trusted."""

    class Options(Section):
        root_examples: int = Field(
            100, ge=1, description="examples of the validation split that the server trains on and does not evaluate"
        )

    needs_root = True

    def combine(self, cohort: Cohort) -> Tensor:
        assert cohort.root is not None
        cohort = cohort.with_row(cohort.root)
        return cohort.weighted_sum(trusted(gram_of(cohort)))


def trusted(gram: np.ndarray) -> np.ndarray:
    """The weights (C + 1,) of the updates and, last, of the server's, 0. gram: their inner products."""
    norms = np.sqrt(gram.diagonal())
    lengths = norms[:-1] * norms[-1]
    aligned = (lengths > 0) & np.isfinite(lengths)
    trust = np.divide(gram[:-1, -1], lengths, out=np.zeros(len(lengths)), where=aligned).clip(min=0.0)
    factors = np.divide(norms[-1], norms[:-1], out=np.zeros(len(lengths)), where=aligned)
    total = trust.sum()
    return np.append(trust * factors / total if total else 0.0 * factors, 0.0)
