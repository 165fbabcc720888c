"""FedAvg with longer steps where the clients pull apart (FedExP, Jhunjhunwala et al. 2023, arXiv 2301.09604).

eta_g times the mean of the updates, where the paper (algorithm 1) has for M clients alike

    eta_g = max(1, sum_i |g_i|^2 / (2 M (|mean|^2 + epsilon))).

With weights p_i (server.weighting), 1 in all, the mean is sum_i p_i g_i, and sum_i p_i |g_i|^2 stands for 1/M sum_i
|g_i|^2, as in its authors' code (which has M epsilon for epsilon). server.optimizer steps along the product.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from fedhpc.lazy import Tensor, torch
from fedhpc.registry import Section
from fedhpc.server.aggregators.base import Aggregator

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class FedExP(Aggregator):
    """The weighted mean of the updates, extrapolated where they are much longer than it."""

    class Options(Section):
        epsilon: float = Field(
            1e-3, gt=0, description="added to the squared norm of the mean, so that steps along a short one end"
        )

    updates_only = True

    def combine(self, cohort: Cohort) -> Tensor:
        weights = cohort.shares / cohort.shares.sum()
        norms = cohort.norms().numpy()
        mean = cohort.weighted_sum(weights)
        longer = extrapolation(weights, norms, float(torch.linalg.vector_norm(mean)), self.options.epsilon)
        return mean if longer == 1 else mean * longer  # above rank 0 the mean is zeros that take no memory


def extrapolation(weights: np.ndarray, norms: np.ndarray, norm_of_mean: float, epsilon: float) -> float:
    """eta_g, at least 1. weights (C,): p_i; norms (C,): |g_i|."""
    return max(1.0, math.fsum(weights * norms**2) / (2 * (norm_of_mean**2 + epsilon)))
