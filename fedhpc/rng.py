"""Random draws keyed by what they are for, never by rank, position or call order.

A draw is a pure function of (seed, purpose, keys), so any process can make it alone, in any order, and a resumed
run needs no generator state.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch
    from torch import Tensor

EVALUATION = 0  # the seed of what is evaluated: runs of every `run.seed` are measured on the same examples
# The constants of SplitMix64 as int64.
_GAMMA, _MIX_1, _MIX_2 = (c - 2**64 for c in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))

_MANY = 16  # keys from which on `generators` seeds faster than `generator` one by one
# The constants of numpy's SeedSequence.
_POOL, _SHIFT_BITS, _WORD = 4, np.uint32(16), 2**32 - 1
_INIT_A, _MULT_A, _INIT_B, _MULT_B = 0x43B0D7E5, 0x931E8875, 0x8B51F9DD, 0x58F38DED
_MIX_LEFT, _MIX_RIGHT = np.uint32(0xCA01F9DD), np.uint32(0x4973F715)


def generator(seed: int, purpose: str, *keys: int) -> np.random.Generator:
    """A fresh generator for one purpose: e.g. generator(seed, "cohort", round)."""
    # crc32, not hash(): Python salts hash() per process.
    words = [seed, zlib.crc32(purpose.encode()), *keys]
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(words)))


def generators(seed: int, purpose: str, keys: Sequence[int]) -> Iterator[np.random.Generator]:
    """`generator(seed, purpose, key)` for each of the keys, which are below 2^32, in less time.

    It is the same object that begins anew: done with before the next one is asked for.
    """
    if len(keys) < _MANY:
        yield from (generator(seed, purpose, key) for key in keys)
        return
    words = [seed & _WORD]
    while seed := seed >> 32:
        words.append(seed & _WORD)
    words.append(zlib.crc32(purpose.encode()))
    entropy = [*(np.array([word], np.uint32) for word in words), np.array(keys, np.uint32)]
    philox = np.random.Philox(0)
    draws, state = np.random.Generator(philox), philox.state
    for key in _philox_keys(entropy):
        state["state"]["key"] = key
        philox.state = state
        yield draws


def _philox_keys(entropy: Sequence[np.ndarray]) -> np.ndarray:
    """What Philox takes from the SeedSequence of n lists of words, uint64 (n, 2), for all of them at once.

    entropy: the words in their order, uint32 (n,) or (1,). The hash is that of O'Neill 2015, "Developing a seed_seq
    Alternative", as numpy has it.
    """
    constant = _INIT_A

    def hashed(words: np.ndarray, multiplier: int) -> np.ndarray:
        nonlocal constant
        words = words ^ np.uint32(constant)
        constant = constant * multiplier & _WORD
        words *= np.uint32(constant)
        return words ^ (words >> _SHIFT_BITS)

    def mixed(one: np.ndarray, other: np.ndarray) -> np.ndarray:
        words: np.ndarray = one * _MIX_LEFT - hashed(other, _MULT_A) * _MIX_RIGHT
        return words ^ (words >> _SHIFT_BITS)

    words = [*entropy, *[np.zeros(1, np.uint32)] * (_POOL - len(entropy))]
    pool = [hashed(word, _MULT_A) for word in words[:_POOL]]
    for source in range(_POOL):
        for target in range(_POOL):
            if source != target:
                pool[target] = mixed(pool[target], pool[source])
    for word in words[_POOL:]:
        pool = [mixed(of_pool, word) for of_pool in pool]
    constant = _INIT_B
    first, second, third, fourth = (hashed(of_pool, _MULT_B).astype(np.uint64) for of_pool in pool)
    return np.stack([first | second << np.uint64(32), third | fourth << np.uint64(32)], axis=1)


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
