"""What a protocol of secure aggregation says: who shares masks with whom, and how many clients can undo a mask.

What clients and the server then do is the same for all of them (`fedhpc.secure.masked_sum`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from fedhpc.errors import UserError
from fedhpc.registry import Open, Section

FEWEST = 3  # uploads: of two, each client learns the other's from the sum and its own


class Protocol(ABC):
    """Says how the uploads of a cohort are masked (secure.name)."""

    #: The keys beside `name`.
    Options: ClassVar[type[Section]] = Section

    def __init__(self, options: Open) -> None:
        """options: the section `secure` of the configuration."""
        self.options = options

    @abstractmethod
    def graph(self, count: int, generator: np.random.Generator) -> list[list[int]]:
        """The neighbours of each of `count` clients, ascending: the clients that it shares a mask with.

        Every client has at least one neighbour, and is a neighbour of its neighbours.
        """

    @abstractmethod
    def degree(self, count: int) -> int:
        """How many neighbours the clients of a cohort of `count` have."""

    @abstractmethod
    def threshold(self, holders: int) -> int:
        """How many of the `holders` of the shares of a secret, a client and its neighbours, can recover it."""

    def require(self, sampled: int, awaited: int) -> None:
        """UserError where the options do not go with cohorts of `sampled` clients, of which a round awaits some."""
        if awaited < FEWEST:
            raise UserError(
                f"with secure aggregation the sum of {awaited} updates tells a client what another one sent",
                key="federation.cohort_size", remedy=f"sample at least {FEWEST} clients",
            )  # fmt: skip
        holders = 1 + self.degree(sampled)
        threshold = self.threshold(holders)
        if threshold > holders:
            raise UserError(
                f"secure.threshold is {threshold}, but {holders} clients of a cohort hold shares of a mask",
                key="secure.threshold", remedy=f"give at most {holders}",
            )  # fmt: skip
        if threshold * sampled > holders * awaited:
            raise UserError(
                f"a round awaits {awaited} of {sampled} clients, and a mask can be recovered by {threshold} of the "
                f"{holders} that hold its shares", key="secure.threshold",
                remedy=f"give at most {holders * awaited // sampled}, or lower federation.schedule.over_selection",
            )  # fmt: skip


def two_thirds(holders: int) -> int:
    """The default threshold: floor(2n/3) + 1 of n (Bonawitz et al. 2017, section 6, for a server that may lie)."""
    return 2 * holders // 3 + 1
