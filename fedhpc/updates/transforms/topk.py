"""The largest numbers of an update alone (Stich, Cordonnier and Jaggi 2018, arXiv 1809.07599, definition 2.1)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedhpc.updates.transforms._compressor import Compression, Compressor, Numbers, Sender, pack, unpack


class TopK(Compressor):
    """Sends a share of the coordinates, those with the largest numbers, and which ones they are.

    Of equal numbers those in front. Which ones they are takes a bit for each coordinate, or the index of each that is
    sent, whichever is shorter. Transforms behind it see the numbers that are sent alone.
    """

    sends = "coordinates"

    class Options(Compression):
        fraction: float = Field(0.01, gt=0, le=1, description="share of the coordinates that are sent, at least one")

    def encode(self, numbers: Numbers, sender: Sender) -> bytes:
        count, size = self._count(len(numbers)), len(numbers)
        sizes = np.abs(numbers)
        least = np.partition(sizes, size - count)[size - count]
        is_sent = sizes > least
        is_sent[np.flatnonzero(sizes == least)[: count - int(is_sent.sum())]] = True
        chosen = np.flatnonzero(is_sent)
        if _as_bits(count, size):
            where = np.packbits(is_sent).tobytes()
        else:
            where = pack(chosen.astype(np.uint64), _width(size))
        sender.context.coordinates[sender.row] = chosen
        sender.context.coordinate_bytes[sender.row] = len(where)
        return where + numbers[chosen].tobytes()

    def decode(self, data: bytes, sender: Sender) -> Numbers:
        size = int(sender.sizes.sum())
        count = self._count(size)
        values = np.frombuffer(data, sender.dtype, offset=len(data) - count * sender.dtype.itemsize)
        where = data[: len(data) - values.nbytes]
        chosen: NDArray[np.int64]
        if _as_bits(count, size):
            chosen = np.flatnonzero(np.unpackbits(np.frombuffer(where, np.uint8), count=size))
        else:
            chosen = unpack(where, _width(size), count).astype(np.int64)
        everywhere = np.zeros(size, sender.dtype)
        everywhere[chosen] = values
        return everywhere

    def _count(self, size: int) -> int:
        return max(1, round(self.options.fraction * size))


def _width(size: int) -> int:
    """Bits of an index below `size`."""
    return max(1, (size - 1).bit_length())


def _as_bits(count: int, size: int) -> bool:
    """Whether a bit for each coordinate is shorter than the indices of those that are sent."""
    return size <= count * _width(size)
