"""The contract of a schedule: the plan of every round, as a pure function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedhpc import registry
from fedhpc.participation.blocks import assign, client_costs, form_blocks
from fedhpc.participation.devices.base import Devices, Work
from fedhpc.participation.plan import Block
from fedhpc.participation.sampling import cohort_size
from fedhpc.registry import Section

if TYPE_CHECKING:
    from fedhpc.config import Config
    from fedhpc.data.population import Population
    from fedhpc.data.tokens import Examples
    from fedhpc.participation.plan import Plan


class Schedule(ABC):
    """A schedule says which clients start when, and from which version of the server's state.

    Every rank makes the same schedule and asks it for the same plans, so a plan must follow from the configuration, the
    population and the round alone.
    """

    Options: ClassVar[type[Section]] = Section

    def __init__(
        self,
        config: Config,
        population: Population,
        examples: Examples,
        workers: Sequence[int],
        block_size: int,
        traffic: Callable[[int], tuple[int, int]] = lambda client: (0, 0),
        members: int = 1,
        together: bool = False,
    ) -> None:
        """workers: the workers there are; block_size: most clients in one forward (K); traffic: bytes that a client
        receives and sends in a round; members: ranks of each worker; together: whether they train each client
        together. UserError where the devices do not fit the population.
        """
        self.config, self.population, self.examples = config, population, examples
        self.workers, self.block_size, self._traffic, self._members = workers, block_size, traffic, members
        self._together = together
        devices: type[Devices] = registry.choice("devices", config.devices.name)
        #: How long clients take.
        self.devices = devices(config.devices, config.run.seed, population)

    @classmethod
    def buffer_size(cls, config: Config) -> int | None:
        """How many clients a round has where the schedule's options say it, and not federation.cohort_size."""
        return None

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of results.h5 that runs with this schedule and these devices have beside those of all runs."""
        if not self.devices.takes_time:
            return ()
        in_rounds = ("rounds/late", "rounds/virtual_seconds", "rounds/staleness")
        return (*in_rounds, "clients/virtual_seconds", "clients/staleness")

    @property
    def sampled(self) -> int:
        """Clients that a round samples. UserError where there are fewer."""
        return cohort_size(self.config, self.population)

    @abstractmethod
    def plan(self, round_: int) -> Plan:
        """The plan of round `round_`, counted from 1."""

    def seconds(self, client: int, version: int) -> float:
        """Virtual seconds that a client takes which starts from a version of the server's state."""
        tokens = 0.0 if self.empty([client]) else self._costs([client])[client]
        return self.devices.seconds(client, version, Work(tokens, *self._traffic(client)))

    def empty(self, clients: Sequence[int]) -> frozenset[int]:
        """Which of the clients have no training examples."""
        sizes = self.population.num_examples_of(clients)
        return frozenset(np.array(clients)[sizes == 0].tolist())

    def blocks(self, clients: Sequence[int]) -> tuple[Block, ...]:
        """The blocks of the clients that train in a round, each with its worker."""
        costs = self._costs(clients)
        blocks = form_blocks(costs, self.block_size, self.config.runtime.workers)
        costs_of_blocks = [sum(costs[c] for c in block) for block in blocks]
        return tuple(assign(blocks, costs_of_blocks, self.workers, self._members, self._together))

    def _costs(self, clients: Sequence[int]) -> dict[int, float]:
        return client_costs(self.config, self.population, self.examples, clients)
