"""SCAFFOLD: local gradients corrected for the drift of the clients (Karimireddy et al. 2020, arXiv 1910.06378).

Algorithm 1 with option II. Every client keeps a control variate c_i, the server their mean c over the population:

    local step      y <- y - lr (g_i(y) - c_i + c)
    client          c_i+ = c_i - c + (theta_t - theta_i) / (K lr)
    server          c <- c + 1/N sum over the clients of the round of (c_i+ - c_i)

A client that was never sampled has c_i = 0. Where the learning rate changes, K lr is the sum of the rates that were
used. Both ways a client exchanges twice the payload.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def change(control: Tensor, updates: Tensor, distance: Tensor) -> Tensor:
    """c_i+ - c_i of K clients (K, P).

    control (P,): c; updates (K, P): theta_t - theta_i; distance (K,): sum of the learning rates of a client's steps. A
    client whose rates are all 0 has not moved and learnt nothing: no change.
    """
    moved = distance.unsqueeze(1)
    return (updates / moved - control).where(moved > 0, 0.0)
