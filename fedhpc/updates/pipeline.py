"""The transforms of a run, one after the other: over the updates of a block, and back over their aggregate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedhpc.lazy import Tensor, torch
from fedhpc.updates.transforms.base import About, Transform


@dataclass(frozen=True)
class Sent:
    """What a block of K clients sends."""

    updates: Tensor  # (K, S)
    tensors: dict[str, Tensor]  # what the clients keep of it: name in their files -> (K, ...)
    bytes_up: np.ndarray  # int64 (K,)


class Pipeline:
    """The transforms of a run in their order. S is the size of an update."""

    def __init__(self, transforms: Sequence[Transform], seed: int, size: int, dtype: torch.dtype) -> None:
        """dtype: of the updates and of what clients keep."""
        self.transforms, self._seed, self._size, self._dtype = list(transforms), seed, size, dtype

    @property
    def keeps(self) -> list[str]:
        """The names, in a client's file, of what it keeps for the transforms from round to round."""
        return list(self._shapes)

    def initial(self, name: str) -> Tensor:
        """The tensor of that name of a client that was never sampled."""
        return torch.zeros(self._shapes[name], dtype=self._dtype)

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {
            _key(position, name): transform.shape(name, self._size)
            for position, transform in enumerate(self.transforms)
            for name in transform.keeps
        }

    def on_clients(
        self,
        updates: Tensor,
        round_: int,
        clients: Sequence[int],
        kept: Mapping[str, Tensor],
        bytes_up: np.ndarray,
    ) -> Sent:
        """Run the client halves over the updates (K, S) of a block.

        kept: name in the clients' files -> (K, ...), with any other names too; bytes_up int64 (K,): of each update as
        it is.
        """
        bytes_up = bytes_up.copy()
        after: dict[str, Tensor] = {}
        for position, transform in enumerate(self.transforms):
            tensors = {name: kept[_key(position, name)] for name in transform.keeps}
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            about = About(round_, clients, tensors, bytes_up, self._seed, position)
            updates = transform.on_client(updates, about)
            bytes_up = about.bytes_up
            _require(transform, updates.shape == (len(clients), self._size), "changed the shape of the updates")
            kept_shapes = {name: tensor.shape for name, tensor in about.kept.items()}
            _require(transform, kept_shapes == shapes, "kept other tensors than it says")
            after |= {_key(position, name): tensor for name, tensor in about.kept.items()}
        return Sent(updates, after, bytes_up)

    def server_tensors(self) -> dict[str, Tensor]:
        """What the server keeps for the transforms before the first round, float64."""
        return {
            _key(position, name): torch.zeros(transform.shape(name, self._size), dtype=torch.float64)
            for position, transform in enumerate(self.transforms)
            for name in transform.keeps_on_server
        }

    def on_server(self, total: Tensor, round_: int, clients: Sequence[int], kept: dict[str, Tensor]) -> Tensor:
        """Run the server halves, in reverse order, over the aggregated update, float64 (S,).

        clients: the accepted ones. kept: `server_tensors`, brought up to date in place.
        """
        for position, transform in reversed(list(enumerate(self.transforms))):
            tensors = {name: kept[_key(position, name)] for name in transform.keeps_on_server}
            about = About(round_, clients, tensors, np.zeros(len(clients), np.int64), self._seed, position)
            total = transform.on_server(total, about)
            kept.update({_key(position, name): tensor for name, tensor in about.kept.items()})
        return total


def _key(position: int, name: str) -> str:
    return f"transforms.{position}.{name}"


def _require(transform: Transform, holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"the transform {type(transform).__name__} {what}")
