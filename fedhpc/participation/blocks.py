"""Blocks: which clients train together in one forward, and which worker trains each block.

Blocks are formed from the whole cohort before they are given to workers, so what is computed does not depend on the
number of workers; only where it is computed does (but see `joined`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fedhpc.config import Config
from fedhpc.data.population import Population
from fedhpc.data.tokens import Examples
from fedhpc.participation.plan import Block
from fedhpc.training.schedule import examples_per_step, num_steps

_AUTO_BLOCK = {"cpu": 8, "cuda": 32}  # most clients in one forward with block_size auto
_UNEVEN = 1.1  # how much more than its least possible load the busiest worker may have
_AUTO_WORKERS = 8  # blocks are formed for this many workers, with at least two clients each where the cohort allows


def resolve_block_size(config: Config, size: int, device: str) -> int:
    """K, how many clients train in one forward.

    With runtime.block_size auto it follows from the size of the cohort and the type of device ("cpu" or "cuda") alone.
    """
    if config.runtime.block_size != "auto":
        return int(config.runtime.block_size)
    return max(min(2, size), min(_AUTO_BLOCK[device], math.ceil(size / _AUTO_WORKERS)))


def most_together(config: Config, block_size: int, device: str) -> int:
    """How many clients of one worker train in one forward at most.

    With block_size auto a GPU takes more than one block, since few clients do not fill it. There the same bits on any
    number of workers are promised with runtime.deterministic alone.
    """
    joins = device == "cuda" and config.runtime.block_size == "auto" and not config.runtime.deterministic
    return max(block_size, _AUTO_BLOCK[device]) if joins else block_size


def joined(blocks: Sequence[Block], most: int) -> list[Block]:
    """Join the blocks of one worker, in their order, to blocks of at most `most` clients."""
    together: list[Block] = []
    for block in blocks:
        last = together[-1] if together else None
        if last and len(last.clients) + len(block.clients) <= most:
            together[-1] = Block(last.clients + block.clients, block.worker, last.cost + block.cost)
        else:
            together.append(block)
    return together


def form_blocks(costs: dict[int, float], block_size: int) -> list[tuple[int, ...]]:
    """Put clients of like cost together, in blocks of at most `block_size`.

    At first the blocks differ by one client at most. They are then given to up to 8 workers on paper; while the busiest
    of these has more than 1.1 times what it must have, its costliest block is halved. How many workers a run really has
    plays no part, so its results do not depend on that. Example: costs 8, 8, 4, 4 and blocks of 2 give (0, 1), (2, 3);
    the first is twice as costly as the second, so it is halved.
    """
    clients = sorted(costs, key=lambda c: (-costs[c], c))
    if not clients:
        return []
    number = math.ceil(len(clients) / block_size)
    if number > _AUTO_WORKERS:  # as many for each of them
        number = min(len(clients), math.ceil(number / _AUTO_WORKERS) * _AUTO_WORKERS)
    blocks = [tuple(part.tolist()) for part in np.array_split(np.array(clients), number)]
    workers = range(min(_AUTO_WORKERS, len(blocks)))
    most = _UNEVEN * _least_load([costs[c] for c in clients], len(workers))
    while True:
        load = [0.0] * len(workers)
        placed = assign(blocks, [sum(costs[c] for c in block) for block in blocks], workers)
        for block in placed:
            load[block.worker] += block.cost
        busiest = load.index(max(load))
        halvable = [b for b in placed if b.worker == busiest and len(b.clients) > 1]
        if load[busiest] <= most or not halvable:
            return blocks
        large = max(halvable, key=lambda block: block.cost).clients
        at, half = blocks.index(large), len(large) // 2
        blocks[at : at + 1] = [large[:half], large[half:]]


def _least_load(costs: Sequence[float], workers: int) -> float:
    """A lower bound of the busiest worker's load, whatever goes where; costs (n,) descending.

    It is the mean load, or more: of the j * workers + 1 costliest clients j + 1 must share a worker, at best the
    cheapest of them.
    """
    together = [costs[j * workers - j : j * workers + 1] for j in range((len(costs) - 1) // workers + 1)]
    return max(sum(costs) / workers, *map(sum, together))


def assign(blocks: Sequence[tuple[int, ...]], costs: Sequence[float], workers: Sequence[int]) -> list[Block]:
    """Give each block to a worker: the costliest first, each to the worker with the least to do (Graham 1969)."""
    load = dict.fromkeys(workers, 0.0)
    placed = []
    for clients, cost in sorted(zip(blocks, costs, strict=True), key=lambda item: (-item[1], item[0])):
        worker = min(workers, key=lambda w: (load[w], w))
        load[worker] += cost
        placed.append(Block(clients, worker, cost))
    return placed


def client_cost(config: Config, population: Population, examples: Examples, client: int) -> float:
    """Tokens that a client sees in a round: its mean example times the rows of its local steps."""
    indices = population.indices(client)
    tokens = float(examples.lengths_of(indices).sum())
    rows = num_steps(len(indices), config.client) * examples_per_step(config.client)
    return tokens / len(indices) * rows
