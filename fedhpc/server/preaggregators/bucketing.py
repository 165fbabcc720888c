"""Means of random buckets in place of the updates (Karimireddy et al. 2022, arXiv 2006.09365, algorithm 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from fedhpc.registry import Section
from fedhpc.server.preaggregators.base import Preaggregator

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class Bucketing(Preaggregator):
    """Deals the updates out to buckets of `size` clients, the last of which may have fewer, and takes their means."""

    class Options(Section):
        size: int = Field(2, ge=1, description="clients of a bucket")

    def rows(self, count: int) -> int:
        return -(-count // int(self.options.size))

    def mixed(self, cohort: Cohort, draws: np.random.Generator) -> Cohort:
        bucket = draws.permutation(len(cohort)) // self.options.size
        matrix = (np.arange(self.rows(len(cohort)))[:, None] == bucket).astype(np.float64)
        return cohort.mixed(matrix / matrix.sum(axis=1, keepdims=True))
