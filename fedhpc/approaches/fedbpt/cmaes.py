"""CMA-ES (Hansen 2016, arXiv 1604.00772) by the package `cma`, as functions of the moments of its distribution.

Everything that one iteration passes on to the next is in `Moments`, a few arrays: they are what is sent, checkpointed
and compared. An iteration builds a `cma.CMAEvolutionStrategy` from them, so that a run that was interrupted after any
iteration goes on with the same bits as one that was not, and as one object that lives from the first to the last.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.lazy import lazy
from fedhpc.rng import generator

cma = lazy("cma", "search")

Float64 = NDArray[np.float64]
Key = tuple[int, ...]  # (seed, numbers that tell the draws apart)


@dataclass(frozen=True)
class Moments:
    """The distribution N(mean, sigma^2 covariance) over R^d that candidates are drawn from, and its evolution paths."""

    mean: Float64  # (d,)
    sigma: Float64  # (): the step size
    covariance: Float64  # (d, d)
    path: Float64  # (d,): p_c, evolution path of the rank-one update
    sigma_path: Float64  # (d,): p_sigma, evolution path of the step size
    iteration: NDArray[np.int64]  # (): iterations done

    def tensors(self) -> dict[str, NDArray[Any]]:
        """The arrays by their names."""
        return {field.name: np.asarray(getattr(self, field.name)) for field in fields(self)}

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, NDArray[Any]]) -> Moments:
        """Make moments of arrays by name: the inverse of `tensors`."""
        return cls(**{field.name: np.array(tensors[field.name]) for field in fields(cls)})


def initial(dimension: int, sigma: float) -> Moments:
    """The distribution before the first iteration: mean 0. UserError where `cma` is not installed."""
    strategy = cma.CMAEvolutionStrategy(np.zeros(dimension), sigma, {**_fixed(), "popsize": 4, "randn": _no_draws})
    return _moments(strategy)


def ask(moments: Moments, popsize: int, sigma_0: float, key: Key) -> Float64:
    """Draw the candidates of the next iteration (popsize, d); the draws depend on `key` alone."""
    samples: Float64 = np.array(strategy_from(moments, popsize, sigma_0, key).ask())
    return samples


def tell(
    moments: Moments,
    losses: Float64,
    sigma_0: float,
    key: Key,
    solutions: Float64 | None = None,
    parents: int | None = None,
) -> Moments:
    """Update the moments with the losses (popsize,) of the candidates that `ask` gave with the same key.

    solutions (popsize, d): points to use in place of those candidates. A point whose Mahalanobis distance from the mean
    is above sqrt(d) + 2 d / (d + 2) counts as that far (Hansen 2011, arXiv 1110.4181). parents: how many of the best
    points make the new mean; by default half of them.
    """
    strategy = strategy_from(moments, len(losses), sigma_0, key, parents)
    drawn = strategy.ask()  # the same samples as before, which the strategy must have drawn itself to recognise them
    # Not before `ask`: with a count above 0 it would read what earlier calls leave in a strategy, and there were none.
    strategy.countiter, strategy.mean_old = int(moments.iteration), strategy.mean
    strategy.tell(drawn if solutions is None else list(solutions.copy()), losses.tolist())
    return _moments(strategy)


def parents_of(popsize: int) -> int:
    """mu: how many of a population make the new mean by default."""
    return int(cma.recombination_weights.RecombinationWeights(popsize).mu)


def _fixed() -> dict[str, Any]:
    """The options of `cma` that all strategies have: no stopping, no output, no global random generator.

    The decomposition of C is never postponed, so that it follows from C alone. The step size follows its evolution path
    at any dimension (`cma` has another rule for large dimensions, which keeps no path).
    """
    return {
        "verbose": -9,
        "seed": float("nan"),
        "updatecovwait": 0,
        "conditioncov_alleviate": False,
        "AdaptSigma": cma.sigma_adaptation.CMAAdaptSigmaCSA,
    }


def _no_draws(*shape: int) -> Float64:
    raise AssertionError("nothing is drawn here")


def strategy_from(moments: Moments, popsize: int, sigma_0: float, key: Key, parents: int | None = None) -> Any:
    """A strategy of the library that goes on from these moments; parents: how many points make the new mean."""
    seed, *numbers = key
    draws = generator(seed, "cma", *numbers)
    options = {**_fixed(), "popsize": popsize, "randn": lambda *shape: draws.standard_normal(shape)}
    if parents is not None:
        options["CMA_mu"] = parents
    strategy = cma.CMAEvolutionStrategy(moments.mean, sigma_0, options)
    strategy.adapt_sigma.initialize(strategy)
    strategy.sigma = float(moments.sigma)
    strategy.sm.C = moments.covariance.copy()
    strategy.pc = moments.path.copy()
    strategy.adapt_sigma.ps = moments.sigma_path.copy()
    diagonal = np.diag(np.diag(moments.covariance))
    if not np.array_equal(moments.covariance, diagonal):  # else cma has its roots without a decomposition
        strategy.sm.update_now(-1)
    strategy._updateBDfromSM(strategy.sm)
    return strategy


def _moments(strategy: Any) -> Moments:
    return Moments(
        mean=np.array(strategy.mean, dtype=np.float64),
        sigma=np.array(strategy.sigma, dtype=np.float64),
        covariance=np.array(strategy.sm.C, dtype=np.float64),
        path=np.array(strategy.pc, dtype=np.float64),
        sigma_path=np.array(strategy.adapt_sigma.ps, dtype=np.float64),
        iteration=np.array(strategy.countiter, dtype=np.int64),
    )
