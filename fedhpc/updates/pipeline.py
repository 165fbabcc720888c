"""Runs the transforms one after the other: over the updates of a block, and in reverse over their aggregate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fedhpc.lazy import Tensor, torch
from fedhpc.updates.layout import Layout
from fedhpc.updates.transforms.base import Transform, TransformContext


@dataclass(frozen=True)
class Sent:
    """The updates of a block of K clients after the transforms."""

    updates: Tensor  # (K, S)
    tensors: dict[str, Tensor]  # what stays on the clients: name in their files -> (K, ...)
    bytes_up: np.ndarray  # int64 (K,)


class Pipeline:
    """The transforms of a run, in their order. S is the size of an update."""

    def __init__(self, transforms: Sequence[Transform], seed: int, layout: Layout, dtype: torch.dtype) -> None:
        """layout: of an update. dtype: of the updates and of what clients keep."""
        self.transforms, self._seed, self._layout, self._dtype = list(transforms), seed, layout, dtype

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
            _key(position, name): transform.shape(name, self._layout)
            for position, transform in enumerate(self.transforms)
            for name in transform.keeps
        }

    def on_clients(
        self,
        updates: Tensor,
        round_: int,
        clients: Sequence[int],
        client_tensors: Mapping[str, Tensor],
        bytes_up: np.ndarray,
    ) -> Sent:
        """Run the client halves over the updates (K, S) of a block.

        client_tensors: name in the clients' files -> (K, ...), with any other names too. bytes_up: int64 (K,), how many
        bytes each update has before the transforms.
        """
        bytes_up = bytes_up.copy()
        after: dict[str, Tensor] = {}
        coordinates: list[np.ndarray | None] = [None] * len(clients)
        coordinate_bytes = np.zeros(len(clients), np.int64)
        for position, transform in enumerate(self.transforms):
            tensors = {name: client_tensors[_key(position, name)] for name in transform.keeps}
            shapes = {name: tensor.shape for name, tensor in tensors.items()}
            context = TransformContext(
                round_, clients, tensors, bytes_up, self._layout, self._seed, position,
                coordinates=coordinates, coordinate_bytes=coordinate_bytes,
            )  # fmt: skip
            updates = transform.on_client(updates, context)
            bytes_up = context.bytes_up
            shape = getattr(updates, "shape", None)
            _require(transform, shape == (len(clients), self._layout.size), "changed the shape of the updates")
            new_shapes = {name: tensor.shape for name, tensor in context.tensors.items()}
            _require(transform, new_shapes == shapes, "kept other tensors than it says")
            after |= {_key(position, name): tensor for name, tensor in context.tensors.items()}
        return Sent(updates, after, bytes_up)

    def server_tensors(self) -> dict[str, Tensor]:
        """What the server keeps for the transforms before the first round, float64."""
        return {
            _key(position, name): torch.zeros(transform.shape(name, self._layout), dtype=torch.float64)
            for position, transform in enumerate(self.transforms)
            for name in transform.keeps_on_server
        }

    def on_server(
        self, total: Tensor, round_: int, clients: Sequence[int], tensors_of_server: dict[str, Tensor]
    ) -> Tensor:
        """Run the server halves, in reverse order, over the aggregated update, float64 (S,).

        clients: the accepted ones. tensors_of_server: those of `server_tensors`, updated in place.
        """
        for position, transform in reversed(list(enumerate(self.transforms))):
            tensors = {name: tensors_of_server[_key(position, name)] for name in transform.keeps_on_server}
            no_bytes = np.zeros(len(clients), np.int64)
            context = TransformContext(round_, clients, tensors, no_bytes, self._layout, self._seed, position)
            total = transform.on_server(total, context)
            shape = getattr(total, "shape", None)
            _require(transform, shape == (self._layout.size,), "changed the shape of the aggregate")
            tensors_of_server.update({_key(position, name): tensor for name, tensor in context.tensors.items()})
        return total


def _key(position: int, name: str) -> str:
    return f"transforms.{position}.{name}"


def _require(transform: Transform, holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(f"the transform {type(transform).__name__} {what}")
