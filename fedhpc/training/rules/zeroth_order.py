"""Gradients from losses alone: the central difference along one coordinate, without a backward pass.

The two-point estimate of MeZO (Malladi et al. 2023, arXiv 2305.17333, definition 1) where the direction is one
coordinate j of the trainable, drawn for the step:

    dL/dtheta_j = (L(theta + h e_j) - L(theta - h e_j)) / (2 h).

It takes the place of backpropagation for a method with a `finite_difference_step` h (fedkseed).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from fedhpc.lazy import Tensor, torch
from fedhpc.rng import generator


def coordinates(seed: int, round_: int, step: int, clients: Sequence[int], size: int) -> np.ndarray:
    """The coordinate (below `size`) along which each client differentiates in a step: int64 (k,)."""
    return np.array([generator(seed, "direction", round_, client, step).integers(size) for client in clients])


def central_difference(
    losses: Callable[[Tensor], Tensor],
    parameters: Tensor,
    gradient: Tensor,
    along: Tensor,
    distance: float,
    divisors: Tensor,
) -> Tensor:
    """Write the derivative along one coordinate of each client into `gradient` (k, T), which is zero.

    losses: of parameters like `parameters` (k, T), summed over each client's tokens, float64 (k,); along: int64 (k,),
    the coordinates; distance: h; divisors (k,): tokens of each client. Returns the mean of the two losses (k,).
    """
    column = along.unsqueeze(1)
    offset = torch.zeros_like(gradient).scatter_(1, column, distance)
    with torch.no_grad():
        above = losses(parameters + offset)
        below = losses(parameters - offset)
    slope = (above - below) / divisors / (2 * distance)
    gradient.scatter_(1, column, slope.to(gradient.dtype).unsqueeze(1))
    return (above + below) / 2
