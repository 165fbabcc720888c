"""The contract of a schedule: the plan of every round, as a pure function."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

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
        self, config: Config, population: Population, examples: Examples, workers: Sequence[int], block_size: int
    ) -> None:
        """workers: the workers there are; block_size: most clients in one forward (K)."""
        self.config, self.population, self.examples = config, population, examples
        self.workers, self.block_size = workers, block_size

    @abstractmethod
    def plan(self, round_: int) -> Plan:
        """The plan of round `round_`, counted from 1."""
