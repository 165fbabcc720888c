"""What the server does in a masked sum: it recovers, of shares, the masks that are left in it, and takes them out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from fedhpc.secure import shamir
from fedhpc.secure.client import MASKS, halves, pair_sign
from fedhpc.secure.primitives import add_stream, agree, public_key


class Server:
    """The server's half of one sum."""

    def __init__(self, neighbours: Sequence[Sequence[int]], threshold: Sequence[int], adverts: Sequence[bytes]) -> None:
        """Each has an entry for every client: its neighbours, how many shares recover a secret, its public keys."""
        self._neighbours, self._threshold, self._adverts = neighbours, threshold, adverts
        self._left: list[tuple[bytes, int]] = []  # the seeds of the streams that are left, and their signs

    def recover(self, uploaded: Collection[int], answers: Mapping[int, bytes]) -> None:
        """Find the masks that are left in the sum of those who uploaded, by their answers.

        ValueError where the shares are not of the key that a client had told.
        """
        shares: dict[int, dict[int, bytes]] = {}
        for client in sorted(uploaded):
            answer = answers[client]
            for i, one in enumerate((*self._neighbours[client], client)):
                share = answer[shamir.SHARE_BYTES * i : shamir.SHARE_BYTES * (i + 1)]
                shares.setdefault(one, {})[client + 1] = share
        for one, held in shares.items():
            secret = shamir.recover(dict(list(held.items())[: self._threshold[one]]))
            if one in uploaded:
                self._left.append((secret, 1))
                continue
            if public_key(secret) != halves(self._adverts[one])[0]:
                raise ValueError(f"the shares of client {one} are not of its mask key")
            for neighbour in self._neighbours[one]:
                if neighbour in uploaded:
                    seed = agree(secret, halves(self._adverts[neighbour])[0], MASKS)
                    self._left.append((seed, pair_sign(neighbour, one)))

    def unmask(self, values: np.ndarray, begin: int) -> None:
        """Take the masks that are left out of the sum, int64 (n,), in place; begin: the first coordinate's number."""
        for seed, sign in self._left:
            add_stream(values, seed, begin, -sign)


def irrecoverable(
    neighbours: Sequence[Sequence[int]], threshold: Sequence[int], uploaded: Collection[int]
) -> int | None:
    """The first client whose mask too few can recover, among those whose mask is left; None where all can be."""
    for client, near in enumerate(neighbours):
        left = client in uploaded or any(one in uploaded for one in near)
        if left and sum(one in uploaded for one in (*near, client)) < threshold[client]:
            return client
    return None
