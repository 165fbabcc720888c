"""Normalised averaging for unequal local work (FedNova, Wang et al. 2020, arXiv 2007.07481, equations 7 and 9).

theta - tau_eff sum_i p_i d_i with d_i = (theta_t - theta_i) / |a_i| and tau_eff = sum_i p_i |a_i|, so that a client
with more steps does not pull harder than its share p_i (`server.weighting`) says. a_i holds the weight of each local
gradient in the client's update: (1, ..., 1) for plain SGD, section 3.1 for momentum and the proximal term. Weight decay
and clipping belong to the gradients. The rule of AdamW is no such sum of gradients, so it is refused.

Linear in the updates: FedAvg with other weights, on the same exact sum.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from fedhpc.registry import Section

LINEAR = True


class Options(Section):
    pass


def weights(shares: np.ndarray, rates: Sequence[Sequence[float]], client: Any) -> np.ndarray:
    """p_i tau_eff / |a_i| of each accepted client (C,).

    shares (C,): p_i but for a common factor; rates: the learning rate of each local step of each client; client: the
    section of the configuration. A client whose rates are all 0 has not moved, and has weight 0.
    """
    known = {tuple(steps): length(steps, client) for steps in rates}
    lengths = np.array([known[tuple(steps)] for steps in rates])
    p = shares / shares.sum()
    tau_eff = math.fsum(p * lengths)
    return np.divide(p * tau_eff, lengths, out=np.zeros_like(p), where=lengths > 0)


def length(rates: Sequence[float], client: Any) -> float:
    """|a_i|, in units of the learning rate: how far the local rule goes under a constant gradient of 1.

    That is the sum of a_i, and its norm as long as no weight is negative (lr * mu at most 1).
    """
    moved = buffer = 0.0
    for lr in rates:
        step = 1.0 - client.proximal * moved
        buffer = client.momentum * buffer + step
        if client.momentum:
            step = step + client.momentum * buffer if client.nesterov else buffer
        moved += lr * step
    return moved
