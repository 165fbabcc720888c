"""Client-level differential privacy: DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963, algorithm 1).

Every update is clipped to norm C, the sum of a round's updates gets Gaussian noise of standard deviation z C once, and
the result is divided by the expected number of clients, which depends on nobody's data:

    (sum_i g_i min(1, C / |g_i|) + N(0, (z C)^2 I)) / (q N)

Sum and noise are integers. The grid's step is fixed by C, not by the updates as without privacy, and rounding to the
grid is within C too. The noise is discrete Gaussian (Canonne, Kamath and Steinke 2020, arXiv 2004.00010): it has the
Renyi divergences of the continuous one (proposition 5 and corollary 16), and its steps are 2^30 to a C, so that it is
the continuous one rounded, but for a share of 2^-60 of every probability.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedhpc import registry, rng
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.privacy._accountant import Accountant, Fixed, Poisson, require_library
from fedhpc.privacy._budget import Budget
from fedhpc.privacy._discrete_gaussian import discrete_gaussian
from fedhpc.privacy.base import Privacy
from fedhpc.updates.exact_sum import FixedGrid
from fedhpc.updates.transforms.base import Transform

if TYPE_CHECKING:
    from fedhpc.config import Config
    from fedhpc.data.population import Population
    from fedhpc.updates.cohort import Cohort

_STEPS = 30  # bits: a coordinate of an update is at most 2^30 steps of the grid, and 2^31 clients fit into 62 bits
_MARGIN = 2.0**-20  # of the norm: more than a clipped update gains where it is rounded to float32


class Client(Privacy):
    """Protects every client: what a run releases tells little of whether a client took part, with all its data."""

    any_cohort: ClassVar[bool] = True

    class Options(Budget):
        sampling: Literal["poisson", "fixed"] = Field(
            "poisson", description="every client on its own, so that cohorts vary in size; or cohorts of one size"
        )

        def conflict(self, config: Any) -> str | None:
            return self.problem or _conflict(self, config)

    def __init__(self, config: Config, population: Population, size: int, cohort_size: int) -> None:
        super().__init__(config, population, size, cohort_size)
        require_library()
        clients, options = population.num_clients, self.options
        if options.delta > 1 / clients:
            raise UserError(
                f"privacy.delta {options.delta} is more than 1 / {clients}, one over the number of clients, and would "
                "allow to publish one of them",
                key="privacy.delta", remedy="lower it",
            )  # fmt: skip
        sampling = Poisson(cohort_size / clients) if options.sampling == "poisson" else Fixed(cohort_size, clients)
        self.accountant = Accountant(options.accountant, options.delta, sampling)

    @cached_property
    def noise_multiplier(self) -> float:
        """z, given or found for the budget and all rounds."""
        options = self.options
        if options.noise_multiplier is not None:
            return float(options.noise_multiplier)
        return self.accountant.noise_multiplier(options.epsilon, self.config.federation.rounds)

    # ---- what a round does

    @property
    def _exponent(self) -> int:
        """log2 of a step of the grid."""
        return math.ceil(math.log2(self.options.clip_norm)) - _STEPS

    @property
    def bound(self) -> float:
        """The norm to which updates are clipped: C, but for what rounding to the grid may add, half a step each way."""
        rounding = math.sqrt(self.size) / 2 * 2.0**self._exponent
        return (float(self.options.clip_norm) - rounding) * (1 - _MARGIN)

    def on_client(self, updates: Tensor) -> Tensor:
        norms = torch.linalg.vector_norm(updates.double(), dim=1, keepdim=True)
        return (updates.double() * (self.bound / norms).clamp(max=1.0)).to(updates.dtype)

    def combine(self, cohort: Cohort, round_: int, aggregate: Callable[[Cohort, int], Tensor]) -> Tensor:
        sigma = self.noise_multiplier * self.options.clip_norm / 2.0**self._exponent
        generator = rng.generator(self.config.run.seed, "privacy", round_)

        def noise(count: int) -> Tensor:
            return torch.from_numpy(discrete_gaussian(sigma, count, generator))

        return cohort.weighted_sum(np.ones(len(cohort)), FixedGrid(self._exponent, noise)) / self.cohort_size

    # ---- what the rounds spend

    def initial(self) -> dict[str, Tensor]:
        return {"rounds": torch.zeros(1, dtype=torch.int64)}

    def account(self, spent: Mapping[str, Tensor], clients: Sequence[int]) -> None:
        spent["rounds"].add_(1)

    def epsilon(self, spent: Mapping[str, Tensor]) -> float:
        return self.accountant.epsilon(self.noise_multiplier, int(spent["rounds"]))

    def affordable(self, rounds: int) -> int:
        options = self.options
        if options.noise_multiplier is None or options.epsilon is None:
            return rounds
        affordable = self.accountant.affordable(self.noise_multiplier, options.epsilon, rounds)
        if affordable == 0:
            one = self.accountant.epsilon(self.noise_multiplier, 1)
            raise UserError(
                f"privacy.epsilon {options.epsilon} is less than one round spends ({one:.4g})",
                key="privacy.epsilon", remedy="raise privacy.noise_multiplier or privacy.epsilon",
            )  # fmt: skip
        return affordable

    # ---- what is said of it

    def statement(self, rounds: int) -> str:
        options, asked = self.options, self.config.federation.rounds
        fewer = f", where the budget of {options.epsilon:g} ends" if rounds < asked else ""
        epsilon = self.accountant.epsilon(self.noise_multiplier, rounds)
        return (
            f"privacy: every client is protected with epsilon {epsilon:.4g} at delta {options.delta:g} "
            f"({self.accountant.sampling.relation}) after {rounds} rounds{fewer}; noise {self.noise_multiplier:.4g} "
            f"times clip_norm {options.clip_norm:g}, {self.accountant.sampling}, {options.accountant}"
        )

    def attributes(self, spent: Mapping[str, Tensor]) -> dict[str, str | float]:
        return {
            "epsilon": self.epsilon(spent),
            "delta": float(self.options.delta),
            "noise_multiplier": self.noise_multiplier,
            "neighbouring_relation": self.accountant.sampling.relation,
            "protects": "client",
        }


def _conflict(options: Any, config: Any) -> str | None:
    """What in the configuration would break the promise, or is not defined with it, in one line."""
    if config.mode != "federated":
        return f"privacy.name client protects clients from a federation, and mode {config.mode} has none: take it out"
    if options.sampling == "fixed" and options.accountant == "pld":
        return "privacy.accountant pld has no bound for cohorts of a fixed size: use rdp, or privacy.sampling poisson"
    if config.server.aggregator != "mean":
        return (
            f"server.aggregator {config.server.aggregator} has no bound on what one client changes, which privacy.name "
            "client needs: use mean"
        )
    if config.server.preaggregator.name != "none":
        return f"server.preaggregator {config.server.preaggregator.name} lets one client change several rows: use none"
    if config.devices.name != "none":
        return (
            f"devices.name {config.devices.name} takes clients by the time that their data take, which privacy.name "
            "client does not account for: use none"
        )
    if config.server.weighting != "uniform":
        return "privacy.name client gives every client the same weight: set server.weighting uniform"
    if config.federation.min_cohort != 1:
        return "federation.min_cohort would tell how many clients completed: take it out with privacy.name client"
    if config.federation.schedule.name != "synchronous":
        return f"federation.schedule {config.federation.schedule.name} is not accounted for: use synchronous"
    if config.masks_uploads and options.sampling == "poisson":
        return (
            f"secure.name {config.secure.name} makes a round void that has too few clients, which under "
            "privacy.sampling poisson depends on who is there: use fixed"
        )
    if config.client.scaffold:
        return "client.scaffold sends control variates beside the update, without noise: take it out, or privacy"
    if config.personalization.parts:
        return "personalization.parts stay on the clients without noise: take them out, or privacy"
    for one in config.transforms:
        if registry.choice("transforms", one.name).on_server is not Transform.on_server:
            return f"transforms: {one.name} works on the aggregate with what it knows of the clients: not with privacy"
    return None
