"""Noise that is correlated over rounds, so that less of it adds up: banded matrix factorization.

Choquette-Choo et al. 2023 (arXiv 2306.08153, algorithm 1 and theorem 4): the matrix of prefix sums is written as B C,
and the parameters have B z in them, which is less than the prefix sums of z. DP-FTRL (Kairouz et al. 2021, arXiv
2103.00039) does so with a tree for C.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from fedhpc.lazy import Tensor, torch


def square_root_of_sums(bands: int) -> np.ndarray:
    """The first column of C, float64 (bands,), of norm 1.

    The square root of the matrix of prefix sums has binomial(2k, k) / 4^k on its k-th diagonal (Fichtenberger,
    Henzinger and Upadhyay 2023, arXiv 2202.11205); C has the first ones (Kalinin and Lampert 2024, arXiv 2405.13763).
    """
    column = np.array([math.comb(2 * k, k) / 4.0**k for k in range(bands)])
    return column / np.linalg.norm(column)


class BandedNoise:
    """The noise C^-1 z of a round: w_t = (z_t - sum_k c_k w_t-k) / c_0, from independent z and the rounds before.

    What the rounds release is made of C G + z, where G are their sums. C is lower triangular with `bands` diagonals and
    columns of norm at most 1, and a client is in rounds at least `bands` apart, whose columns do not overlap: so it
    changes C G by as much as one sum each.
    """

    def __init__(self, independent: Callable[[int], Tensor], bands: int, past: Tensor | None) -> None:
        """independent: the z of the next coordinates. past: float64 (bands - 1, S), the newest first, in steps of the
        grid; None where no noise is asked for.
        """
        self._independent, self._column = independent, square_root_of_sums(bands).tolist()
        self._past, self._parts, self._drawn = past, list[Tensor](), 0

    def __call__(self, count: int) -> Tensor:
        """Draw the noise of the next coordinates, as integers."""
        assert self._past is not None
        noise, part = self._independent(count).double(), slice(self._drawn, self._drawn + count)
        for weight, before in zip(self._column[1:], self._past, strict=True):
            noise -= weight * before[part]
        noise /= self._column[0]
        self._parts.append(noise)
        self._drawn += count
        return noise.round().to(torch.int64)

    def latest(self) -> Tensor:
        """`past` of the next round."""
        assert self._past is not None
        return torch.cat([torch.cat(self._parts).unsqueeze(0), self._past[:-1]])
