"""ZFP with a bound on the error (Lindstrom 2014, doi 10.1109/TVCG.2014.2346458), by zfpy: fixed-accuracy mode."""

from __future__ import annotations

import numpy as np

from fedhpc.lazy import lazy
from fedhpc.registry import Open
from fedhpc.updates.transforms._compressor import ErrorBounded, Numbers, Sender

zfpy = lazy("zfpy", extra="compression")


class Zfp(ErrorBounded):
    """Sends an update as one stream of ZFP, whose header has its size and the bound."""

    def __init__(self, options: Open) -> None:
        """UserError where zfpy is not installed."""
        super().__init__(options)
        assert zfpy.compress_numpy

    def encode(self, numbers: Numbers, sender: Sender) -> bytes:
        data: bytes = zfpy.compress_numpy(np.ascontiguousarray(numbers), tolerance=self.largest_error(numbers))
        return data

    def decode(self, data: bytes, sender: Sender) -> Numbers:
        numbers: Numbers = zfpy.decompress_numpy(data)
        return numbers
