"""Example-level differential privacy: DP-SGD inside the clients (Abadi et al. 2016, arXiv 1607.00133, algorithm 1).

A client clips the gradient of each of its examples and adds noise to their sum in every local step
(`fedhpc.training.example_privacy`), so what it sends is protected before anybody sees it, and whatever is made of it.

A local step of client i is a noisy sum over a Poisson sample of its n_i examples, each drawn with probability
q_i = min(1, B / n_i). An example belongs to one client, so what the run has spent is what the client has spent that
comes off worst, by the steps that it took. That the server samples clients is not counted as amplification: it knows
who trained.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.participation.sampling import num_rounds
from fedhpc.privacy._accountant import LEAST_NOISE, Accountant, Poisson, require_library
from fedhpc.privacy._accountant import Method as Bound
from fedhpc.privacy._budget import Budget
from fedhpc.privacy.base import Privacy, Releases
from fedhpc.training.example_privacy import ExamplePrivacy
from fedhpc.training.schedule import num_steps, sampling_rate

if TYPE_CHECKING:
    from fedhpc.config import Config
    from fedhpc.methods.base import Method
    from fedhpc.objectives.base import Objective


class _Exposure(NamedTuple):
    """Steps that see an example of a client with probability `rate` each."""

    rate: float  # q
    steps: int


class Example(Privacy):
    """Protects every example: what a client sends tells little of whether a row is among its data."""

    class Options(Budget):
        def conflict(self, config: Any) -> str | None:
            return self.problem or _conflict(config)

    def __init__(self, config: Config, releases: Releases) -> None:
        super().__init__(config, releases)
        require_library()
        population = releases.population
        if population.draw is not None:
            raise UserError(
                f"partition.name {config.partition.name} gives an example to several clients, whose releases of it "
                "would add up", key="partition.name", remedy="choose one that divides the examples",
            )  # fmt: skip
        self._sizes = population.sizes()
        most, delta = int(self._sizes.max(initial=0)), self.options.delta
        if delta * most > 1:
            raise UserError(
                f"privacy.delta {delta} is more than 1 / {most}, one over the examples of the largest client, and "
                "would allow to publish one of them", key="privacy.delta", remedy="lower it",
            )  # fmt: skip
        self._planned_round = cache(releases.trains)
        self._known: dict[tuple[Bound, float, _Exposure], float] = {}

    @cached_property
    def noise_multiplier(self) -> float:
        """z, given or found for the budget and the client whose planned steps need the most."""
        options = self.options
        known = options.noise_multiplier or self.releases.noise_multiplier
        if known is not None:
            return float(known)
        budget = float(options.epsilon)
        exposures = self._exposures(self._planned(num_rounds(self.config, self.releases.population)))
        # Renyi divergences are quick, and no better than what is known of the losses: they tell where to look.
        enough = sorted(
            ((self._accountant("rdp", one.rate).noise_multiplier(budget, one.steps), one) for one in exposures),
            reverse=True,
        )
        noise = LEAST_NOISE
        for by_rdp, one in enough:
            if by_rdp <= noise:
                break
            if options.accountant == "rdp":
                noise = by_rdp
            elif noise == LEAST_NOISE or self._epsilon("pld", noise, one) > budget:
                noise = self._accountant("pld", one.rate).noise_multiplier(budget, one.steps)
        return noise

    # ---- what a round does

    @property
    def of_examples(self) -> ExamplePrivacy:
        return ExamplePrivacy(float(self.options.clip_norm), self.noise_multiplier)

    def check(self, method: Method, objective: Objective) -> None:
        """An example needs a row of parameters and a loss of its own."""
        name = self.config.method.name
        if not method.shares_base or method.finite_difference_step is not None:
            raise UserError(
                f"method.name {name} has no gradient for each example: an example has no weights of its own in it",
                key="privacy.name", remedy="choose lora, prefix, prompt, ia3 or adapter",
            )  # fmt: skip
        if objective.needs_full_steps:
            raise UserError(
                "the loss of an example depends on the others of its batch, so it has no gradient of its own",
                key="privacy.name", remedy="take it out, or choose another objective",
            )  # fmt: skip

    # ---- what the rounds spend

    def initial(self) -> dict[str, Tensor]:
        return {"rounds": torch.zeros(self.releases.population.num_clients, dtype=torch.int64)}

    def account(self, spent: Mapping[str, Tensor], clients: Sequence[int]) -> None:
        np.add.at(spent["rounds"].numpy(), np.array(clients, dtype=np.int64), 1)

    def epsilon(self, spent: Mapping[str, Tensor]) -> float:
        return self._most_spent(spent["rounds"].numpy())

    def affordable(self, rounds: int) -> int:
        options = self.options
        if not options.ends_run:
            return rounds
        low, high = 0, rounds + 1  # low is affordable, high is not
        while high - low > 1:
            middle = (low + high) // 2 if high <= rounds else rounds
            fits = self._most_spent(self._planned(middle)) <= options.epsilon
            low, high = (middle, high) if fits else (low, middle)
        options.require_a_round(low, lambda: self._most_spent(self._planned(1)))
        return low

    def _planned(self, rounds: int) -> np.ndarray:
        """In how many of the first `rounds` rounds each client trains, by the plan: int64 (N,)."""
        times = np.zeros(self.releases.population.num_clients, dtype=np.int64)
        for round_ in range(1, rounds + 1):
            np.add.at(times, np.array(self._planned_round(round_), dtype=np.int64), 1)
        return times

    def _exposures(self, times: np.ndarray) -> list[_Exposure]:
        """What clients were exposed to that trained in `times` rounds (N,), but for what another's exceeds.

        By falling rate, so with more and more steps.
        """
        client, trained = self.config.client, np.flatnonzero(times)
        pairs = np.unique(np.stack([self._sizes[trained], times[trained]], axis=1), axis=0).tolist()
        every = {_Exposure(sampling_rate(n, client), t * num_steps(n, client)) for n, t in pairs}
        left: list[_Exposure] = []
        for one in sorted(every, reverse=True):
            if not left or one.steps > left[-1].steps:
                left.append(one)
        return left

    def _most_spent(self, times: np.ndarray) -> float:
        """The epsilon of the client that comes off worst, where each trained in `times` rounds (N,)."""
        noise, exposures = self.noise_multiplier, self._exposures(times)
        # As above: the bounds by Renyi divergences tell where to look.
        bounds = sorted(((self._epsilon("rdp", noise, one), one) for one in exposures), reverse=True)
        if self.options.accountant == "rdp":
            return bounds[0][0] if bounds else 0.0
        most = 0.0
        for bound, one in bounds:
            if bound <= most:
                break
            most = max(most, self._epsilon("pld", noise, one))
        return most

    def _epsilon(self, method: Bound, noise: float, one: _Exposure) -> float:
        key = (method, noise, one)
        if key not in self._known:
            self._known[key] = self._accountant(method, one.rate).epsilon(noise, one.steps)
        return self._known[key]

    def _accountant(self, method: Bound, rate: float) -> Accountant:
        return Accountant(method, float(self.options.delta), Poisson(rate))

    # ---- what is said of it

    def statement(self, rounds: int) -> str:
        options, asked = self.options, num_rounds(self.config, self.releases.population)
        fewer = f", where the budget of {options.epsilon:g} ends" if rounds < asked else ""
        exposures = self._exposures(self._planned(rounds))
        if not exposures:
            return "privacy: no client trains, so nothing is told of any example"
        least, most = exposures[-1], exposures[0]  # by rate
        shown = f"{most.rate:.4g}" if least == most else f"{least.rate:.4g} to {most.rate:.4g}"
        return (
            f"privacy: every example is protected with epsilon {self._most_spent(self._planned(rounds)):.4g} at delta "
            f"{options.delta:g} ({Poisson.relation}) after {rounds} rounds{fewer}; noise {self.noise_multiplier:.4g} "
            f"times clip_norm {options.clip_norm:g} in every local step (of a client at most {least.steps}), "
            f"Poisson batches with q = {shown}, {options.accountant}"
        )

    def attributes(self, spent: Mapping[str, Tensor]) -> dict[str, str | float]:
        return {
            "epsilon": self.epsilon(spent),
            "delta": float(self.options.delta),
            "noise_multiplier": self.noise_multiplier,
            "neighbouring_relation": Poisson.relation,
            "protects": "example",
        }


def _conflict(config: Any) -> str | None:
    """What in the configuration is not accounted for, or has no examples of its own, in one line."""
    if config.client.packing:
        return "client.packing puts several examples into one row, and privacy.name example needs a row for each"
    if getattr(config.method, "ranks", None) is not None:
        return "method.ranks would not last: noise has the rank of the largest; take it out with privacy.name example"
    if config.beside_theta:
        return f"{config.beside_theta[0]} is not defined with privacy.name example: take one of them out"
    if config.personalization.finetune_steps:
        return (
            "personalization.finetune_steps would train on the same examples without noise: take them out with "
            "privacy.name example"
        )
    return None
