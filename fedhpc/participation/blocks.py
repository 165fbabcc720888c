"""Blocks: which clients train together in one forward, and which worker trains each block.

Blocks are formed from the whole cohort before they are given to workers, so what is computed does not depend on the
number of workers; only where it is computed does (but see `joined`).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np

from fedhpc.config import Config
from fedhpc.data.population import Population
from fedhpc.data.tokens import Examples
from fedhpc.participation.plan import Block
from fedhpc.training.schedule import examples_per_step, num_steps

_AUTO_BLOCK = {"cpu": 8, "cuda": 32}  # most clients in one forward with block_size auto
_UNEVEN = 1.1  # how much more than its least possible load the busiest worker may have
_NOT_DEALT = 8  # workers for which blocks are as in runs that earlier versions began, which knew no other number


def resolve_block_size(config: Config, size: int, device: str) -> int:
    """K, how many clients train in one forward.

    With runtime.block_size auto it follows from the size of the cohort, runtime.workers and the type of device ("cpu"
    or "cuda") alone: a block for each of these workers, of at least two clients where the cohort allows.
    """
    if config.runtime.block_size != "auto":
        return int(config.runtime.block_size)
    return max(min(2, size), min(_AUTO_BLOCK[device], math.ceil(size / config.runtime.workers)))


def most_together(config: Config, block_size: int, device: str) -> int:
    """How many clients of one worker train in one forward at most.

    With block_size auto a GPU takes more than one block, since few clients do not fill it. There the same bits on any
    number of workers are promised with runtime.deterministic alone.
    """
    joins = device == "cuda" and config.runtime.block_size == "auto" and not config.runtime.deterministic
    return max(block_size, _AUTO_BLOCK[device]) if joins else block_size


def most_of_runs(config: Config, block_size: int, device: str) -> int:
    """How many clients of several runs train in one forward at most: those of a block, or with block_size auto as many
    as pay."""
    return max(block_size, _AUTO_BLOCK[device]) if config.runtime.block_size == "auto" else block_size


def joined(blocks: Sequence[Block], most: int) -> list[Block]:
    """Join the blocks of one rank, in their order, to blocks of at most `most` clients."""
    together: list[Block] = []
    for block in blocks:
        last = together[-1] if together else None
        if last and len(last.clients) + len(block.clients) <= most:
            together[-1] = replace(last, clients=last.clients + block.clients, cost=last.cost + block.cost)
        else:
            together.append(block)
    return together


def form_blocks(costs: dict[int, float], block_size: int, workers: int) -> list[tuple[int, ...]]:
    """Put clients together in blocks of at most `block_size`, for `workers` workers (runtime.workers).

    Clients of like cost share a block, and blocks differ by one client at most; where there are more than workers, each
    worker can have as many. With just one for each worker clients are dealt out instead, so that blocks cost about the
    same (not with 8 workers, the default).
    The blocks are then given to the workers on paper; while the busiest of these has more than 1.1 times what it must
    have, its costliest block is halved. How many workers a run really has plays no part, so its results do not depend
    on that. Example: costs 8, 8, 4, 4 and blocks of 2 give (0, 1), (2, 3) for 8 workers; the first is twice as costly
    as the second, so it is halved. For two workers they give (0, 2), (1, 3).
    """
    clients = sorted(costs, key=lambda c: (-costs[c], c))
    if not clients:
        return []
    number = math.ceil(len(clients) / block_size)
    if number > workers:  # as many for each of them
        number = min(len(clients), math.ceil(number / workers) * workers)
    least, larger = divmod(len(clients), number)  # of the blocks the first `larger` have one client more
    bounds = [part * least + min(part, larger) for part in range(number + 1)]
    blocks = [tuple(clients[begin:end]) for begin, end in pairwise(bounds)]
    if number == workers != _NOT_DEALT:
        blocks = _dealt(clients, costs, number)
    with_blocks = range(min(workers, len(blocks)))
    most = _UNEVEN * _least_load([costs[c] for c in clients], len(with_blocks))
    while True:
        load = [0.0] * len(with_blocks)
        placed = assign(blocks, [sum(costs[c] for c in block) for block in blocks], with_blocks)
        for block in placed:
            load[block.worker] += block.cost
        busiest = load.index(max(load))
        halvable = [b for b in placed if b.worker == busiest and len(b.clients) > 1]
        if load[busiest] <= most or not halvable:
            return blocks
        large = max(halvable, key=lambda block: block.cost).clients
        at, half = blocks.index(large), len(large) // 2
        blocks[at : at + 1] = [large[:half], large[half:]]


def _dealt(clients: Sequence[int], costs: dict[int, float], number: int) -> list[tuple[int, ...]]:
    """`number` blocks of at most their mean size, rounded up, each of which costs about as much as any other.

    Each of `clients`, which come costliest first, joins the block that costs least so far and is not full.
    """
    most = math.ceil(len(clients) / number)
    blocks: list[list[int]] = [[] for _ in range(number)]
    heap = [(0.0, i) for i in range(number)]
    for client in clients:
        cost, i = heapq.heappop(heap)
        blocks[i].append(client)
        if len(blocks[i]) < most:
            heapq.heappush(heap, (cost + costs[client], i))
    return [tuple(block) for block in blocks]


def _least_load(costs: Sequence[float], workers: int) -> float:
    """A lower bound of the busiest worker's load, whatever goes where; costs (n,) descending.

    It is the mean load, or more: of the j * workers + 1 costliest clients j + 1 must share a worker, at best the
    cheapest of them.
    """
    of_first = np.concatenate([[0.0], np.cumsum(costs)])
    j = np.arange((len(costs) - 1) // workers + 1)
    together = of_first[j * workers + 1] - of_first[j * workers - j]
    # Sums of sums are rounded otherwise: those that may be the largest are added up alone.
    largest = j[together >= together.max() * (1 - 1e-9)].tolist()
    return max(sum(costs) / workers, *(sum(costs[i * workers - i : i * workers + 1]) for i in largest))


def assign(
    blocks: Sequence[tuple[int, ...]],
    costs: Sequence[float],
    workers: Sequence[int],
    members: int = 1,
    together: bool = False,
) -> list[Block]:
    """Give each block to a worker: the costliest first, each to the worker with the least to do (Graham 1969).

    workers: of those with as little to do the first gets it.
    members: the ranks of each worker, between which its blocks are divided likewise. Blocks of like cost follow each
    other, so the ranks of a worker, which gather layers together, are busy with like work at the same time.
    together: all ranks of a worker train each of its blocks; the member is the one that takes what it gives.
    """
    ranks = [[(turn, member) for member in range(members)] for turn in range(len(workers))]
    # Those that share their load, in a heap: their load, that of the one that has least to do, and who it is.
    sharing = ranks if together else [[one] for of_worker in ranks for one in of_worker]
    load = {one: 0.0 for of_worker in ranks for one in of_worker}
    heap = [(0.0, 0.0, some[0], some) for some in sorted(sharing)]
    placed = []
    for clients, cost in sorted(zip(blocks, costs, strict=True), key=lambda item: (-item[1], item[0])):
        _, _, (turn, member), some = heap[0]
        load[turn, member] += cost
        least = min(some, key=lambda one: (load[one], one))
        heapq.heapreplace(heap, (sum(load[one] for one in some), load[least], least, some))
        placed.append(Block(clients, workers[turn], cost, member))
    return placed


def client_costs(
    config: Config, population: Population, examples: Examples, clients: Sequence[int]
) -> dict[int, float]:
    """Tokens that each client sees in a round: its mean example times the rows of its local steps.

    All of them have examples.
    """
    if not clients:
        return {}
    indices = population.indices_of(clients)
    sizes = np.array([len(of_client) for of_client in indices])
    tokens = np.add.reduceat(examples.lengths_of(np.concatenate(indices)), np.cumsum(sizes) - sizes)
    rows_of = {size: num_steps(size, config.client) * examples_per_step(config.client) for size in set(sizes.tolist())}
    costs = tokens / sizes * np.array([rows_of[size] for size in sizes.tolist()])
    return dict(zip(clients, costs.tolist(), strict=True))
