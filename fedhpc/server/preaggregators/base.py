"""What a pre-aggregator is: it replaces the updates of a cohort by combinations of them, which are aggregated then."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedhpc.registry import Open, Section

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class Preaggregator(ABC):
    """Mixes the updates of a cohort (server.preaggregator)."""

    #: The keys beside `name`.
    Options: ClassVar[type[Section]] = Section

    def __init__(self, options: Open) -> None:
        """options: its part of the section `server` in the configuration."""
        self.options = options

    def rows(self, count: int) -> int:
        """How many combinations it makes of `count` updates."""
        return count

    @abstractmethod
    def mixed(self, cohort: Cohort, draws: np.random.Generator) -> Cohort:
        """Make the cohort of combinations, `Cohort.mixed`. Collective. draws: those of the round, on every rank."""
