"""Masked sums over the ranks: every client's upload is masked on its rank, and rank 0 sees masked integers alone.

A sum modulo 2^64 in four steps, each of them by way of the server (Bonawitz et al. 2017, figure 4, for a server that
follows the protocol):

    0  keys      every client of the cohort sends its public keys, and gets those of its neighbours
    1  shares    it sends each neighbour, sealed, a share of its mask key and one of its seed
       (a client that drops out, or whose update is refused, does so here: its neighbours' masks with it are not met)
    2  upload    x + PRG(its seed) + sum over neighbours of +-PRG(their common seed), what `Masks.hide` adds
    3  unmasking who uploaded sends shares: of the seeds of those who did too, of the mask keys of those who did not

A simulation of the protocol, with its real work and messages: the keys follow from run.seed, so that a run has the same
bits again. In a deployment they come from the operating system.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from fedhpc import rng
from fedhpc.errors import UserError
from fedhpc.ranks.collectives import gather_bytes, scatter_bytes
from fedhpc.ranks.transport.base import Transport
from fedhpc.secure.client import ADVERT_BYTES, SEALED_BYTES, Client
from fedhpc.secure.protocols.base import FEWEST, Protocol
from fedhpc.secure.server import Server, irrecoverable
from fedhpc.secure.shamir import SHARE_BYTES

NUMBER_BYTES = 8  # of a masked coordinate
_ROUNDS = 400  # of `Masking.chance_of_void`


class Masking:
    """Secure aggregation in one round: who shares masks with whom, and the masks of each sum of the round."""

    def __init__(self, protocol: Protocol, seed: int, round_: int, clients: Sequence[int]) -> None:
        """seed: run.seed. clients: those that take part, at least one: they have data, whether they report or not."""
        self._seed, self._round, self._clients = seed, round_, list(clients)
        #: The number of each client among those that take part.
        self.numbers = {client: number for number, client in enumerate(self._clients)}
        self.neighbours = _neighbours(protocol, len(self._clients), seed, round_)
        self.thresholds = [protocol.threshold(1 + len(near)) for near in self.neighbours]
        #: What the protocol has sent so far, in bytes, as the server saw it (on rank 0): to it, and from it.
        self.bytes_up = self.bytes_down = 0
        self._sums = 0

    def shortfall(self, uploaded: Sequence[int]) -> str:
        """Why the sum of these clients' uploads is not unmasked, in a few words; empty where it is."""
        if len(uploaded) < FEWEST:
            return f"{len(uploaded)} of the {FEWEST} clients whose sum tells nobody another's update completed"
        came = {self.numbers[client] for client in uploaded}
        client = irrecoverable(self.neighbours, self.thresholds, came)
        if client is None:
            return ""
        holders = {*self.neighbours[client], client}
        return (
            f"{len(holders & came)} of {len(holders)} clients that hold shares of a mask completed, and "
            f"{self.thresholds[client]} are needed to recover it"
        )

    def chance_of_void(self, dropout: float, awaited: int) -> float:
        """The share of a few hundred seeded rounds that are void, where each client drops out with a probability.

        awaited: the most that upload of those that are left; the others are cut off.
        """
        draws, count, void = rng.generator(self._seed, "secure.chance"), len(self._clients), 0
        holders = [[*near, client] for client, near in enumerate(self.neighbours)]
        begins, flat = np.cumsum([0, *map(len, holders[:-1])]), np.concatenate(holders)
        for _ in range(_ROUNDS):
            came = draws.random(count) >= dropout
            came &= np.cumsum(came) <= awaited
            held = np.add.reduceat(came[flat].astype(np.int64), begins)  # who uploaded of those that hold its shares
            void += came.sum() < FEWEST or bool(((held > 0) & (held < self.thresholds)).any())
        return void / _ROUNDS

    def describe(self) -> str:
        """Who shares masks with whom, and how many can recover one, in a line."""
        fewest, most = min(map(len, self.neighbours)), max(map(len, self.neighbours))
        degrees = str(most) if fewest == most else f"{fewest} to {most}"
        return (
            f"{len(self._clients)} clients share masks with {degrees} others each; {max(self.thresholds)} of "
            f"{most + 1} that hold shares recover one"
        )

    def expected_bytes(self, uploading: Sequence[int], size: int) -> tuple[int, int]:
        """Bytes of one sum to the server and from it, where these clients upload `size` numbers each."""
        degrees = [len(near) for near in self.neighbours]
        answering = [degrees[self.numbers[client]] for client in uploading]
        keys = sum(ADVERT_BYTES + SEALED_BYTES * k for k in degrees)
        up = keys + sum(NUMBER_BYTES * size + SHARE_BYTES * (k + 1) for k in answering)
        return up, sum((ADVERT_BYTES + SEALED_BYTES) * k for k in degrees) + sum(answering)

    def begin(self, transport: Transport, uploaded: Sequence[int], ranks: Sequence[int], size: int) -> Masks:
        """The masks of the next sum, after steps 0 and 1. Collective.

        uploaded: the clients whose uploads will come, of `size` numbers, and the rank that has each of them.
        """
        self._sums += 1
        self.bytes_up += NUMBER_BYTES * size * len(uploaded)
        # Who does not upload trained nowhere, or was refused: it is dealt out to the ranks that have clients.
        workers = list(range(1, transport.world_size)) or [0]
        rank_of = dict(zip(uploaded, ranks, strict=True))
        owners = [int(rank_of.get(c, workers[i % len(workers)])) for i, c in enumerate(self._clients)]
        return Masks(self, transport, owners, [c in rank_of for c in self._clients])

    def client(self, number: int) -> Client:
        """Client `number` of those that take part, in the sum that was begun last."""
        generator = rng.generator(self._seed, "secure.client", self._round, self._sums, self._clients[number])
        return Client(number, self.neighbours[number], self.thresholds[number], generator)


