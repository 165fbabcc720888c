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
    member: int = 0  # which of the worker's ranks trains it


@dataclass(frozen=True)
class Times:
    """When things happen in a round, in virtual seconds (fedhpc.participation.devices)."""

    round: float  # from the step before it to its own
    clients: tuple[float, ...]  # per client of the cohort: from the moment in which it was asked to its update


@dataclass(frozen=True)
class Plan:
    """One round. `cohort` is in sampling order; a client is in a block unless it drops out, is late or has no data."""

    round: int
    cohort: tuple[int, ...]
    versions: tuple[int, ...]  # per client of the cohort: it starts from the server's state after this round
    dropped: frozenset[int]
    empty: frozenset[int]
    blocks: tuple[Block, ...]
    late: frozenset[int] = frozenset()  # cut off: their updates are not waited for, so they are not computed
    times: Times | None = None  # None: nobody takes time
    weights: tuple[float, ...] = ()  # per client of the cohort: what its update is multiplied by; empty: nothing
    pulls_to_models: bool = False  # whether an update leads from the newest state, and not from the client's start
    needed_later: tuple[int, ...] = ()  # versions before this round's step from which later rounds have clients

    @cached_property
    def training(self) -> tuple[int, ...]:
        """Clients that train, in cohort order."""
        return tuple(c for c in self.sending if c not in self.late)

    @cached_property
    def sending(self) -> tuple[int, ...]:
        """Clients whose updates leave them, in cohort order: those that train, and those that are late."""
        return tuple(c for c in self.cohort if c not in self.dropped and c not in self.empty)

    @property
    def staleness(self) -> tuple[int, ...]:
        """Per client of the cohort: server steps between the state that it started from and the one it changes."""
        return tuple(self.round - 1 - version for version in self.versions)

    @cached_property
    def index(self) -> dict[int, int]:
        """The position of each client in the cohort."""
        return {client: i for i, client in enumerate(self.cohort)}
