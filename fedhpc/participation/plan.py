"""The plan of a round: what every rank knows of it before it begins, so that no command messages are needed."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Block:
    """Clients that train in one forward, and the worker that trains them."""

    clients: tuple[int, ...]
    worker: int  # index in Topology.workers
    cost: float  # tokens it will see


@dataclass(frozen=True)
class Plan:
    """One round. `cohort` is in sampling order; a client is in a block unless it drops out or has no data."""

    round: int
    cohort: tuple[int, ...]
    versions: tuple[int, ...]  # per client of the cohort: it starts from the server's state after this round
    dropped: frozenset[int]
    empty: frozenset[int]
    blocks: tuple[Block, ...]

    @property
    def training(self) -> tuple[int, ...]:
        """Clients that train, in cohort order."""
        return tuple(c for c in self.cohort if c not in self.dropped and c not in self.empty)

    @cached_property
    def index(self) -> dict[int, int]:
        """The position of each client in the cohort."""
        return {client: i for i, client in enumerate(self.cohort)}
