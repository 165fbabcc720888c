"""Every two clients of a cohort share a mask (SecAgg, Bonawitz et al. 2017, doi 10.1145/3133956.3133982, figure 4)."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedhpc.registry import Section
from fedhpc.secure.protocols.base import Protocol, two_thirds


class Pairwise(Protocol):
    """The complete graph: what a client computes and sends grows with the cohort."""

    class Options(Section):
        threshold: int | None = Field(
            None, ge=2, description="clients that can recover a mask; default two thirds of the cohort, and one more"
        )

    def graph(self, count: int, generator: np.random.Generator) -> list[list[int]]:
        return [[other for other in range(count) if other != client] for client in range(count)]

    def degree(self, count: int) -> int:
        return count - 1

    def threshold(self, holders: int) -> int:
        return two_thirds(holders) if self.options.threshold is None else int(self.options.threshold)
