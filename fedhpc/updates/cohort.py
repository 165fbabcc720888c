"""From what the workers have to one thing on the server.

Rules that are linear in the updates ride one exact integer sum (updates/layout.py): what a rank sends does not depend
on the number of clients. The others get a sharded exchange: a chunk of the coordinates at a time, every rank receives
the values of all clients for its shard, computes there and sends its shard of the result, so no rank ever holds
cohort * P numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedhpc.lazy import lazy
from fedhpc.ranks.transport.base import Transport
from fedhpc.updates.layout import Layout, exponents, from_grid, grid, to_grid

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

_CHUNK = 2**20  # coordinates per collective: bounds the 8-byte buffers whatever P is
_VALUES = 2**23  # and values of all clients together, where a rank sees each of them


def accepted_places(transport: Transport, slots: np.ndarray, num_clients: int) -> np.ndarray:
    """Places in the cohort of the clients whose contribution is used, ascending, on every rank: int64 (A,).

    slots: those of this rank's clients. Collective.
    """
    sent = torch.zeros(num_clients, dtype=torch.int64)
    sent[torch.from_numpy(slots)] = 1
    transport.all_reduce_max(sent)
    return np.flatnonzero(sent.numpy())


def weighted_sum(
    transport: Transport, updates: Tensor, weights: np.ndarray, layout: Layout, num_clients: int
) -> Tensor | None:
    """Sum over all ranks of w_i g_i: float64 (P,) on rank 0, None elsewhere. The same bits on any number of ranks.

    updates (c, P) and weights (c,) float64 of this rank's clients; num_clients: of the planned cohort, the same on
    every rank.
    """
    highest = exponents(updates, torch.from_numpy(weights), layout)
    transport.all_reduce_max(highest)
    steps = grid(highest, num_clients, layout)
    total = torch.empty(layout.size, dtype=torch.float64) if transport.rank == 0 else None
    for begin in range(0, layout.size, _CHUNK):
        part = slice(begin, min(begin + _CHUNK, layout.size))
        acc = torch.zeros(part.stop - part.start, dtype=torch.int64)
        together = max(1, _CHUNK // len(acc))  # clients at once: many small updates cost what few large ones do
        for first in range(0, len(updates), together):
            some = slice(first, first + together)
            share = torch.from_numpy(weights[some]).unsqueeze(1)
            acc += to_grid(updates[some, part], share, steps[part]).sum(dim=0)
        transport.reduce_sum(acc)
        if total is not None:
            total[part] = from_grid(acc, steps[part])
    return total


def sharded(
    transport: Transport,
    slots: np.ndarray,
    updates: Tensor,
    owners: Sequence[int],
    weights: np.ndarray,
    layout: Layout,
    combine: Callable[[Tensor, Tensor], Tensor],
) -> Tensor | None:
    """`combine((C, chunk), (C,)) -> (chunk,)` of all accepted clients: float64 (P,) on rank 0, None elsewhere.

    slots: int64 (c,), the place in the cohort of each of this rank's clients, whose updates (c, P) these are.
    owners: rank of each accepted client in cohort order, weights (C,) float64 likewise; the same on every rank.
    The rows that `combine` sees are in cohort order, so the result does not depend on who trained whom; nor does it on
    how many coordinates there are in a chunk, of which there are the fewer the more clients.
    """
    return over_shards(
        transport,
        slots,
        updates.double(),
        owners,
        max(1, min(_CHUNK, _VALUES // max(len(owners), 1))),
        lambda values: combine(values, torch.from_numpy(weights)),
        torch.empty(0, dtype=torch.float64),
    )


def over_shards(
    transport: Transport,
    slots: np.ndarray,
    values: Tensor,
    owners: Sequence[int],
    chunk: int,
    combine: Callable[[Tensor], Tensor],
    like: Tensor,
) -> Tensor | None:
    """`combine((C, n, ...)) -> (n, ...)` of the values of all clients at places that a rank is given: all N places on
    rank 0, None elsewhere. Collective.

    values (c, N, ...) of this rank's clients; slots, owners and the order of the rows that `combine` sees as in
    `sharded`. chunk: places in a collective, over all ranks. like: an empty tensor (0, ...) as `combine` makes them.
    """
    world, rank = transport.world_size, transport.rank
    owned = [np.flatnonzero(np.asarray(owners) == r) for r in range(world)]
    mine = values[torch.from_numpy(np.argsort(slots, kind="stable"))]
    places, rest = mine.shape[1], mine.shape[2:]
    total = like.new_empty(places, *like.shape[1:]) if rank == 0 else None
    for begin in range(0, places, chunk):
        end = min(begin + chunk, places)
        bounds = np.linspace(begin, end, world + 1).astype(np.int64)
        width = int(bounds[rank + 1] - bounds[rank])
        send = [mine[:, bounds[r] : bounds[r + 1]].contiguous() for r in range(world)]
        receive = [mine.new_empty(len(owned[r]), width, *rest) for r in range(world)]
        transport.all_to_all(send, receive)
        arrived = mine.new_empty(len(owners), width, *rest)
        for r in range(world):
            arrived[torch.from_numpy(owned[r])] = receive[r]
        shard = combine(arrived) if width else like
        back = [shard if r == 0 else like for r in range(world)]
        sizes = bounds[1:] - bounds[:-1] if rank == 0 else np.zeros(world, dtype=np.int64)
        gathered = [like.new_empty(int(n), *like.shape[1:]) for n in sizes]
        transport.all_to_all(back, gathered)
        if total is not None:
            total[begin:end] = torch.cat(gathered)
    return total


def tree_merge(transport: Transport, mine: Tensor, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """The tensors of all ranks, of one shape, merged in pairs: all of them on rank 0, of no meaning elsewhere.

    merge: associative and commutative, of two tensors into one of their shape. Rank 0 receives log2(ranks) of them.
    Collective.
    """
    nothing = torch.empty(0, dtype=mine.dtype)
    world, rank = transport.world_size, transport.rank
    distance = 1
    while distance < world:
        gives = rank % (2 * distance) == distance
        takes = rank % (2 * distance) == 0 and rank + distance < world
        send = [mine.contiguous() if gives and j == rank - distance else nothing for j in range(world)]
        receive = [torch.empty_like(mine) if takes and j == rank + distance else nothing.clone() for j in range(world)]
        transport.all_to_all(send, receive)
        if takes:
            mine = merge(mine, receive[rank + distance])
        distance *= 2
    return mine


def share(transport: Transport, items: Sequence[bytes]) -> list[bytes]:
    """Rank 0's items on every rank; those of the others do not count. Unlike JSON of any size. Collective."""
    total = torch.tensor([len(items), sum(map(len, items))])
    transport.broadcast(total)
    count, size = total.tolist()
    sizes = torch.empty(count, dtype=torch.int64)
    content = torch.empty(size, dtype=torch.uint8)
    if transport.rank == 0:
        sizes = torch.tensor([len(item) for item in items], dtype=torch.int64)
        content = torch.frombuffer(bytearray(b"".join(items)), dtype=torch.uint8) if size else content
    transport.broadcast(sizes)
    transport.broadcast(content)
    ends, joined = sizes.cumsum(0).tolist(), content.numpy().tobytes()
    return [joined[end - n : end] for n, end in zip(sizes.tolist(), ends, strict=True)]


