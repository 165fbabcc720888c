"""The payload: named tensors in a fixed order as one flat vector, and which of them stay on the clients."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fedhpc.lazy import Tensor, torch


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the tensors of a flat vector, in order."""

    shapes: dict[str, tuple[int, ...]]

    @cached_property
    def sizes(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes.values()]

    @cached_property
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

    def of_blocks(self, values: Mapping[str, Tensor]) -> Tensor:
        """name -> (..., n), a number for each of the n blocks into which the last axis falls, to (..., P)."""
        flats = []
        for name, shape in self.shapes.items():
            last = math.prod(shape[-1:])
            row = values[name].repeat_interleave(last // values[name].shape[-1], dim=-1)  # (..., last)
            flats.append(row.unsqueeze(-2).expand(*row.shape[:-1], math.prod(shape[:-1]), last).flatten(-2))
        return torch.cat(flats, dim=-1)

    def block_means(self, flat: Tensor, blocks: Mapping[str, int]) -> dict[str, Tensor]:
        """flat (..., P) to the mean of each of the n = blocks[name] blocks of a last axis, name -> (..., n)."""
        means = {}
        for name, view in self.views(flat).items():
            each = math.prod(self.shapes[name][-1:]) // blocks[name]
            means[name] = view.reshape(*flat.shape[:-1], -1, blocks[name], each).mean((-3, -1))
        return means


@dataclass(frozen=True)
class Split:
    """A payload in two: what is exchanged, and what stays on each client (partial personalisation).

    FedPer (Arivazhagan et al. 2019, arXiv 1912.00818): the server averages the shared part alone, and a client trains
    both parts together, from the shared part it was sent and its own of last time ("simultaneous" in Pillutla et al.
    2022, arXiv 2204.03809).
    """

    payload: Layout
    personal: Layout  # of some of its tensors; empty where all of them are exchanged

    @cached_property
    def shared(self) -> Layout:
        return Layout({n: shape for n, shape in self.payload.shapes.items() if n not in self.personal.shapes})

    def apart(self, flat: Tensor) -> tuple[Tensor, Tensor]:
        """(..., P) as the shared part (..., S) and the personal one (..., P - S)."""
        if not self.personal.shapes:
            return flat, flat[..., :0]
        tensors = self.payload.views(flat)
        return self.shared.flatten(tensors), self.personal.flatten(tensors)

    def join(self, shared: Tensor, personal: Tensor) -> Tensor:
        """The inverse of `apart`; leading axes of length 1 are repeated."""
        if not self.personal.shapes:
            return shared
        lead = torch.broadcast_shapes(shared.shape[:-1], personal.shape[:-1])
        parts = (self.shared.views(shared.expand(*lead, -1)), self.personal.views(personal.expand(*lead, -1)))
        return self.payload.flatten({**parts[0], **parts[1]})
