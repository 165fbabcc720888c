"""The accepted updates of a round as one value that is spread over the ranks, and the ways to combine them.

This is where FedAvg's sum is: an aggregator (fedhpc.server.aggregators) says with which weights, `Cohort.weighted_sum`
adds. Rank 0 never holds all updates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.ranks.collectives import columns_of_all, combine_shards, in_ascending_order
from fedhpc.ranks.transport.base import Transport
from fedhpc.secure.masked_sum import Masking, Masks
from fedhpc.updates.exact_sum import FixedGrid, from_grid, grid_exponents, largest_exponents, to_grid
from fedhpc.updates.layout import Layout

_CHUNK = 2**20  # coordinates per collective: bounds the 8-byte buffers whatever P is
_BLOCK = 2**14  # coordinates of a sum that are turned into integers at once, and values of all of its clients, which
_CACHED = 2**17  # are to stay in a core's cache
_VALUES = 2**22  # and values of all clients together, where a rank sees each of them
_PARTS = 16  # chunks of `Cohort.sum_over_coordinates` on each rank whose results are sent together
_SUMMED_VALUES = 2**21  # values of all clients in one of these chunks; the bits of the sum depend on it


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
    `by_coordinate` give their result on rank 0 (zeros of the same shape elsewhere, which take no memory), `gram`,
    `norms` and `sum_over_coordinates` give it on every rank. All have the same bits on any number of ranks.
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
        memory: dict[str, Tensor] | None = None,
        masking: Masking | None = None,
        expected: int | None = None,
        root: Tensor | None = None,
    ) -> None:
        """Collective.

        planned: the clients of the planned cohort, and shares float64 (len(planned),): each one's share of its weight;
        the same on every rank. positions int64 (c,): where in `planned` this rank's accepted clients are, whose updates
        (c, S) these are. movement: |a_i| of a client, see `movements`. memory: see there. masking: how the
        uploads are masked, so that rank 0 learns their sums alone. expected: see there; default all planned.
        root: see there.
        """
        self._transport, self._layout, self._movement, self._masking = transport, layout, movement, masking
        chosen, owners = accepted(transport, positions, len(planned))
        # By their numbers, not as they were sampled: what is added up row by row has the same bits in any order.
        order = np.argsort(np.array(planned)[chosen], kind="stable")
        self._owners, self._updates = owners[order], updates
        self._rows = np.argsort(order)[np.searchsorted(chosen, positions)]  # int64 (c,): the row of each update here
        #: Clients of the planned cohort, accepted or not.
        self.num_planned = len(planned)
        #: How many updates the round is to have: where more clients are sampled than needed, fewer than that.
        self.expected = len(planned) if expected is None else expected
        #: The accepted clients, ascending (C,).
        self.clients = [planned[i] for i in chosen[order]]
        #: Share of each accepted client in the weight of the planned cohort, float64 (C,): they add up to at most 1.
        self.shares = shares[chosen[order]]
        #: What the aggregator keeps on the server from round to round (`Aggregator.keeps_on_server`), float64 (S,)
        #: by name; of meaning on rank 0 alone. What an aggregator puts here is here again in the next round.
        self.memory = {} if memory is None else memory

        #: The update that the server has trained on examples of its own (`Aggregator.needs_root`), (S,); of meaning on
        #: rank 0 alone, and None where nobody asks for it.
        self.root = root

    def __len__(self) -> int:
        """C, the number of accepted clients."""
        return len(self.clients)

    @property
    def size(self) -> int:
        """S, the length of an update."""
        return self._layout.size

    @property
    def mine(self) -> Tensor:
        """The updates of this rank's clients (c, S), in the order in which they were given."""
        return self._updates

    @property
    def my_clients(self) -> list[int]:
        """The clients of `mine`."""
        return [self.clients[row] for row in self._rows]

    @cached_property
    def movements(self) -> np.ndarray:
        """|a_i| of each accepted client, float64 (C,): how far its optimizer goes under a constant gradient of 1.

        For aggregators that state `needs_movements`.
        """
        assert self._movement is not None, "this cohort's clients do not train: the configuration check refuses it"
        return np.array([self._movement(client) for client in self.clients], dtype=np.float64)

    def replaced(self, updates: Tensor, layout: Layout | None = None) -> Cohort:
        """A cohort of the same clients with other tensors that they sent, (c, S), in the same order.

        layout: of these, where it is another.
        """
        return self._with(_updates=updates, _layout=layout or self._layout)

    def mapped(self, change: Callable[[Tensor], Tensor], layout: Layout | None = None) -> Cohort:
        """A cohort of the same clients whose updates are changed where they are: (c, S) -> (c, S'), a row alone.

        layout: of the new ones, where it is another.
        """
        return self._with(_updates=change(self._updates), _layout=layout or self._layout)

    def with_row(self, row: Tensor) -> Cohort:
        """A cohort with one more row, the last, that is the server's: (S,), of meaning on rank 0 alone; its share is 0.

        So `gram` tells how it lies to the updates, without anybody sending them.
        """
        mine = self._transport.rank == 0
        return self._with(
            _updates=torch.cat([self._updates, row.to(self._updates.dtype).unsqueeze(0)]) if mine else self._updates,
            _rows=np.append(self._rows, len(self)) if mine else self._rows,
            _owners=np.append(self._owners, 0),
            clients=[*self.clients, -1],
            shares=np.append(self.shares, 0.0),
            num_planned=self.num_planned + 1,
        )

    def selected(self, chosen: np.ndarray) -> Cohort:
        """A cohort of some of the clients alone. chosen: bool (C,), the same on every rank."""
        mine = chosen[self._rows]
        return self._with(
            _updates=self._updates[torch.from_numpy(mine)],
            _rows=(np.cumsum(chosen) - 1)[self._rows[mine]],
            _owners=self._owners[chosen],
            clients=[client for client, stays in zip(self.clients, chosen, strict=True) if stays],
            shares=self.shares[chosen],
        )

    def mixed(self, matrix: np.ndarray) -> Cohort:
        """The combinations y_k = sum_i M_ki g_i of the updates in place of them; nobody computes them one by one.

        matrix: M, float64 (C', C), the same on every rank. The shares are mixed too.
        """
        return _Mixture(self, matrix)

    def everywhere(self, vector: Tensor) -> Tensor:
        """What a verb has given on rank 0, float64 (S,), on every rank. Collective."""
        sent = vector.contiguous() if self._transport.rank == 0 else torch.empty(self.size, dtype=torch.float64)
        self._transport.broadcast(sent)
        return sent

    def _with(self, **changed: object) -> Cohort:
        other = object.__new__(type(self))
        other.__dict__.update({**self.__dict__, **changed})
        return other

    def weighted_sum(self, weights: np.ndarray, grid: FixedGrid | None = None) -> Tensor:
        """Add up sum_i w_i g_i exactly, in integers: float64 (S,) on rank 0.

        weights: float64 (C,), the same on every rank. What a rank sends does not depend on the number of clients. grid:
        instead of the finest one for these updates; its noise is added once, by rank 0, also where there is no client.
        """
        transport, layout, updates = self._transport, self._layout, self._updates
        masks = None
        if self._masking is not None:
            masks = self._masking.begin(transport, self.clients, self._owners.tolist(), layout.size)
            if self._masking.shortfall(self.clients):
                return self._elsewhere()  # nobody could unmask it: the round is void
        elif not len(self) and grid is None:
            return self._elsewhere()
        mine, rows = torch.from_numpy(weights[self._rows]), self._rows
        if masks is None and not mine.all():  # nothing of them is in the sum
            some = mine.nonzero().squeeze(1)
            updates, mine, rows = updates[some], mine[some], rows[some.numpy()]
        if grid is None:
            highest = largest_exponents(updates, mine, layout)
            transport.all_reduce_max(highest)
            steps = grid_exponents(highest, self.num_planned, layout)
        else:
            steps = torch.full((layout.size,), grid.exponent)
        total = torch.empty(layout.size, dtype=torch.float64) if transport.rank == 0 else self._elsewhere()
        parts = [slice(begin, min(begin + _CHUNK, layout.size)) for begin in range(0, layout.size, _CHUNK)]
        for part in parts:
            acc = self._integers(part, updates, mine, rows, steps, masks)
            transport.reduce_sum(acc)
            if transport.rank == 0:
                total.view(torch.int64)[part] = acc  # where its float64 will be, for lack of memory for both
        if masks is not None:
            masks.recover()
        for part in parts if transport.rank == 0 else ():
            acc = total.view(torch.int64)[part]
            if masks is not None:
                masks.lift(acc.numpy(), part.start)
            if grid is not None:
                acc += grid.noise(len(acc))
            for block in _blocks(part):
                total[block] = from_grid(total.view(torch.int64)[block], steps[block])
        return total

    def _integers(
        self, part: slice, updates: Tensor, weights: Tensor, rows: np.ndarray, steps: Tensor, masks: Masks | None
    ) -> Tensor:
        """The sum on the grid of this rank's weighted updates, masked where they are: int64, of some coordinates.

        updates (c, S), their weights (c,) and rows (c,). steps: int64 (S,).
        """
        acc = torch.zeros(part.stop - part.start, dtype=torch.int64)
        for block in _blocks(part):
            inside = slice(block.start - part.start, block.stop - part.start)
            together = max(1, _CACHED // (block.stop - block.start))  # clients at once
            for first in range(0, len(updates), together):
                few = slice(first, first + together)
                sent = to_grid(updates[few, block], weights[few].unsqueeze(1), steps[block])
                if masks is not None:
                    for values, row in zip(sent, rows[few], strict=True):
                        masks.hide(self.clients[row], values.numpy(), block.start)
                acc[inside] += sent.sum(dim=0)
        return acc

    def by_coordinate(self, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """Combine each coordinate's C values alone: float64 (S,) on rank 0.

        rule: (C, chunk) float64 -> (chunk,), the rows in the order of `clients`, a chunk of coordinates on every rank.
        UserError where it gives something else.
        """
        self._refuse_masked()

        def checked(values: Tensor) -> Tensor:
            return expect_vector(rule(values.double()), values.shape[1], "the rule of by_coordinate")

        combined = combine_shards(
            self._transport,
            self._rows,
            self._updates,
            self._owners,
            max(1, min(_CHUNK, _VALUES // max(len(self), 1))),
            checked,
            torch.empty(0, dtype=torch.float64),
        )
        return self._elsewhere() if combined is None else combined

    def gram(self) -> Tensor:
        """The inner products g_i . g_j of all pairs: float64 (C, C), on every rank.

        |g_i - g_j|^2 = G_ii + G_jj - 2 G_ij.
        """

        def products(values: Tensor) -> Tensor:
            # NumPy sees that this is a matrix by its own transpose and computes half of it, as torch does not.
            matrix = values.numpy()
            with np.errstate(over="ignore", invalid="ignore"):  # what has no number here is the rule's to judge
                return torch.from_numpy(matrix @ matrix.T)

        return self.sum_over_coordinates(products)

    def sum_over_coordinates(self, rule: Callable[[Tensor], Tensor]) -> Tensor:
        """Add up what a rule makes of chunks of coordinates: float64, of the rule's shape, on every rank.

        rule: (C, n) float64 -> float64 of a shape that does not depend on n, of 0 coordinates zeros; the rows in the
        order of `clients`. A chunk has a size that does not depend on the ranks and is on one of them; what the rule
        makes of each is added in the order of the coordinates.
        """
        self._refuse_masked()
        transport, count = self._transport, len(self)
        world, rank = transport.world_size, transport.rank
        rows_of = [np.flatnonzero(self._owners == r).tolist() for r in range(world)]
        mine = in_ascending_order(self._updates, self._rows)
        width = max(1, count, _SUMMED_VALUES // max(count, 1))
        total = rule(torch.empty(count, 0, dtype=torch.float64))
        parts: list[Tensor] = []  # of this rank, which rank 0 is sent together
        # One for all chunks: memory for each anew, between the parts, leaves holes that nothing fits in.
        memory = torch.empty(count * min(width, self.size), dtype=torch.float64)
        for begin in range(0, self.size, width * world):
            bounds = [min(begin + r * width, self.size) for r in range(world + 1)]
            receive = columns_of_all(transport, mine, bounds, [len(rows) for rows in rows_of])
            columns = bounds[rank + 1] - bounds[rank]
            values = memory[: count * columns].view(count, columns)
            for r in range(world):
                for row, received in zip(rows_of[r], receive[r], strict=True):
                    values[row].copy_(received)  # in one go with the conversion
            parts.append(rule(values))
            if len(parts) == _PARTS or begin + width * world >= self.size:
                mine_of_all, nothing = torch.stack(parts), total.new_empty(0)
                gathered = [torch.empty_like(mine_of_all if rank == 0 else nothing) for _ in range(world)]
                if rank:
                    gathered[rank] = nothing.clone()
                transport.all_to_all([mine_of_all if r == 0 else nothing for r in range(world)], gathered)
                for of_ranks in zip(*gathered, strict=True) if rank == 0 else ():  # in the order of the coordinates
                    for part in of_ranks:
                        total += part
                parts = []
        transport.broadcast(total)
        return total

    def norms(self) -> Tensor:
        """The L2 norm of each update: float64 (C,), on every rank. A number a client is all that is sent."""
        self._refuse_masked()
        norms = torch.zeros(len(self), dtype=torch.float64)
        norms[torch.from_numpy(self._rows)] = kernels.row_norms(self._updates).squeeze(1)
        self._transport.all_reduce_max(norms)
        return norms

    def _refuse_masked(self) -> None:
        """UserError where the uploads are masked, so that nobody can see single ones."""
        if self._masking is not None:
            raise UserError(
                "it asks for more of the updates than weighted sums, which is all that secure aggregation gives",
                key="server.aggregator", remedy="use mean or fednova, or take secure out",
            )  # fmt: skip

    def _elsewhere(self) -> Tensor:
        return torch.zeros(1, dtype=torch.float64).expand(self.size)


class _Mixture(Cohort):
    """Combinations of a cohort's updates: each verb of theirs is one of the updates'."""

    def __init__(self, updates: Cohort, matrix: np.ndarray) -> None:
        self.__dict__.update(updates.__dict__)
        self._of, self._matrix = updates, matrix
        self.clients = [*range(len(matrix))]
        self.shares = matrix @ updates.shares

    @property
    def mine(self) -> Tensor:
        raise self._single()

    @property
    def my_clients(self) -> list[int]:
        raise self._single()

    def _with(self, **changed: object) -> Cohort:
        raise self._single()

    def _single(self) -> UserError:
        return UserError(
            "it asks for single updates, and mixed ones are made nowhere one by one",
            key="server.preaggregator", remedy="take it out, or choose another server.aggregator",
        )  # fmt: skip

    def selected(self, chosen: np.ndarray) -> Cohort:
        return _Mixture(self._of, self._matrix[chosen])

    def with_row(self, row: Tensor) -> Cohort:
        matrix = np.block([[self._matrix, np.zeros((len(self), 1))], [np.zeros((1, len(self._of))), np.ones((1, 1))]])
        return _Mixture(self._of.with_row(row), matrix)

    def weighted_sum(self, weights: np.ndarray, grid: FixedGrid | None = None) -> Tensor:
        return self._of.weighted_sum(weights @ self._matrix, grid)

    def by_coordinate(self, rule: Callable[[Tensor], Tensor]) -> Tensor:
        def of_mixtures(values: Tensor) -> Tensor:
            return rule(mixtures(self._matrix, values))

        return self._of.by_coordinate(of_mixtures)

    def sum_over_coordinates(self, rule: Callable[[Tensor], Tensor]) -> Tensor:
        return self._of.sum_over_coordinates(lambda values: rule(mixtures(self._matrix, values)))

    def gram(self) -> Tensor:
        matrix = torch.from_numpy(self._matrix)
        return matrix @ self._of.gram() @ matrix.T

    def norms(self) -> Tensor:
        return self.gram().diagonal().clamp(min=0).sqrt()


def _blocks(part: slice) -> list[slice]:
    """The blocks of `_BLOCK` coordinates that some coordinates consist of."""
    return [slice(begin, min(begin + _BLOCK, part.stop)) for begin in range(part.start, part.stop, _BLOCK)]


def mixtures(matrix: np.ndarray, values: Tensor) -> Tensor:
    """M values with the rows added one after the other, so that no bit depends on how many columns there are.

    matrix: M, float64 (C', C). values: float64 (C, n). Returns (C', n).
    """
    mixed = torch.zeros(len(matrix), values.shape[1], dtype=torch.float64)
    for out, weights in zip(mixed, matrix.tolist(), strict=True):
        for weight, row in zip(weights, values, strict=True):
            if weight:
                out += weight * row
    return mixed


def expect_vector(value: Any, size: int, who: str) -> Tensor:
    """`value`, which an aggregator of anybody's made; UserError unless it is a tensor of shape (size,)."""
    if isinstance(value, torch.Tensor) and value.shape == (size,):
        return value
    got = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"
    raise UserError(f"{who} returned {got}, not a tensor of shape ({size},)", key="server.aggregator")
