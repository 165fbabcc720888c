"""What another test of the same size could have shown: 95 % intervals over the drawing of the test's items."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhpc.rng import EVALUATION, generator

RESAMPLES = 1000
_Z = 1.959964  # the 0.975 quantile of the normal distribution


class Interval(NamedTuple):
    """The ends of an interval, NaN where it is not known, and how it was made."""

    low: float = math.nan
    high: float = math.nan
    by: str = ""


def of_mean(values: NDArray[np.float64]) -> Interval:
    """The interval of the mean of one number per item.

    Where all are 0 or 1 it is that of Wilson (1927, equation 4), else the normal one.
    """
    n = len(values)
    if not n:
        return Interval()
    if not np.isin(values, (0.0, 1.0)).all():
        return of_ratio(values, np.ones(n))
    share, weight = float(values.mean()), _Z**2 / n
    middle = (share + weight / 2) / (1 + weight)
    half = _Z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    return Interval(min(middle - half, share), max(middle + half, share), "Wilson")  # exact at 0 and 1


def of_ratio(sums: NDArray[np.float64], counts: NDArray[Any]) -> Interval:
    """The interval of sum(sums) / sum(counts) over items, as a mean per token is: normal, of the linearised ratio.

    Cochran 1977, Sampling Techniques, equation 6.9, for an infinite population. Two items are needed.
    """
    n, total = len(sums), float(np.sum(counts))
    if n < 2 or not total:
        return Interval()
    ratio = float(np.sum(sums)) / total
    residuals = sums - ratio * counts
    half = _Z * math.sqrt(n / (n - 1) * float(np.sum(residuals**2))) / total
    return Interval(ratio - half, ratio + half, "normal")


def by_bootstrap(compute: Callable[[NDArray[np.int64]], float], n: int) -> Interval:
    """The interval of a number that is no mean: the middle 95 % of `compute` over items drawn with replacement.

    compute: of the indices (n,) that were drawn. Efron 1979. The draws are the same in every run.
    """
    draw = generator(EVALUATION, "bootstrap")
    values = [compute(draw.integers(n, size=n)) for _ in range(RESAMPLES)]
    low, high = np.quantile(values, (0.025, 0.975))
    return Interval(float(low), float(high), "bootstrap")
