"""A secret in n shares of which any t recover it, and fewer say nothing (Shamir 1979, doi 10.1145/359168.359176).

The secret is the value at 0 of a random polynomial of degree t - 1 over the integers modulo a prime; a share is its
value at x = 1, 2, ... A secret has 32 bytes. The prime is the smallest above 2^256, so a share has 33.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

PRIME = 2**256 + 297
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, coefficients: Sequence[int], xs: Sequence[int]) -> list[bytes]:
    """The shares of a secret at the points xs.

    coefficients: t - 1 random numbers below PRIME, those of x, x^2, ...
    """
    polynomial = [*reversed(coefficients), int.from_bytes(secret, "big")]
    shares = []
    for x in xs:
        value = 0
        for coefficient in polynomial:  # Horner's rule
            value = (value * x + coefficient) % PRIME
        shares.append(value.to_bytes(SHARE_BYTES, "big"))
    return shares


@lru_cache(maxsize=16)  # the secrets of a cohort are recovered of the same clients' shares
def weights(xs: tuple[int, ...]) -> list[int]:
    """What each share counts for in the secret, by Lagrange's formula at 0: prod over j != i of x_j / (x_j - x_i)."""
    counts = []
    for x in xs:
        above = below = 1
        for other in xs:
            if other != x:
                above = above * other % PRIME
                below = below * (other - x) % PRIME
        counts.append(above * pow(below, -1, PRIME) % PRIME)
    return counts


def recover(shares: Mapping[int, bytes]) -> bytes:
    """The secret of t shares, by their x. ValueError where they are not of one secret, as far as that shows."""
    counts = weights(tuple(shares))
    value = sum(w * int.from_bytes(share, "big") for w, share in zip(counts, shares.values(), strict=True)) % PRIME
    if value >= 2 ** (8 * SECRET_BYTES):
        raise ValueError("these shares are of no secret")
    return value.to_bytes(SECRET_BYTES, "big")
