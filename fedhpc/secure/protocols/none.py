"""No secure aggregation: uploads are not masked."""

from __future__ import annotations

import numpy as np

from fedhpc.secure.protocols.base import Protocol


class NoMasks(Protocol):
    """Nobody shares a mask with anybody."""

    def graph(self, count: int, generator: np.random.Generator) -> list[list[int]]:
        return [[] for _ in range(count)]

    def degree(self, count: int) -> int:
        return 0

    def threshold(self, holders: int) -> int:
        return holders
