"""What transforms share that send an update in fewer bytes.

Each row is really encoded into bytes and decoded from them again: the server goes on with what was decoded, and the
bytes that a round reports are the length of what was encoded. What an update loses is kept by its client and added to
its next one, with `feedback` (Stich, Cordonnier and Jaggi 2018, arXiv 1809.07599, algorithm 1; Karimireddy et al. 2019,
arXiv 1901.09847, algorithm 1).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedhpc.lazy import Tensor, torch
from fedhpc.registry import Open, Section
from fedhpc.updates.transforms.base import Transform, TransformContext

Numbers = NDArray[Any]  # of the dtype of the updates


class Compression(Section):
    """The keys that all compressors have."""

    direction: Literal["up", "down", "both"] = Field(
        "up", description="what is compressed: the clients' updates, the server's model, or both"
    )
    feedback: bool = Field(True, description="whether a client adds what an update lost to its next one")


@dataclass(frozen=True)
class Sender:
    """One row of a block, as those see it who encode it."""

    context: TransformContext
    row: int
    sizes: NDArray[np.int64]  # how many of the numbers are of each tensor of the layout, in order
    dtype: np.dtype[Any]  # of the numbers

    def draws(self, purpose: str, size: int) -> NDArray[np.float64]:
        """Uniform draws from [0, 1) that are this client's in this round."""
        return self.context.generator(purpose, self.context.clients[self.row]).random(size)


class Compressor(Transform):
    """Sends an update in fewer bytes; S is its size."""

    packs = True

    #: What it makes of an update: some of its coordinates, codes for its numbers, or factors of its matrices.
    sends: ClassVar[Literal["coordinates", "codes", "factors"]] = "codes"

    #: The tensors that it keeps beside what was lost.
    remembers: ClassVar[tuple[str, ...]] = ()

    def __init__(self, options: Open) -> None:
        super().__init__(options)
        self.direction = options.direction
        self.keeps = (*self.remembers, "residual") if options.feedback else self.remembers

    def on_client(self, updates: Tensor, context: TransformContext) -> Tensor:
        if not self.options.feedback:
            return self.compress(updates, context)
        wanted = updates + context.tensors["residual"]
        sent = self.compress(wanted, context)
        context.tensors["residual"] = wanted - sent
        return sent

    def compress(self, wanted: Tensor, context: TransformContext) -> Tensor:
        """What arrives of the rows (K, S). One that is not finite stays as it is: its client is rejected."""
        sent = wanted.clone()
        for row, values in enumerate(wanted.numpy()):
            if np.isfinite(values).all():
                sent[row] = torch.from_numpy(self._sent(values, context, row))
        return sent

    def _sent(self, values: Numbers, context: TransformContext, row: int) -> Numbers:
        """What arrives of one row (S,), with its bytes in `context`."""
        chosen = context.coordinates[row]
        bounds = np.concatenate([[0], np.cumsum(context.layout.sizes)])
        sizes = np.diff(bounds if chosen is None else np.searchsorted(chosen, bounds))
        sender = Sender(context, row, sizes, values.dtype)
        coordinate_bytes = context.coordinate_bytes[row]
        data = self.encode(values if chosen is None else values[chosen], sender)
        context.bytes_up[row] = coordinate_bytes + len(data)
        decoded = self.decode(data, sender)
        if chosen is None:
            return decoded
        everywhere = np.zeros_like(values)
        everywhere[chosen] = decoded
        return everywhere

    @abstractmethod
    def encode(self, numbers: Numbers, sender: Sender) -> bytes:
        """The numbers (n,) as bytes."""

    @abstractmethod
    def decode(self, data: bytes, sender: Sender) -> Numbers:
        """The numbers (n,) that the bytes stand for; of the sender it may use what both ends know."""


class ErrorBounded(Compressor):
    """Compresses with a bound on the error of every number."""

    class Options(Compression):
        tolerance: float = Field(
            0.01, ge=1e-6, lt=1, description="largest error of a number, as a share of the update's largest one"
        )

    def largest_error(self, numbers: Numbers) -> float:
        """The error that every number may have; of zeros any."""
        return float(self.options.tolerance) * float(np.abs(numbers).max()) or 1.0


def pack(codes: NDArray[np.uint64], width: int) -> bytes:
    """Whole numbers below 2^width (n,) in n * width bits, the most significant first."""
    shifts = np.arange(width - 1, -1, -1, dtype=np.uint64)
    return np.packbits(((codes[:, None] >> shifts) & np.uint64(1)).astype(np.uint8)).tobytes()


def unpack(data: bytes, width: int, count: int) -> NDArray[np.uint64]:
    """The inverse of `pack` for `count` numbers."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), count=count * width).reshape(count, width)
    return bits @ (np.uint64(1) << np.arange(width - 1, -1, -1, dtype=np.uint64))
