"""Draws from the discrete Gaussian distribution, exactly and many at a time.

Canonne, Kamath and Steinke 2020 (arXiv 2004.00010), algorithms 1 to 3, whose Bernoulli draws are made of 53 random bits
here. The probability of an integer x is proportional to exp(-x^2 / (2 sigma^2)).
"""

from __future__ import annotations

import numpy as np

_AT_ONCE = 2**18  # draws before rejections, at most: bounds the memory


def discrete_gaussian(sigma: float, count: int, generator: np.random.Generator) -> np.ndarray:
    """`count` draws, int64 (count,). What comes next from the generator does not overlap with them."""
    parts, drawn = [np.empty(0, dtype=np.int64)], 0
    while drawn < count:
        tries = min(_AT_ONCE, 2 * (count - drawn) + 64)  # nearly half of them are accepted
        part = _accepted(sigma, tries, generator)[: count - drawn]
        parts.append(part)
        drawn += len(part)
    return np.concatenate(parts)


def _accepted(sigma: float, tries: int, generator: np.random.Generator) -> np.ndarray:
    """Draws of the discrete Laplace distribution of scale t, of which those are left that make a Gaussian."""
    t = int(np.floor(sigma)) + 1
    laplace = _discrete_laplace(t, tries, generator)
    gap = np.abs(laplace) - sigma**2 / t
    return laplace[generator.random(len(laplace)) < np.exp(-(gap**2) / (2 * sigma**2))]


def _discrete_laplace(t: int, tries: int, generator: np.random.Generator) -> np.ndarray:
    """Integers x with probability proportional to exp(-|x| / t): their remainder by t, their multiple of t, a sign."""
    remainder = generator.integers(0, t, tries)
    remainder = remainder[generator.random(tries) < np.exp(-remainder / t)]
    multiple = generator.geometric(1 - np.exp(-1), len(remainder)) - 1
    magnitude = remainder + t * multiple
    negative = generator.integers(0, 2, len(magnitude)).astype(bool)
    once = ~negative | (magnitude > 0)  # else 0 would come twice as often
    return np.where(negative[once], -magnitude[once], magnitude[once])
