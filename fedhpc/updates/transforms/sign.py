"""The signs of an update and a scale for each tensor (Karimireddy et al. 2019, arXiv 1901.09847, section 3).

C(v) = |v|_1 / d * sign(v), for the d numbers of each tensor: one bit a number. signSGD (Bernstein et al. 2018, arXiv
1802.04434) sends the signs alone; without the scale and the feedback it need not converge. One bit has no zero: a
number that is 0 is sent as +|v|_1 / d, which feedback takes back in the next round.
"""

from __future__ import annotations

import numpy as np

from fedhpc.updates.transforms._compressor import Compression, Compressor, Numbers, Sender


class Sign(Compressor):
    """Sends whether each number is negative, and for each tensor the mean of their sizes."""

    class Options(Compression):
        pass

    def encode(self, numbers: Numbers, sender: Sender) -> bytes:
        sizes = sender.sizes[sender.sizes > 0]
        sums = np.add.reduceat(np.abs(numbers.astype(np.float64)), np.cumsum(sizes) - sizes)
        return (sums / sizes).astype(np.float32).tobytes() + np.packbits(numbers < 0).tobytes()

    def decode(self, data: bytes, sender: Sender) -> Numbers:
        sizes = sender.sizes[sender.sizes > 0]
        scales = np.frombuffer(data, np.float32, len(sizes))
        negative = np.unpackbits(np.frombuffer(data, np.uint8, offset=4 * len(sizes)), count=int(sizes.sum()))
        values: Numbers = ((1.0 - 2.0 * negative) * np.repeat(scales, sizes)).astype(sender.dtype)
        return values
