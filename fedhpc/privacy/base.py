"""The interface of a level of privacy: where it acts in a round, and what the rounds so far have spent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from fedhpc.lazy import Tensor
from fedhpc.registry import Section

if TYPE_CHECKING:
    from fedhpc.config import Config
    from fedhpc.data.population import Population
    from fedhpc.methods.base import Method
    from fedhpc.objectives.base import Objective
    from fedhpc.ranks.transport.base import Transport
    from fedhpc.training.example_privacy import ExamplePrivacy
    from fedhpc.updates.cohort import Cohort


@dataclass(frozen=True)
class Releases:
    """What the rounds of a run release, and of whom."""

    population: Population
    size: int  # S, the length of an update
    cohort_size: int  # clients of a round, or how many are expected
    trains: Callable[[int], Sequence[int]]  # the clients that train in a round, by the plan, late ones too
    noise_multiplier: float | None = None  # what rank 0 has found for the budget; None where none was looked for yet


class Privacy(ABC):
    """A level of privacy: what one release may tell of one record, and what all releases of the run add up to."""

    #: The keys beside `name`.
    Options: ClassVar[type[Section]] = Section

    #: Whether a round counts whoever completed it, also where nobody did. What is rejected is zero then, and is sent.
    any_cohort: ClassVar[bool] = False

    def __init__(self, config: Config, releases: Releases) -> None:
        """UserError where the population is too small for what is promised."""
        self.config, self.releases = config, releases
        self.options: Any = config.privacy

    def check(self, method: Method, objective: Objective) -> None:  # noqa: B027  most have nothing to refuse
        """UserError where clients train in a way that this cannot protect."""

    @property
    def noise_multiplier(self) -> float | None:
        """z, given or found for the budget; None where there is no noise."""
        return None

    # ---- what a round does

    @property
    def of_examples(self) -> ExamplePrivacy | None:
        """What a client does to the gradients of its single examples; None: nothing."""
        return None

    def combine(
        self,
        transport: Transport,
        cohort: Cohort,
        round_: int,
        aggregate: Callable[[Cohort, int], Tensor],
        spent: dict[str, Tensor],
    ) -> Tensor:
        """Make one pseudo-gradient of the accepted updates, float64 (S,) on rank 0. Collective.

        aggregate: what combines the cohort of a round without privacy. spent: as `initial` has it, on rank 0, where its
        values may be replaced by those after the round; empty elsewhere.
        """
        return aggregate(cohort, round_)

    # ---- what the rounds spend

    def initial(self) -> dict[str, Tensor]:
        """What the server keeps from round to round, and every checkpoint has, before the first round."""
        return {}

    @abstractmethod
    def account(self, spent: Mapping[str, Tensor], clients: Sequence[int]) -> None:
        """Note in `spent` that a round took place in which these clients trained."""

    @abstractmethod
    def epsilon(self, spent: Mapping[str, Tensor]) -> float:
        """The epsilon at privacy.delta of all rounds that `spent` has noted."""

    @property
    def columns(self) -> tuple[str, ...]:
        """The columns of /rounds that `reported` fills."""
        return ("epsilon",)

    def reported(self, spent: Mapping[str, Tensor]) -> dict[str, float]:
        """What the row of the last round in `spent` says of it, by column."""
        return {"epsilon": self.epsilon(spent)}

    def affordable(self, rounds: int) -> int:
        """How many rounds fit into the budget, at most `rounds`. UserError where not even one does."""
        return rounds

    # ---- what is said of it

    def statement(self, rounds: int) -> str:
        """What a run of `rounds` rounds promises, in one line; empty where it promises nothing."""
        return ""

    def promise(self, spent: Mapping[str, Tensor]) -> str:
        """What the state after the rounds that `spent` has noted promises, in a sentence; empty where nothing."""
        return promise_of(self.attributes(spent), self.config)

    def attributes(self, spent: Mapping[str, Tensor]) -> dict[str, str | float]:
        """Root attributes of results.h5 once the rounds that `spent` has noted are all."""
        return {}


def promise_of(attributes: Mapping[str, Any], config: Config) -> str:
    """What the root attributes of a run promise, in a sentence; empty where nothing.

    What else tells something of the same data is said too.
    """
    if "protects" not in attributes:
        return ""
    beside = " What the adapter that this run went on from (method.from) tells of the same data comes on top."
    return (
        f"Differential privacy: every {attributes['protects']} is protected with epsilon {attributes['epsilon']:.4g} "
        f"at delta {attributes['delta']:g}, between data sets that are neighbours by "
        f"{attributes['neighbouring_relation']}.{beside if config.method.goes_on_from is not None else ''}"
    )
