"""What a client does in a masked sum (Bonawitz et al. 2017, figure 4): keys, shares, its masked upload, its answer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from fedhpc.secure import shamir
from fedhpc.secure.primitives import KEY_BYTES, SEAL_BYTES, add_stream, agree, public_key, seal, unseal

ADVERT_BYTES = 2 * KEY_BYTES  # the public keys of masks and of shares
SEALED_BYTES = 2 * shamir.SHARE_BYTES + SEAL_BYTES  # a neighbour's shares of both secrets
MASKS, SHARES = b"masks", b"shares"


class Client:
    """One client in one sum. It is known by its number among those who take part.

    Its secrets are a private key of its pairwise masks, one of the encryption of shares, and the seed of the mask that
    is its alone: the seed is recovered where its upload came, the first key where it did not, and never both.
    """

    def __init__(self, number: int, neighbours: Sequence[int], threshold: int, generator: np.random.Generator) -> None:
        """generator: all that it draws at random."""
        self.number, self.neighbours = number, neighbours
        self._mask_key, self._share_key, self._seed = (generator.bytes(KEY_BYTES) for _ in range(3))
        #: For the mask key and the seed: the coefficients of the polynomial whose values are its shares.
        self._coefficients = [
            [int.from_bytes(generator.bytes(2 * KEY_BYTES), "big") % shamir.PRIME for _ in range(threshold - 1)]
            for _ in range(2)
        ]
        self._pair_seeds: dict[int, bytes] = {}
        self._seals: dict[int, bytes] = {}
        self._held: dict[int, tuple[bytes, bytes]] = {}  # of whom: shares of its mask key and of its seed

    def advertise(self) -> bytes:
        """Its public keys, for its neighbours."""
        return public_key(self._mask_key) + public_key(self._share_key)

    def share(self, adverts: bytes) -> bytes:
        """Its shares for each neighbour, sealed, in the order of the neighbours. adverts: theirs, in that order."""
        holders = [*self.neighbours, self.number]
        xs = [holder + 1 for holder in holders]
        both = zip(*(
            shamir.split(secret, coefficients, xs)
            for secret, coefficients in zip((self._mask_key, self._seed), self._coefficients, strict=True)
        ), strict=True)  # fmt: skip
        shares = dict(zip(holders, both, strict=True))
        self._held[self.number] = shares.pop(self.number)
        sealed = []
        for i, neighbour in enumerate(self.neighbours):
            of_masks, of_shares = halves(adverts[ADVERT_BYTES * i : ADVERT_BYTES * (i + 1)])
            self._pair_seeds[neighbour] = agree(self._mask_key, of_masks, MASKS)
            self._seals[neighbour] = agree(self._share_key, of_shares, SHARES)
            sealed.append(seal(self._seals[neighbour], self.number, neighbour, b"".join(shares[neighbour])))
        return b"".join(sealed)

    def hold(self, sealed: bytes) -> None:
        """Take the shares that each neighbour has sealed for it, in the order of the neighbours."""
        for i, neighbour in enumerate(self.neighbours):
            message = sealed[SEALED_BYTES * i : SEALED_BYTES * (i + 1)]
            self._held[neighbour] = halves(unseal(self._seals[neighbour], neighbour, self.number, message))

    def mask(self, values: np.ndarray, begin: int) -> None:
        """Add all its masks to some coordinates of its update, int64 (n,), in place; begin: the first one's number."""
        add_stream(values, self._seed, begin, 1)
        for neighbour, seed in self._pair_seeds.items():
            add_stream(values, seed, begin, pair_sign(self.number, neighbour))

    def answer(self, uploaded: bytes) -> bytes:
        """A share of one secret of each neighbour, in their order, and of its own seed.

        uploaded: a byte for each neighbour, 1 where its upload came: then its seed is asked for, else its mask key.
        """
        asked = {neighbour: bool(came) for neighbour, came in zip(self.neighbours, uploaded, strict=True)}
        return b"".join(self._held[one][asked.get(one, True)] for one in (*self.neighbours, self.number))


def pair_sign(client: int, neighbour: int) -> int:
    """The sign with which `client` adds the mask that it shares with `neighbour`, who adds it with the other one."""
    return 1 if client < neighbour else -1


def halves(message: bytes) -> tuple[bytes, bytes]:
    """A message of two parts of the same length."""
    half = len(message) // 2
    return message[:half], message[half:]