def bytes_of_neighbours(degree: int) -> tuple[int, int]:
    """Bytes that a client of one sum receives and sends for its neighbours, beside what it would without any."""
    return (ADVERT_BYTES + SEALED_BYTES + 1) * degree, (SEALED_BYTES + SHARE_BYTES) * degree


class Masks:
    """The masks of one sum on one rank: those of its clients, and on rank 0 those that are left in the sum."""

    def __init__(self, masking: Masking, transport: Transport, owners: Sequence[int], uploaded: Sequence[bool]) -> None:
        """Collective: keys and shares. Of each client that takes part: its rank, and whether its upload will come."""
        self._masking, self._transport, self._owners = masking, transport, owners
        self._uploaded = uploaded
        mine = [number for number, owner in enumerate(owners) if owner == transport.rank]
        self._clients = {number: masking.client(number) for number in mine}
        near = masking.neighbours
        adverts = self._gather({number: client.advertise() for number, client in self._clients.items()})
        told = self._scatter([b"".join(adverts[one] for one in ones) for ones in near] if adverts else [])
        sealed = self._gather({number: client.share(told[number]) for number, client in self._clients.items()})
        for number, shares in self._scatter(_turned(sealed, near) if sealed else []).items():
            self._clients[number].hold(shares)
        self._server = Server(near, masking.thresholds, adverts)

    def hide(self, client: int, values: np.ndarray, begin: int) -> None:
        """Mask some coordinates of a client's update, int64 (n,), in place; begin: the number of the first, even."""
        self._clients[self._masking.numbers[client]].mask(values, begin)

    def recover(self) -> None:
        """Ask who uploaded for shares, so that rank 0 knows what is left in the sum. Collective."""
        came = {number for number, uploaded in enumerate(self._uploaded) if uploaded}
        near = self._masking.neighbours
        asked = [bytes(one in came for one in near[number]) if number in came else b"" for number in range(len(near))]
        received = self._scatter(asked if self._transport.is_server else [])
        answers = self._gather({
            number: client.answer(received[number]) if number in came else b""
            for number, client in self._clients.items()
        })  # fmt: skip
        if answers:
            self._server.recover(came, dict(enumerate(answers)))

    def lift(self, values: np.ndarray, begin: int) -> None:
        """Take the masks out of some coordinates of the sum, int64 (n,), in place; on rank 0."""
        self._server.unmask(values, begin)

    def _gather(self, items: dict[int, bytes]) -> list[bytes]:
        """A message of every client, at the server; nothing elsewhere."""
        messages = gather_bytes(self._transport, len(self._owners), items)
        self._masking.bytes_up += sum(map(len, messages))
        return messages

    def _scatter(self, items: list[bytes]) -> dict[int, bytes]:
        """A message to every client, from the server: those of this rank's clients."""
        self._masking.bytes_down += sum(map(len, items))
        return scatter_bytes(self._transport, self._owners, items)


@lru_cache(maxsize=2)  # a round asks for it several times
def _neighbours(protocol: Protocol, count: int, seed: int, round_: int) -> list[list[int]]:
    """The graph of a round, of this many clients. UserError unless a client is a neighbour of its neighbours."""
    graph = protocol.graph(count, rng.generator(seed, "secure.graph", round_))
    neighbours = [set(near) for near in graph]
    for client, near in enumerate(graph):
        if any(client == one or client not in neighbours[one] for one in near):
            raise UserError(
                f"in the graph of {type(protocol).__name__} a client has a neighbour that it is no neighbour of",
                key="secure.name",
            )
    return graph


def _turned(sealed: Sequence[bytes], neighbours: Sequence[Sequence[int]]) -> list[bytes]:
    """What every client sent to each neighbour, as what every client gets of each neighbour."""
    position = [{one: i for i, one in enumerate(near)} for near in neighbours]

    def part(sender: int, receiver: int) -> bytes:
        begin = SEALED_BYTES * position[sender][receiver]
        return sealed[sender][begin : begin + SEALED_BYTES]

    return [b"".join(part(one, receiver) for one in near) for receiver, near in enumerate(neighbours)]
