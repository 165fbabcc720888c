"""Random draws keyed by what they are for, never by rank, position or call order.

A draw is a pure function of (seed, purpose, keys), so any process can make it alone, in any order, and a resumed
run needs no generator state.
"""

from __future__ import annotations

import math
import zlib
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EVALUATION = 0  # the seed of what is evaluated: runs of every `run.seed` are measured on the same examples
# The constants of SplitMix64 as int64.
_GAMMA, _MIX_1, _MIX_2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """A fresh generator for one purpose: e.g. generator(seed, "cohort", round)."""
    # crc32, not hash(): Python salts hash() per process.
    words = [seed, zlib.crc32(purpose.encode()), *keys]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def torch_seed(seed: int, purpose: str, *keys: int) -> int:
    """A 63-bit seed for a torch.Generator, keyed in the same way."""
    return int(generator(seed, purpose, *keys).integers(0, 2**63 - 1))


def bits(keys: Tensor, counters: Tensor) -> Tensor:
    """64 random bits as int64 for each key and counter, on their device; the two are broadcast.

    Draw n of key k is number n of the SplitMix64 generator that begins at k (Steele, Lea and Flood 2014,
    doi 10.1145/2660193.2660195, with the constants of java.util.SplittableRandom), computed alone. Keys are to be
    random bits themselves: seeds from `torch_seed`, or other draws.
    """
    z = keys + (counters + 1) * _GAMMA  # int64 wraps around, as the generator asks for
    z = (z ^ _shift(z, 30)) * _MIX_1
    z = (z ^ _shift(z, 27)) * _MIX_2
    return z ^ _shift(z, 31)


def normals(key: int, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Standard normal numbers (count,) of a key, the same on every kind of device but for the last places.

    Two of each draw of `bits`, whose halves are the two uniform numbers of Box and Muller (1958,
    doi 10.1214/aoms/1177706645).
    """
    import torch

    draws = bits(torch.full((), key, device=device), torch.arange((count + 1) // 2, device=device))
    # Half a step keeps the logarithm away from 0.
    radius = (-2 * ((_shift(draws, 32).to(dtype) + 0.5) * 2**-32).log()).sqrt()
    angle = (draws & (2**32 - 1)).to(dtype) * (2 * math.pi * 2**-32)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[:count]


def _shift(z: Tensor, count: int) -> Tensor:
    """The bits moved right with zeros from the left; >> alone repeats the sign."""
    return (z >> count) & ((1 << (64 - count)) - 1)
