"""What an aggregator is: it turns a cohort's updates into one pseudo-gradient for the server.

class NormBounded(Aggregator):
    def combine(self, cohort):
        norms = cohort.norms().numpy()
        return cohort.weighted_sum(np.minimum(1.0, self.options.norm / norms) / len(cohort))
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from fedhpc.lazy import Tensor
from fedhpc.registry import Open, Section

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class Aggregator(ABC):
    """Combines the updates of a cohort into one (server.aggregator)."""

    #: The keys it adds to the section `server`.
    Options: ClassVar[type[Section]] = Section

    #: Whether it reads `Cohort.movements`, so that the client's optimizer must have a `movement`.
    needs_movements: ClassVar[bool] = False

    #: Whether weighted sums are all that it asks of the cohort: then the updates can be masked (section `secure`).
    sums_only: ClassVar[bool] = False

    #: Whether it is of updates of parameters alone, and of nothing else that clients may send, such as scores.
    updates_only: ClassVar[bool] = False

    #: Names of the vectors that the server keeps for it from round to round, zeros at first: `Cohort.memory`.
    keeps_on_server: ClassVar[tuple[str, ...]] = ()

    #: Whether the server trains on examples of its own too, whose update is `Cohort.root`.
    needs_root: ClassVar[bool] = False

    def __init__(self, options: Open) -> None:
        """options: the section `server` of the configuration."""
        self.options = options

    def fewest(self, planned: int) -> int:
        """With fewer updates than this it means nothing, and the round changes nothing.

        planned: how many clients the round has sampled.
        """
        return 1

    @abstractmethod
    def combine(self, cohort: Cohort) -> Tensor:
        """Make one pseudo-gradient of at least one accepted update: float64 (S,), of no meaning above rank 0.

        Every rank calls it, since the verbs of the cohort are collective; so what it does must follow from what every
        rank knows: options, shares, clients and `gram`, not from the sums that rank 0 alone gets.
        """
