"""How the server combines the updates of a round: a pre-aggregator, and then an aggregator."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhpc import registry
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.registry import Open
from fedhpc.rng import generator
from fedhpc.server.aggregators.base import Aggregator
from fedhpc.server.preaggregators.base import Preaggregator
from fedhpc.updates.cohort import expect_vector

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class Aggregation:
    """server.preaggregator and server.aggregator of a run."""

    def __init__(self, options: Open, seed: int, planned: int | None) -> None:
        """options: the section `server`. planned: how many clients a round samples; None where nobody
        combines what they send.

        UserError where that is not enough for the rules.
        """
        mixing = options.preaggregator
        self.name: str = options.aggregator
        self.aggregator: Aggregator = registry.choice("aggregators", self.name)(options)
        self._preaggregator: Preaggregator = registry.choice("preaggregators", mixing.name)(mixing)
        self._seed = seed
        #: With fewer accepted updates a round changes nothing.
        self.fewest = 0 if planned is None else self._fewest(planned, mixing.name)

    def _fewest(self, planned: int, mixing: str) -> int:
        needed = self.aggregator.fewest(planned)
        if self._preaggregator.rows(planned) < needed:
            made = f"server.preaggregator {mixing} makes {self._preaggregator.rows(planned)} of "
            raise UserError(
                f"server.aggregator {self.name} with these options needs {needed} updates, and "
                f"{'' if mixing == 'none' else made}{planned} clients are sampled",
                key="server.aggregator", remedy="let fewer of them be wrong, or raise federation.cohort_size",
            )  # fmt: skip
        return next(count for count in range(1, planned + 1) if self._preaggregator.rows(count) >= needed)

    def initial_memory(self, size: int) -> dict[str, Tensor]:
        """What the server keeps for the aggregator before the first round, float64 (S,) by name; size 0 elsewhere."""
        return {name: torch.zeros(size, dtype=torch.float64) for name in self.aggregator.keeps_on_server}

    def combine(self, cohort: Cohort, round_: int) -> Tensor:
        """Make one pseudo-gradient of at least `fewest` updates: float64 (S,) on rank 0. Collective."""
        draws = generator(self._seed, "preaggregation", round_)
        mixed = self._preaggregator.mixed(cohort, draws)
        return expect_vector(self.aggregator.combine(mixed), cohort.size, self.name)
