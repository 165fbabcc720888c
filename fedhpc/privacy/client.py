"""Client-level differential privacy: DP-FedAvg (McMahan et al. 2018, arXiv 1710.06963, algorithm 1).

Every update is clipped to norm C, the sum of a round's updates gets Gaussian noise of standard deviation z C once, and
the result is divided by the expected number of clients, which depends on nobody's data:

    (sum_i g_i min(1, C / |g_i|) + N(0, (z C)^2 I)) / (q N)

Sum and noise are integers. The grid's step is fixed by C, not by the updates as without privacy, and rounding to the
grid is within C too. What the accountants add up is continuous noise: rounding it to the grid is rounding the noisy
sum, which tells nothing more. What is drawn is discrete Gaussian (Canonne, Kamath and Steinke 2020, arXiv 2004.00010),
whose Renyi divergences are at most the continuous ones (section 2). A C has 2^29 to 2^30 steps, so it is the rounded
one but for a share of each probability that is below 2^-57 / z^2 within six standard deviations.

With `adaptive` C follows a quantile of the norms (Andrew et al. 2021, arXiv 1905.03871): a second noisy sum counts the
updates within C, and C falls where they are more than their share, exp(-lr (count / (q N) - quantile)).

With `bands` the noise of consecutive rounds is correlated, so that less of it adds up in theta (Choquette-Choo et al.
2023, arXiv 2306.08153, algorithm 1 and theorem 4): see `BandedNoise`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
from pydantic import Field

from fedhpc import registry, rng
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.privacy._accountant import MOST_NOISE, Accountant, Fixed, Poisson, require_library
from fedhpc.privacy._banded_noise import BandedNoise
from fedhpc.privacy._budget import LEAST_CLIP, MOST_CLIP, Budget
from fedhpc.privacy._discrete_gaussian import discrete_gaussian
from fedhpc.privacy.base import Privacy, Releases
from fedhpc.registry import Section
from fedhpc.updates.exact_sum import FixedGrid
from fedhpc.updates.layout import Layout
from fedhpc.updates.transforms.base import Transform

if TYPE_CHECKING:
    from fedhpc.config import Config
    from fedhpc.ranks.transport.base import Transport
    from fedhpc.updates.cohort import Cohort

_STEPS = 30  # bits: a coordinate of an update is at most 2^30 steps of the grid, and 2^31 clients fit into 62 bits
_MOST_CHANGE = 50.0  # of the logarithm of a clip norm in one round: more than between its limits


class Adaptive(Section):
    quantile: float = Field(0.5, gt=0, lt=1, description="share of the updates that clip_norm leaves as they are")
    lr: float = Field(0.2, gt=0, description="how fast clip_norm follows that share, from round to round")
    count_noise: float | None = Field(
        None,
        gt=0,
        le=MOST_NOISE,
        description="standard deviation of the noise in their number; default a twentieth of the cohort",
    )


class Client(Privacy):
    """Protects every client: what a run releases tells little of whether a client took part, with all its data."""

    any_cohort: ClassVar[bool] = True

    class Options(Budget):
        sampling: Literal["poisson", "fixed"] = Field(
            "poisson", description="every client on its own, so that cohorts vary in size; or cohorts of one size"
        )
        bands: int = Field(
            1, ge=1, description="rounds over which noise is correlated; a client is in every bands-th at most"
        )
        adaptive: Adaptive | None = Field(
            None, description="clip_norm is that of round 1, and follows a quantile of the norms of the updates"
        )

        def conflict(self, config: Any) -> str | None:
            return self.problem or _conflict(self, config)

    def __init__(self, config: Config, releases: Releases) -> None:
        super().__init__(config, releases)
        require_library()
        clients, cohort_size, options = releases.population.num_clients, releases.cohort_size, self.options
        if options.delta > 1 / clients:
            raise UserError(
                f"privacy.delta {options.delta} is more than 1 / {clients}, one over the number of clients, and would "
                "allow to publish one of them",
                key="privacy.delta", remedy="lower it",
            )  # fmt: skip
        if cohort_size * options.bands > clients:
            raise UserError(
                f"a cohort of {cohort_size} is more than one in privacy.bands {options.bands} of {clients} clients",
                key="privacy.bands", remedy="lower it, or federation.cohort_size",
            )  # fmt: skip
        rate = cohort_size * options.bands / clients
        sampling = Poisson(rate) if options.sampling == "poisson" else Fixed(cohort_size, clients)
        self.accountant = Accountant(options.accountant, options.delta, sampling)
        if options.adaptive is not None:
            self._require_noise_for_updates()

    @cached_property
    def noise_multiplier(self) -> float:
        """z, given or found for the budget and all rounds."""
        options = self.options
        known = options.noise_multiplier or self.releases.noise_multiplier
        if known is not None:
            return float(known)
        return self.accountant.noise_multiplier(options.epsilon, self._sums(self.config.federation.rounds))

    def _sums(self, rounds: int) -> int:
        """The number of independent noisy sums that rounds amount to: a client can be in one of `bands` of them."""
        return math.ceil(rounds / self.options.bands)

    # ---- what a round does

    @property
    def noise_of_updates(self) -> float:
        """The noise multiplier of the sum of updates: more than z where their number within C takes noise too.

        Both sums together are one Gaussian mechanism of multiplier z: z^-2 = z_u^-2 + (2 s)^-2 (Andrew et al., theorem
        1), where s is the standard deviation of the noise in the number.
        """
        if self.options.adaptive is None:
            return self.noise_multiplier
        return float((self.noise_multiplier**-2 - (2 * self._count_noise) ** -2) ** -0.5)

    def _require_noise_for_updates(self) -> None:
        if 2 * self._count_noise <= self.noise_multiplier:
            raise UserError(
                f"privacy.adaptive.count_noise {self._count_noise:.4g} is at most half of the noise multiplier "
                f"{self.noise_multiplier:.4g}, which leaves nothing for the updates",
                key="privacy.adaptive.count_noise", remedy="raise it, or federation.cohort_size",
            )  # fmt: skip

    @property
    def _count_noise(self) -> float:
        given = self.options.adaptive.count_noise
        return self.releases.cohort_size / 20 if given is None else float(given)

    def bound(self, clip_norm: float) -> float:
        """The norm to which updates are clipped: C, but for what rounding to the grid may add, half a step each way."""
        rounding = math.sqrt(self.releases.size) / 2 * 2.0 ** _exponent(clip_norm)
        return (clip_norm - rounding) * (1 - kernels.clip_margin(torch.float32))

    def combine(
        self,
        transport: Transport,
        cohort: Cohort,
        round_: int,
        aggregate: Callable[[Cohort, int], Tensor],
        spent: dict[str, Tensor],
    ) -> Tensor:
        clip_norm = self._clip_norm(transport, spent)
        draws = rng.generator(self.config.run.seed, "privacy", round_)
        ones, exponent = np.ones(len(cohort)), _exponent(clip_norm)
        grid = _noisy_grid(exponent, self.noise_of_updates * clip_norm, draws)
        banded = None
        if self.options.bands > 1:
            banded = BandedNoise(grid.noise, self.options.bands, spent.get("noise"))
            grid = FixedGrid(exponent, banded)
        total = cohort.mapped(partial(clipped, bound=self.bound(clip_norm))).weighted_sum(ones, grid)
        if banded is not None and spent:
            spent["noise"] = banded.latest()
        if self.options.adaptive is not None:
            within = cohort.mapped(partial(_signs_within, norm=clip_norm), Layout({"within": (1,)}))
            signs = within.weighted_sum(ones, _noisy_grid(-_STEPS, 2 * self._count_noise, draws))
            share = 0.5 + float(signs) / 2 / self.releases.cohort_size
            if spent:
                spent["clip_norm"] = torch.tensor([self._next(clip_norm, share)], dtype=torch.float64)
        return total / self.releases.cohort_size

    def _clip_norm(self, transport: Transport, spent: Mapping[str, Tensor]) -> float:
        """C of this round, on every rank. Collective."""
        if self.options.adaptive is None:
            return float(self.options.clip_norm)
        now = spent["clip_norm"].clone() if spent else torch.zeros(1, dtype=torch.float64)
        transport.broadcast(now)
        return float(now)

    def _next(self, clip_norm: float, share: float) -> float:
        """C of the next round: it follows the quantile of the norms (Andrew et al., section 2.1)."""
        adaptive = self.options.adaptive
        change = -adaptive.lr * (share - adaptive.quantile)
        after = clip_norm * math.exp(min(max(change, -_MOST_CHANGE), _MOST_CHANGE))
        return float(min(max(after, LEAST_CLIP), MOST_CLIP))  # where clients send zeros alone it falls without end

    # ---- what the rounds spend

    def initial(self) -> dict[str, Tensor]:
        clip_norm = torch.tensor([self.options.clip_norm], dtype=torch.float64)
        adaptive = {} if self.options.adaptive is None else {"clip_norm": clip_norm}
        past = torch.zeros(self.options.bands - 1, self.releases.size, dtype=torch.float64)
        banded = {"noise": past} if self.options.bands > 1 else {}
        return {"rounds": torch.zeros(1, dtype=torch.int64), **adaptive, **banded}

    def account(self, spent: Mapping[str, Tensor], clients: Sequence[int]) -> None:
        spent["rounds"].add_(1)

    def epsilon(self, spent: Mapping[str, Tensor]) -> float:
        return self.accountant.epsilon(self.noise_multiplier, self._sums(int(spent["rounds"])))

    @property
    def columns(self) -> tuple[str, ...]:
        return super().columns if self.options.adaptive is None else (*super().columns, "clip_norm")

    def reported(self, spent: Mapping[str, Tensor]) -> dict[str, float]:
        adaptive = {} if self.options.adaptive is None else {"clip_norm": float(spent["clip_norm"])}
        return {**super().reported(spent), **adaptive}

    def affordable(self, rounds: int) -> int:
        options = self.options
        if not options.ends_run:
            return rounds
        affordable = self.accountant.affordable(self.noise_multiplier, options.epsilon, self._sums(rounds))
        options.require_a_round(affordable, lambda: self.accountant.epsilon(self.noise_multiplier, 1))
        return min(rounds, affordable * int(options.bands))

    # ---- what is said of it

    def statement(self, rounds: int) -> str:
        options, asked = self.options, self.config.federation.rounds
        fewer = f", where the budget of {options.epsilon:g} ends" if rounds < asked else ""
        moves = "" if options.adaptive is None else f" (of round 1; it follows quantile {options.adaptive.quantile:g})"
        moves += "" if options.bands == 1 else f" in bands of {options.bands} rounds"
        epsilon = self.accountant.epsilon(self.noise_multiplier, self._sums(rounds))
        return (
            f"privacy: every client is protected with epsilon {epsilon:.4g} at delta {options.delta:g} "
            f"({self.accountant.sampling.relation}) after {rounds} rounds{fewer}; noise {self.noise_multiplier:.4g} "
            f"times clip_norm {options.clip_norm:g}{moves}, {self.accountant.sampling}, {options.accountant}"
        )

    def attributes(self, spent: Mapping[str, Tensor]) -> dict[str, str | float]:
        return {
            "epsilon": self.epsilon(spent),
            "delta": float(self.options.delta),
            "noise_multiplier": self.noise_multiplier,
            "neighbouring_relation": self.accountant.sampling.relation,
            "protects": "client",
        }


def clipped(updates: Tensor, bound: float) -> Tensor:
    """Shorten each update (c, S) that is longer than `bound` to that length."""
    return (updates.double() * (bound / kernels.row_norms(updates)).clamp(max=1.0)).to(updates.dtype)


def _signs_within(updates: Tensor, norm: float) -> Tensor:
    """1 for each update (c, S) that is not longer than `norm`, -1 for the others: (c, 1)."""
    return 2.0 * (kernels.row_norms(updates) <= norm).double() - 1.0


def _exponent(clip_norm: float) -> int:
    """log2 of a step of the grid."""
    return math.ceil(math.log2(clip_norm)) - _STEPS


def _noisy_grid(exponent: int, deviation: float, draws: np.random.Generator) -> FixedGrid:
    """The grid of steps 2^exponent, with noise of a standard deviation."""

    def noise(count: int) -> Tensor:
        return torch.from_numpy(discrete_gaussian(deviation / 2.0**exponent, count, draws))

    return FixedGrid(exponent, noise)


def _conflict(options: Any, config: Any) -> str | None:
    """What in the configuration would break the promise, or is not defined with it, in one line."""
    if config.mode != "federated":
        return f"privacy.name client protects clients from a federation, and mode {config.mode} has none: take it out"
    if options.sampling == "fixed" and options.accountant == "pld":
        return "privacy.accountant pld has no bound for cohorts of a fixed size: use rdp, or privacy.sampling poisson"
    if options.bands > 1 and options.sampling == "fixed":
        return "privacy.bands needs clients that are drawn on their own: use privacy.sampling poisson"
    if options.bands > 1 and options.adaptive is not None:
        return "privacy.bands is of one clip_norm for all rounds: take it out, or privacy.adaptive"
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
    if config.attack.name != "none":
        return (
            f"attack.name {config.attack.name}: what attackers send depends on other clients, which privacy.name "
            "client does not account for: take one of the two out"
        )
    if config.beside_theta:
        return f"{config.beside_theta[0]} uses more of the clients than the update with its noise: take one of them out"
    if config.personalization.parts:
        return "personalization.parts stay on the clients without noise: take them out, or privacy"
    for one in config.transforms:
        if registry.choice("transforms", one.name).on_server is not Transform.on_server:
            return f"transforms: {one.name} works on the aggregate with what it knows of the clients: not with privacy"
    return None
