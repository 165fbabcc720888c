"""What Gaussian noise on sums over random samples of the records adds up to, by the library dp-accounting.

Two ways to draw the records of a sum, each with the relation between neighbouring data sets that its bounds are of:

- Poisson: every record on its own with probability q. Neighbours differ by one record that is there or not
  (add-or-remove-one), which changes the sum by at most C, so noise of standard deviation z C is a Gaussian event of
  noise multiplier z. Mironov, Talwar and Zhang 2019, arXiv 1908.10530 (RDP); Doroshenko et al. 2022, arXiv 2207.04380
  (PLD).
- Fixed: m of n records, without replacement. Both n and m are public, so neighbours differ by one record that is
  replaced (replace-one): one contribution goes and another comes, which changes the sum by at most 2 C, so the same
  noise is an event of noise multiplier z / 2. Wang, Balle and Kasiviswanathan 2019, arXiv 1808.00087, theorem 27 (RDP);
  no PLD is known for it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from importlib.util import find_spec
from typing import Any, Literal

from fedhpc.errors import UserError

Method = Literal["pld", "rdp"]

# Those of dp-accounting from 2 on. For some of its orders below 2 the series does not converge, which it reports; the
# bound for samples without replacement is of whole orders, others lie on a line between two of them and take longer.
_WHOLE = [*range(2, 64), 128, 256, 512, 1024]
_ORDERS = sorted({*(order / 10 for order in range(20, 110)), *_WHOLE})
LEAST_NOISE = 0.05  # as a noise multiplier: with less the privacy losses of a sum are too large to be tabulated
MOST_NOISE = 1e6  # with more of it the noise in a sum of clients might not fit into 62 bits of the grid
_TOLERANCE = 1e-4  # of a noise multiplier that is searched for


@dataclass(frozen=True)
class Poisson:
    """Every record is drawn on its own with probability `rate`."""

    rate: float

    relation = "add-or-remove-one"

    def __str__(self) -> str:
        return f"Poisson sampling with q = {self.rate:.6g}"


@dataclass(frozen=True)
class Fixed:
    """`size` of `population` records are drawn, none twice."""

    size: int
    population: int

    relation = "replace-one"

    def __str__(self) -> str:
        return f"{self.size:,} of {self.population:,} drawn without replacement"


def require_library() -> None:
    """UserError where dp-accounting is not installed."""
    if find_spec("dp_accounting") is None:
        raise UserError(
            "privacy needs the package dp-accounting", key="privacy.name", remedy="pip install 'fedhpc[privacy]'"
        )


@lru_cache(maxsize=1)
def _privacy_loss(rate: float, noise_multiplier: float) -> Any:
    """The privacy loss distribution of one noisy sum over a Poisson sample."""
    from dp_accounting.pld import privacy_loss_distribution

    return privacy_loss_distribution.from_gaussian_mechanism(noise_multiplier, sampling_prob=rate)


@dataclass(frozen=True)
class Accountant:
    """Turns a noise multiplier z and a number of sums into an epsilon, and back.

    z: standard deviation of the noise over C, the largest norm of one record's contribution. Not every method has a
    bound for every way of sampling: pld has none for Fixed.
    """

    method: Method
    delta: float
    sampling: Poisson | Fixed

    def event(self, noise_multiplier: float) -> Any:
        """One noisy sum as dp-accounting has it (a DpEvent)."""
        import dp_accounting as dp

        if isinstance(self.sampling, Poisson):
            return dp.PoissonSampledDpEvent(self.sampling.rate, dp.GaussianDpEvent(noise_multiplier))
        event = dp.GaussianDpEvent(noise_multiplier / 2)
        return dp.SampledWithoutReplacementDpEvent(self.sampling.population, self.sampling.size, event)

    def epsilon(self, noise_multiplier: float, sums: int) -> float:
        """The epsilon of this number of noisy sums at `delta`; 0 of none."""
        if not sums:
            return 0.0
        if self.method == "pld" and isinstance(self.sampling, Poisson):  # as the library's accountant, but made once
            one = _privacy_loss(self.sampling.rate, noise_multiplier)
            return float(one.self_compose(sums).get_epsilon_for_delta(self.delta))
        return float(self._fresh().compose(self.event(noise_multiplier), sums).get_epsilon(self.delta))

    def noise_multiplier(self, epsilon: float, sums: int) -> float:
        """The least z from LEAST_NOISE on, to four digits, with which this number of sums spends at most `epsilon`."""
        import dp_accounting as dp

        def event(noise_multiplier: float) -> Any:
            return dp.SelfComposedDpEvent(self.event(noise_multiplier), sums)

        high, factor = 1.0, 2.0
        if self.method == "pld":  # slower, and a little less than by rdp
            high, factor = replace(self, method="rdp").noise_multiplier(epsilon, sums), 1.15
        while self.epsilon(high, sums) > epsilon:
            high *= factor
            if high > MOST_NOISE:
                raise UserError(
                    f"privacy.epsilon {epsilon} needs noise of more than {MOST_NOISE:,.0f} times clip_norm",
                    key="privacy.epsilon", remedy="raise it",
                )  # fmt: skip
        low = max(high / factor, LEAST_NOISE)
        while self.epsilon(low, sums) <= epsilon:
            if low == LEAST_NOISE:
                return low
            low, high = max(low / factor, LEAST_NOISE), low
        bracket = dp.ExplicitBracketInterval(low, high)
        return float(dp.calibrate_dp_mechanism(self._fresh, event, epsilon, self.delta, bracket, tol=_TOLERANCE))

    def affordable(self, noise_multiplier: float, epsilon: float, most: int) -> int:
        """The largest number of sums, up to `most`, that spend at most `epsilon`."""
        if self.epsilon(noise_multiplier, most) <= epsilon:
            return most
        low, high = 0, most  # low is affordable, high is not
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.epsilon(noise_multiplier, middle) <= epsilon else (low, middle)
        return low

    def _fresh(self) -> Any:
        """An accountant of the library that has seen nothing."""
        from dp_accounting import NeighboringRelation, pld, rdp

        poisson = isinstance(self.sampling, Poisson)
        relation = NeighboringRelation.ADD_OR_REMOVE_ONE if poisson else NeighboringRelation.REPLACE_ONE
        if self.method == "pld":
            return pld.PLDAccountant(relation)
        return rdp.RdpAccountant(_ORDERS if poisson else _WHOLE, relation)
