"""The interface of transforms, which change the updates on their way from the clients to the server. For example:

class Quantize(Transform):
    keeps = ("residual",)  # error feedback: what rounding lost goes into the client's next update

    def on_client(self, updates, context):
        wanted = updates + context.tensors["residual"]
        sent = torch.stack([rounded(row, context.generator("rounding", client))
                            for row, client in zip(wanted, context.clients)])
        context.tensors["residual"] = wanted - sent
        context.bytes_up[:] = updates.shape[1] + 4
        return sent
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from fedhpc import rng
from fedhpc.lazy import Tensor
from fedhpc.registry import Open, Section
from fedhpc.updates.layout import Layout


@dataclass
class TransformContext:
    """What a transform knows of the round, and where it writes the tensors it keeps and the bytes it sends."""

    #: Number of the round, from 1.
    round: int

    #: The client of each row of the updates (K); on the server, the accepted clients of the cohort.
    clients: Sequence[int]

    #: The tensors that it keeps from round to round, by the names of `keeps`: (K, *shape), a row for each client; on
    #: the server by those of `keeps_on_server`: (*shape). They are zeros at first. What the transform puts here is here
    #: again the next time; for a client whose update is rejected, nothing changes.
    tensors: dict[str, Tensor]

    #: int64 (K,): how many bytes each client's update takes on the wire; a transform that packs the update in another
    #: way writes here how many bytes that takes.
    bytes_up: np.ndarray

    #: Names and shapes of the tensors of an update, S numbers in all.
    layout: Layout

    seed: int
    position: int  # of the transform in the list `transforms`

    #: The coordinates that each client sends where an earlier transform has chosen some, int64 ascending; None: all.
    coordinates: list[np.ndarray | None] = field(default_factory=list)

    #: int64 (K,): how many of `bytes_up` say which coordinates these are.
    coordinate_bytes: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))

    def generator(self, purpose: str, client: int | None = None) -> np.random.Generator:
        """A generator of random draws, the same on any number of ranks and after a resume.

        The draws follow from run.seed, this transform, the purpose, the round and, if it is given, the client.
        """
        keys = (self.round,) if client is None else (self.round, client)
        return rng.generator(self.seed, f"transforms.{self.position}.{purpose}", *keys)


class Transform:
    """Changes updates on a client before they are sent, and their aggregate on the server (transforms).

    The client halves run in the order of the list, the server halves in reverse.
    """

    #: The keys beside `name`.
    Options: ClassVar[type[Section]] = Section

    #: Whether it packs an update in another number of bytes, which masked integers (section `secure`) cannot be.
    packs: ClassVar[bool] = False

    #: Which way it works: on the clients' updates (up), on the server's model (down), or on both.
    direction: str = "up"

    #: Names of the tensors that each client keeps from round to round, see `shape`.
    keeps: tuple[str, ...] = ()

    #: Names of the tensors that the server keeps from round to round; they are in the checkpoint.
    keeps_on_server: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Open) -> None:
        """options: its item of the list `transforms` in the configuration."""
        self.options = options

    def shape(self, name: str, layout: Layout) -> tuple[int, ...]:
        """Shape of the tensor that is kept under `name`, by default that of an update: (S,)."""
        return (layout.size,)

    def on_client(self, updates: Tensor, context: TransformContext) -> Tensor:
        """Change the updates of K clients (K, S), a row each, into what arrives at the server, of the same shape.

        A row must not depend on the other rows: how many clients are in a block depends on the machine.
        """
        return updates

    def on_server(self, total: Tensor, context: TransformContext) -> Tensor:
        """Change the aggregated update, float64 (S,), before the server optimizer takes its step. On rank 0 alone."""
        return total
