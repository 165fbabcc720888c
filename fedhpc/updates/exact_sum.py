"""Weighted sums as sums of integers, so that their bits do not depend on the order or on who adds.

Floating-point sums depend on who adds first, so a federation on 3 workers would end with other bits than one on 2.
Here every weighted update is turned into 64-bit integers on a grid that all ranks agree on (one exponent per
tensor), the integers are added, which is exact in any order, and the sum is turned back:

    highest = largest_exponents(updates, weights, layout)     of this rank's clients; the maximum over all ranks counts
    steps = grid_exponents(highest, num_clients, layout)      the same on every rank
    total = sum of to_grid(update, weight, steps)             integers, added over clients and ranks
    from_grid(total, steps)                                   sum_i w_i g_i
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from fedhpc.lazy import Tensor, torch
from fedhpc.updates.layout import Layout

_NORMAL = 900  # exponents of steps up to which a weight has room for one
_ZERO = -(2**20)  # the exponent of a tensor of zeros: below that of every float


class FixedGrid(NamedTuple):
    """A grid that does not depend on the updates, and the noise that goes into the sum on it."""

    exponent: int  # of its step, a power of two; no coordinate is beyond 2^31 steps
    noise: Callable[[int], Tensor]  # of a number of next coordinates: int64


def largest_exponents(updates: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """The smallest e per tensor with |w_i g_i| < 2^e for all clients: int64 (number of tensors,).

    updates (C, P), weights (C,) float64; C may be 0.
    """
    highest = torch.full((len(layout.shapes),), _ZERO, dtype=torch.int64)
    if updates.shape[0] == 0:
        return highest
    for i, part in enumerate(updates.split(layout.sizes, dim=-1)):
        if part.numel() == 0:
            continue
        low, high = part.amin(dim=-1), part.amax(dim=-1)  # aminmax takes four times as long
        peaks = torch.maximum(-low, high).to("cpu", torch.float64) * weights.abs()
        peak = float(peaks.max())
        if peak > 0:
            # One more than frexp gives: w*g is rounded once more before it meets the grid.
            highest[i] = math.frexp(peak)[1] + 1
    return highest


def grid_exponents(exponent: Tensor, num_clients: int, layout: Layout) -> Tensor:
    """The exponent of one step of the grid for every coordinate: int64 (P,).

    Each term is below 2^e, so num_clients of them stay below 2^62 steps: overflow cannot happen.
    """
    headroom = max(0, num_clients - 1).bit_length()
    steps = exponent - 62 + headroom
    return torch.repeat_interleave(steps, torch.tensor(layout.sizes))


def to_grid(update: Tensor, weight: float | Tensor, steps: Tensor) -> Tensor:
    """round(w g / 2^step) as int64. update (P,) or (C, P) with weight (C, 1) float64; steps int64 (P,)."""
    step = int(steps[0]) if len(steps) else 0
    if abs(step) < _NORMAL and bool((steps == step).all()):
        # A power of two in the weight changes no bit: what gets subnormal without it is far below half a step.
        return (update.to("cpu", torch.float64) * (weight * math.ldexp(1.0, -step))).round_().to(torch.int64)
    value = update.to("cpu", torch.float64) * weight
    return _times_power(value, -steps).round_().to(torch.int64)


def from_grid(total: Tensor, steps: Tensor) -> Tensor:
    """The inverse of `to_grid` for a sum: float64 (P,)."""
    return _times_power(total.to(torch.float64), steps)


def _times_power(value: Tensor, exponent: Tensor) -> Tensor:
    """value (..., P) float64 times 2^exponent, int64 (P,), in place; as ldexp, which takes five times as long.

    In two halves, since 2^exponent alone may exceed the range of a float64. Only for zeros do they do so too.
    """
    half = exponent >> 1
    for part in (half, exponent - half):
        value.mul_(((part.clamp(-1022, 1023) + 1023) << 52).view(torch.float64))  # the bits of 2^part
    return value