def fetch(transport: Transport, count: int, owned: Mapping[int, bytes]) -> list[bytes]:
    """`count` items of bytes, each owned by one rank, in order: all of them on rank 0, none elsewhere. Collective."""
    world, rank = transport.world_size, transport.rank
    about = torch.zeros(2, count, dtype=torch.int64)  # the owner, and the length
    for item, content in owned.items():
        about[:, item] = torch.tensor([rank, len(content)])
    transport.all_reduce_max(about)
    owners, lengths = about.tolist()
    nothing = torch.empty(0, dtype=torch.uint8)
    mine = b"".join(owned[item] for item in sorted(owned))
    sent = torch.frombuffer(bytearray(mine), dtype=torch.uint8) if mine else nothing
    send = [sent if j == 0 else nothing for j in range(world)]
    sizes = [sum(n for owner, n in zip(owners, lengths, strict=True) if owner == j) for j in range(world)]
    receive = [torch.empty(size if rank == 0 else 0, dtype=torch.uint8) for size in sizes]
    if rank != 0:
        receive[rank] = torch.empty_like(send[rank])
    transport.all_to_all(send, receive)
    if rank != 0:
        return []
    parts = [buffer.numpy().tobytes() for buffer in receive]
    places, found = [0] * world, []
    for owner, length in zip(owners, lengths, strict=True):
        found.append(parts[owner][places[owner] : places[owner] + length])
        places[owner] += length
    return found
