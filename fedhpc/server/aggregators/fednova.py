"""Normalised averaging for unequal local work (FedNova, Wang et al. 2020, arXiv 2007.07481, equations 7 and 9).

theta - tau_eff sum_i p_i d_i with d_i = (theta_t - theta_i) / |a_i| and tau_eff = sum_i p_i |a_i|, so that a client
with more steps does not pull harder than its share p_i (`server.weighting`) says. a_i holds the weight of each local
gradient in the client's update: (1, ..., 1) for plain SGD, section 3.1 for momentum and the proximal term. Weight decay
and clipping belong to the gradients. The update of AdamW is no such sum of gradients, so it is refused.

Linear in the updates: FedAvg with other weights, on the same exact sum.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from fedhpc.lazy import Tensor
from fedhpc.server.aggregators.base import Aggregator

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


class FedNova(Aggregator):
    """The mean of the updates per unit of local work, times the mean work."""

    needs_movements = True
    sums_only = True

    def combine(self, cohort: Cohort) -> Tensor:
        return cohort.weighted_sum(weights(cohort.shares, cohort.movements))


def weights(shares: np.ndarray, movements: np.ndarray) -> np.ndarray:
    """p_i tau_eff / |a_i| of each client, float64 (C,).

    shares (C,): p_i but for a common factor; movements (C,): |a_i|. A client that has not moved, for its learning rates
    are all 0, has weight 0.
    """
    p = shares / shares.sum()
    tau_eff = math.fsum(p * movements)
    return np.divide(p * tau_eff, movements, out=np.zeros_like(p), where=movements > 0)
