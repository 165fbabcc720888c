"""Random draws keyed by what they are for, never by rank, position or call order.

A draw is a pure function of (seed, purpose, keys), so any process can make it alone, in any order, and a resumed
run needs no generator state.
"""

from __future__ import annotations

import zlib

import numpy as np

EVALUATION = 0  # the seed of what is evaluated: runs of every `run.seed` are measured on the same examples


def generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """A fresh generator for one purpose: e.g. generator(seed, "cohort", round)."""
    # crc32, not hash(): Python salts hash() per process.
    words = [seed, zlib.crc32(purpose.encode()), *keys]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def torch_seed(seed: int, purpose: str, *keys: int) -> int:
    """A 63-bit seed for a torch.Generator, keyed in the same way."""
    return int(generator(seed, purpose, *keys).integers(0, 2**63 - 1))
