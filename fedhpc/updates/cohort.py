"""The accepted updates of a round as one value that is spread over the ranks, and the three ways to combine them.

This is where FedAvg's sum is: an aggregator (fedhpc.server.aggregators) says with which weights, `Cohort.weighted_sum`
adds. Rank 0 never holds all updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.ranks.collectives import combine_shards
from fedhpc.ranks.transport.base import Transport
from fedhpc.updates.exact_sum import from_grid, grid_exponents, largest_exponents, to_grid
from fedhpc.updates.layout import Layout

_CHUNK = 2**20  # coordinates per collective: bounds the 8-byte buffers whatever P is
_VALUES = 2**23  # and values of all clients together, where a rank sees each of them
_GRAM_VALUES = 2**21  # values of all clients in one chunk of `Cohort.gram`; its bits depend on it


def accepted(transport: Transport, positions: np.ndarray, num_planned: int) -> tuple[np.ndarray, np.ndarray]:
    """Tell every rank whose contribution is used: positions in the planned cohort, ascending, int64 (C,), and the rank
    that has each of them, int64 (C,). Collective.

    positions: int64 (c,), of this rank's accepted clients. num_planned: clients in the planned cohort.
    """
    holder = torch.zeros(num_planned, dtype=torch.int64)
    holder[torch.from_numpy(positions)] = transport.rank + 1
    transport.all_reduce_max(holder)
    chosen = np.flatnonzero(holder.numpy())
    return chosen, holder.numpy()[chosen] - 1


class Cohort:
    """The accepted updates g_i of C clients, each row on the rank that trained the client.

    Every rank makes it and calls the same verbs in the same order, for all of them are collective. `weighted_sum` and
    `by_coordinate` give their result on rank 0 (zeros of the same shape elsewhere, which take no memory), `gram` gives
    it on every rank. All have the same bits on any number of ranks.
    """

    def __init__(
        self,
        transport: Transport,
        layout: Layout,
        planned: Sequence[int],
        shares: np.ndarray,
        positions: np.ndarray,
        updates: Tensor,
        movement: Callable[[int], float] | None = None,
    ) -> None:
        """Collective.

        planned: the clients of the planned cohort, and shares float64 (len(planned),): each one's share of its weight;
        the same on every rank. positions int64 (c,): where in `planned` this rank's accepted clients are, whose updates
        (c, S) these are. movement: |a_i| of a client, see `movements`.
        """
        self._transport, self._layout, self._movement = transport, layout, movement
        self._positions, self._updates = positions, updates
        self._accepted, self._owners = accepted(transport, positions, len(planned))
        #: Clients of the planned cohort, accepted or not.
        self.num_planned = len(planned)
        #: The accepted clients in the order of the planned cohort (C,).
        self.clients = [planned[i] for i in self._accepted]
        #: Share of each accepted client in the weight of the planned cohort, float64 (C,): they add up to at most 1.
        self.shares = shares[self._accepted]

    def __len__(self) -> int:
        """C, the number of accepted clients."""
        return len(self.clients)

    @property
    def size(self) -> int:
        """S, the length of an update."""
        return self._layout.size

    @cached_property
    def movements(self) -> np.ndarray:
        """|a_i| of each accepted client, float64 (C,): how far its optimizer goes under a constant gradient of 1.

        For aggregators that state `needs_movements`.
        """
        assert self._movement is not None, "this cohort's clients do not train: the configuration check refuses it"
        return np.array([self._movement(client) for client in self.clients], dtype=np.float64)

    def replaced(self, updates: Tensor) -> Cohort:
        """A cohort of the same clients with other tensors that they sent, (c, S), in the same order."""
        other = object.__new__(Cohort)
        other.__dict__.update(self.__dict__)
        other._updates = updates
        return other

    def weighted_sum(self, weights: np.ndarray) -> Tensor:
        """Add up sum_i w_i g_i exactly, in integers: float64 (S,) on rank 0.

        weights: float64 (C,), the same on every rank. What a rank sends does not depend on the number of clients.
        """
        if not len(self):
            return self._elsewhere()
        transport, layout, updates = self._transport, self._layout, self._updates
        mine = torch.from_numpy(weights[self._rows])
        highest = largest_exponents(updates, mine, layout)
        transport.all_reduce_max(highest)
        steps = grid_exponents(highest, self.num_planned, layout)
        total = torch.empty(layout.size, dtype=torch.float64) if transport.rank == 0 else self._elsewhere()
        for begin in range(0, layout.size, _CHUNK):
            part = slice(begin, min(begin + _CHUNK, layout.size))
            acc = torch.zeros(part.stop - part.start, dtype=torch.int64)
            together = max(1, _CHUNK // len(acc))  # clients at once: many small updates cost what few large ones do
            for first in range(0, len(updates), together):
                some = slice(first, first + together)
                acc += to_grid(updates[some, part], mine[some].unsqueeze(1), steps[part]).sum(dim=0)
            transport.reduce_sum(acc)
            if transport.rank == 0:
                total[part] = from_grid(acc, steps[part])
        return total

    def by_coordinate(self, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """Combine each coordinate's C values alone: float64 (S,) on rank 0.

        rule: (C, chunk) float64 -> (chunk,), the rows in the order of `clients`, a chunk of coordinates on every rank.
        UserError where it gives something else.
        """

        def checked(values: Tensor) -> Tensor:
            return expect_vector(rule(values), values.shape[1], "the rule of by_coordinate")

        combined = combine_shards(
            self._transport,
            self._positions,
            self._updates.double(),
            self._owners,
            max(1, min(_CHUNK, _VALUES // max(len(self), 1))),
            checked,
            torch.empty(0, dtype=torch.float64),
        )
        return self._elsewhere() if combined is None else combined

    def gram(self) -> Tensor:
        """The inner products g_i . g_j of all pairs: float64 (C, C), on every rank.

        |g_i - g_j|^2 = G_ii + G_jj - 2 G_ij. Coordinates are taken in chunks of a size that does not depend on the
        ranks, each on one rank, and their parts are added in the order of the coordinates.
        """
        transport, count = self._transport, len(self)
        world, rank = transport.world_size, transport.rank
        rows_of = [torch.from_numpy(np.flatnonzero(self._owners == r)) for r in range(world)]
        mine = self._updates[torch.from_numpy(np.argsort(self._positions, kind="stable"))]
        width = max(1, count, _GRAM_VALUES // max(count, 1))
        total = torch.zeros(count, count, dtype=torch.float64)
        none = total[:0]
        for begin in range(0, self.size, width * world):
            bounds = [min(begin + r * width, self.size) for r in range(world + 1)]
            send = [mine[:, bounds[r] : bounds[r + 1]].contiguous() for r in range(world)]
            receive = [mine.new_empty(len(rows_of[r]), bounds[rank + 1] - bounds[rank]) for r in range(world)]
            transport.all_to_all(send, receive)
            values = torch.empty(count, bounds[rank + 1] - bounds[rank], dtype=torch.float64)
            for r in range(world):
                values[rows_of[r]] = receive[r].double()
            parts = [torch.empty_like(total if rank == 0 else none) for _ in range(world)]
            transport.all_to_all([values @ values.T if r == 0 else none for r in range(world)], parts)
            for part in parts if rank == 0 else ():
                total += part
        transport.broadcast(total)
        return total

    @cached_property
    def _rows(self) -> np.ndarray:
        """Which of the accepted clients this rank's are: int64 (c,)."""
        return np.searchsorted(self._accepted, self._positions)

    def _elsewhere(self) -> Tensor:
        return torch.zeros(1, dtype=torch.float64).expand(self.size)


def expect_vector(value: Any, size: int, who: str) -> Tensor:
    """`value`, which an aggregator of anybody's made; UserError unless it is a tensor of shape (size,)."""
    if isinstance(value, torch.Tensor) and value.shape == (size,):
        return value
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    raise UserError(f"{who} returned {got}, not a tensor of shape ({size},)", key="server.aggregator")
