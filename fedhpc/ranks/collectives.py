"""Collectives made of several calls of the transport: bytes of any size, merges in a tree, rules over shards.

As with the transport's own collectives, every rank calls them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedhpc.lazy import Tensor, torch
from fedhpc.ranks.transport.base import Transport


def broadcast_bytes(transport: Transport, items: Sequence[bytes]) -> list[bytes]:
    """Send rank 0's items, of any size, to every rank; the items that other ranks pass are ignored."""
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


def gather_bytes(transport: Transport, count: int, items: Mapping[int, bytes]) -> list[bytes]:
    """Collect `count` items of bytes, in order, on rank 0; the other ranks get an empty list.

    items: those of this rank, by their number; every number is on exactly one rank.
    """
    world, rank = transport.world_size, transport.rank
    header = torch.zeros(2, count, dtype=torch.int64)  # for each item the rank that has it, and its length
    for item, content in items.items():
        header[:, item] = torch.tensor([rank, len(content)])
    transport.all_reduce_max(header)
    owners, lengths = header.tolist()
    nothing = torch.empty(0, dtype=torch.uint8)
    mine = b"".join(items[item] for item in sorted(items))
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
    begins, ordered = [0] * world, []
    for owner, length in zip(owners, lengths, strict=True):
        ordered.append(parts[owner][begins[owner] : begins[owner] + length])
        begins[owner] += length
    return ordered


def scatter_bytes(transport: Transport, owners: Sequence[int], items: Sequence[bytes]) -> dict[int, bytes]:
    """Send each of rank 0's items to the rank that owns it: the items of this rank, by their number.

    owners: the rank of each item, the same on every rank; the items that other ranks pass are ignored.
    """
    world, rank = transport.world_size, transport.rank
    lengths = torch.tensor([len(item) for item in items] if rank == 0 else [0] * len(owners), dtype=torch.int64)
    transport.broadcast(lengths)
    numbers = [[i for i, owner in enumerate(owners) if owner == j] for j in range(world)]
    sizes = [int(lengths[one].sum()) for one in numbers]
    nothing = torch.empty(0, dtype=torch.uint8)
    parts = [bytearray(b"".join(items[i] for i in one)) if rank == 0 else bytearray() for one in numbers]
    send = [torch.frombuffer(part, dtype=torch.uint8) if part else nothing for part in parts]
    receive = [torch.empty(sizes[rank] if j == 0 else 0, dtype=torch.uint8) for j in range(world)]
    transport.all_to_all(send, receive)
    content, begin, mine = receive[0].numpy().tobytes(), 0, {}
    for i in numbers[rank]:
        mine[i] = content[begin : begin + int(lengths[i])]
        begin += int(lengths[i])
    return mine


def tree_merge(transport: Transport, mine: Tensor, merge: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Merge the equally shaped tensors of all ranks in pairs; rank 0 gets the result, that of other ranks is undefined.

    merge: merges two tensors into one of the same shape; it must be associative and commutative. Rank 0 receives only
    log2(ranks) tensors.
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


def in_ascending_order(values: Tensor, positions: np.ndarray) -> Tensor:
    """The rows of `values` in the order of their positions, int64 (c,); not copied where they are so already."""
    order = np.argsort(positions, kind="stable")
    return values if np.array_equal(order, np.arange(len(order))) else values[torch.from_numpy(order)]


def columns_of_all(transport: Transport, mine: Tensor, bounds: Sequence[int], counts: Sequence[int]) -> list[Tensor]:
    """Give each rank its columns of everybody's rows: from each rank r (counts[r], columns of this rank, ...).

    mine: this rank's rows (c, N, ...). bounds: rank r gets the columns from bounds[r] to bounds[r + 1].
    """
    world, rank, nothing = transport.world_size, transport.rank, mine.new_empty(0)
    parts = [mine[:, bounds[r] : bounds[r + 1]] for r in range(world)]
    send = [nothing if r == rank else parts[r].contiguous() for r in range(world)]
    width, rest = bounds[rank + 1] - bounds[rank], mine.shape[2:]
    receive = [nothing.clone() if r == rank else mine.new_empty(counts[r], width, *rest) for r in range(world)]
    transport.all_to_all(send, receive)
    receive[rank] = parts[rank]  # as it is, without a copy
    return receive


def combine_shards(
    transport: Transport,
    positions: np.ndarray,
    values: Tensor,
    owners: Sequence[int] | np.ndarray,
    chunk: int,
    combine: Callable[[Tensor], Tensor],
    like: Tensor,
) -> Tensor | None:
    """Apply `combine((C, n, ...)) -> (n, ...)` to the values of all C clients, with the N columns divided among ranks.

    Returns all N columns on rank 0 and None elsewhere; no rank ever holds C x N values. values: (c, N, ...), of this
    rank's clients. positions: int64 (c,), where these clients are among all clients; any numbers will do that ascend in
    the order of `owners`, which names the rank of each of the C clients. `combine` sees rows in that order, so the
    result depends neither on which rank has a client nor on the chunk. chunk: how many columns one exchange has, over
    all ranks. like: an empty tensor (0, ...) of the shape and type that `combine` returns.
    """
    world, rank = transport.world_size, transport.rank
    rows_of = [np.flatnonzero(np.asarray(owners) == r).tolist() for r in range(world)]
    mine = in_ascending_order(values, positions)
    columns, rest = mine.shape[1], mine.shape[2:]
    total = like.new_empty(columns, *like.shape[1:]) if rank == 0 else None
    for begin in range(0, columns, chunk):
        end = min(begin + chunk, columns)
        bounds = np.linspace(begin, end, world + 1).astype(np.int64)
        width = int(bounds[rank + 1] - bounds[rank])
        receive = columns_of_all(transport, mine, bounds.tolist(), [len(rows) for rows in rows_of])
        arrived = mine.new_empty(len(owners), width, *rest)
        for r in range(world):
            for row, received in zip(rows_of[r], receive[r], strict=True):
                arrived[row] = received
        shard = combine(arrived) if width else like
        results = [shard if r == 0 else like for r in range(world)]
        sizes = bounds[1:] - bounds[:-1] if rank == 0 else np.zeros(world, dtype=np.int64)
        gathered = [like.new_empty(int(n), *like.shape[1:]) for n in sizes]
        transport.all_to_all(results, gathered)
        if total is not None:
            total[begin:end] = torch.cat(gathered)
    return total
