"""Whole numbers of 8 or 4 bits, rounded at random so that their mean is right (QSGD, Alistarh et al. 2017).

arXiv 1610.02132, section 3.1: with s levels a number v becomes scale * sign(v) * l / s or its neighbour l + 1, with
probabilities that make the expectation v. The scale is the largest value of the numbers that share it, with which all
levels are in use, in place of the norm.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fedhpc.updates.transforms._compressor import Compression, Compressor, Numbers, Sender


class Quantize(Compressor):
    """Sends a number of 8 or 4 bits for each number, and a scale for those of a tensor or of a chunk."""

    class Options(Compression):
        bits: Literal[4, 8] = Field(8, description="bits of a number")
        chunk: int | None = Field(None, ge=1, description="numbers that share a scale; default those of a tensor")

    @property
    def levels(self) -> int:
        """s: a code is a whole number from -s to s."""
        return int(2 ** (self.options.bits - 1) - 1)

    def encode(self, numbers: Numbers, sender: Sender) -> bytes:
        sharing = self._sharing(sender)
        values = numbers.astype(np.float64)
        peaks = np.maximum.reduceat(np.abs(values), np.cumsum(sharing) - sharing)
        scales = peaks.astype(np.float32)
        scales = np.where(scales < peaks, np.nextafter(scales, np.float32(np.inf)), scales)
        parts = np.divide(values, np.repeat(scales, sharing), out=np.zeros_like(values), where=values != 0)
        draws = sender.draws("rounding", len(values))
        # A draw just below 1 on top of the highest level would be rounded up to a level more.
        steps = np.minimum(np.floor(np.abs(parts) * self.levels + draws), self.levels)
        codes = (np.sign(parts) * steps).astype(np.int8)
        return scales.astype(np.float32).tobytes() + (codes.tobytes() if self.options.bits == 8 else _halves(codes))

    def decode(self, data: bytes, sender: Sender) -> Numbers:
        sharing = self._sharing(sender)
        count, scales = int(sharing.sum()), np.frombuffer(data, np.float32, len(sharing)).astype(np.float64)
        packed = np.frombuffer(data, np.int8, offset=4 * len(sharing))
        codes = packed if self.options.bits == 8 else _of_halves(packed, count)
        values: Numbers = (codes * np.repeat(scales / self.levels, sharing)).astype(sender.dtype)
        return values

    def _sharing(self, sender: Sender) -> NDArray[np.int64]:
        """How many numbers share each scale, in their order; both ends know it."""
        chunk, count = self.options.chunk, int(sender.sizes.sum())
        if chunk is None:
            return sender.sizes[sender.sizes > 0]
        return np.minimum(chunk, count - np.arange(0, count, chunk))


def _halves(codes: NDArray[np.int8]) -> bytes:
    """Two codes from -7 to 7 in each byte, the first in the higher half."""
    shifted = np.append(codes + 8, [0] * (len(codes) % 2)).astype(np.uint8)
    packed: bytes = (shifted[::2] << 4 | shifted[1::2]).tobytes()
    return packed


def _of_halves(packed: NDArray[np.int8], count: int) -> NDArray[Any]:
    both = packed.view(np.uint8)
    return np.stack([both >> 4, both & 15], axis=1).ravel()[:count].astype(np.int8) - 8
