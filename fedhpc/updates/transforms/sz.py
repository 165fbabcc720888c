"""SZ3 with a bound on the error (Liang et al. 2023, doi 10.1109/TBDATA.2022.3201176), by pysz: absolute bound."""

from __future__ import annotations

import numpy as np

from fedhpc.lazy import lazy
from fedhpc.registry import Open
from fedhpc.updates.transforms._compressor import ErrorBounded, Numbers, Sender

pysz = lazy("pysz", extra="compression")


class Sz(ErrorBounded):
    """Sends an update as one stream of SZ3."""

    def __init__(self, options: Open) -> None:
        """UserError where pysz is not installed."""
        super().__init__(options)
        assert pysz.sz

    def encode(self, numbers: Numbers, sender: Sender) -> bytes:
        config = pysz.szConfig()
        config.errorBoundMode, config.absErrorBound = pysz.szErrorBoundMode.ABS, self.largest_error(numbers)
        data: bytes = pysz.sz.compress(np.ascontiguousarray(numbers), config)[0].tobytes()
        return data

    def decode(self, data: bytes, sender: Sender) -> Numbers:
        shape = (int(sender.sizes.sum()),)
        numbers: Numbers = pysz.sz.decompress(np.frombuffer(data, np.uint8), sender.dtype, shape)[0]
        return numbers
