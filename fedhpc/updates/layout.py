"""The payload: named tensors in a fixed order as one flat vector, and sums of it that do not depend on order.

Floating-point sums depend on who adds first, so a federation on 3 workers would end with other bits than one on 2.
Here every weighted update is turned into 64-bit integers on a grid that all ranks agree on (one exponent per
tensor), the integers are added, which is exact in any order, and the sum is turned back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from fedhpc.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

_ZERO = -(2**20)  # the exponent of a tensor of zeros: below that of every float


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors of a flat vector, in order."""

    shapes: dict[str, tuple[int, ...]]

    @property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes.values()]

    @property
    def size(self) -> int:
        """P, the length of the flat vector."""
        return sum(self.sizes)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """flat (..., P) -> views into it, name -> (..., *shape)."""
        parts = flat.split(self.sizes, dim=-1)
        return {
            name: part.unflatten(-1, shape) if shape else part.squeeze(-1)
            for (name, shape), part in zip(self.shapes.items(), parts, strict=True)
        }

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """name -> (..., *shape) to (..., P)."""
        flats = []
        for name, shape in self.shapes.items():
            tensor = tensors[name]
            lead = tensor.shape[: tensor.ndim - len(shape)]
            flats.append(tensor.reshape(*lead, -1))
        return torch.cat(flats, dim=-1)


@dataclass(frozen=True)
class Split:
    """A payload in two: what is exchanged, and what stays on each client (partial personalisation).

    FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): the server averages the shared part alone, and a client trains
    both parts together, from the shared part it was sent and its own of last time ("simultaneous" in Pillutla et al.
    2022, arXiv 2204.03809).
    """

    whole: Layout
    personal: Layout  # of some of its tensors; empty where all of them are exchanged

    @cached_property
    def shared(self) -> Layout:
        return Layout({n: shape for n, shape in self.whole.shapes.items() if n not in self.personal.shapes})

    def apart(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """(..., P) as the shared part (..., S) and the personal one (..., P - S)."""
        if not self.personal.shapes:
            return flat, flat[..., :0]
        tensors = self.whole.views(flat)
        return self.shared.flatten(tensors), self.personal.flatten(tensors)

    def join(self, shared: Tensor, personal: Tensor) -> Tensor:
        """The inverse of `apart`; leading axes of length 1 are repeated."""
        if not self.personal.shapes:
            return shared
        lead = torch.broadcast_shapes(shared.shape[:-1], personal.shape[:-1])
        parts = (self.shared.views(shared.expand(*lead, -1)), self.personal.views(personal.expand(*lead, -1)))
        return self.whole.flatten({**parts[0], **parts[1]})


def exponents(updates: Tensor, weights: Tensor, layout: Layout) -> Tensor:
    """The smallest e per tensor with |w_i g_i| < 2^e for all clients: int64 (number of tensors,).

    updates (C, P), weights (C,) float64 >= 0; C may be 0.
    """
    found = torch.full((len(layout.shapes),), _ZERO, dtype=torch.int64)
    if updates.shape[0] == 0:
        return found
    for i, part in enumerate(updates.split(layout.sizes, dim=-1)):
        if part.numel() == 0:
            continue
        peaks = part.abs().amax(dim=-1).to("cpu", torch.float64) * weights
        peak = float(peaks.max())
        if peak > 0:
            # One more than frexp gives: w*g is rounded once more before it meets the grid.
            found[i] = math.frexp(peak)[1] + 1
    return found


def grid(exponent: Tensor, num_clients: int, layout: Layout) -> Tensor:
    """The exponent of one step of the grid for every coordinate: int64 (P,).

    Each term is below 2^e, so num_clients of them stay below 2^62 steps: overflow cannot happen.
    """
    headroom = max(0, num_clients - 1).bit_length()
    steps = exponent - 62 + headroom
    return torch.repeat_interleave(steps, torch.tensor(layout.sizes))


def to_grid(update: Tensor, weight: float | Tensor, steps: Tensor) -> Tensor:
    """round(w g / 2^step) as int64. update (P,) or (C, P) with weight (C, 1) float64; steps int64 (P,)."""
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
