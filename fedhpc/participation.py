"""The plan of a round: who is sampled, who drops out, which clients train together, and where.

`plan_round` is a pure function of the configuration, the population and the round, so every rank computes the same
plan alone and no command messages are needed. Blocks are formed from the whole cohort before they are placed, so what
is computed does not depend on the number of workers; only where it is computed does (but see `joined`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedhpc.config import Config
from fedhpc.data.population import Population
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.rng import generator
from fedhpc.training.schedule import num_steps

_AUTO_BLOCK = {"cpu": 8, "cuda": 32}  # most clients in one forward with block_size auto
_UNEVEN = 1.1  # the busiest worker has at most so many times what it must have, whole clients given
_AUTO_WORKERS = 8  # with block_size auto there are blocks for so many workers, two clients each or more


@dataclass(frozen=True)
class Block:
    """Clients that train in one forward, and the rank that trains them."""

    clients: tuple[int, ...]
    worker: int
    cost: float  # tokens it will see


@dataclass(frozen=True)
class Plan:
    """One round. `cohort` is in sampling order; a client is in a block unless it drops out or has no data."""

    round: int
    cohort: tuple[int, ...]
    dropped: frozenset[int]
    empty: frozenset[int]
    blocks: tuple[Block, ...]

    @property
    def training(self) -> tuple[int, ...]:
        """Clients that train, in cohort order."""
        return tuple(c for c in self.cohort if c not in self.dropped and c not in self.empty)


def cohort_size(config: Config, population: Population) -> int:
    """Clients sampled per round. UserError where the population is smaller than that."""
    n = population.num_clients
    if config.mode != "federated":
        return min(n, config.local.max_clients)
    if config.federation.cohort_fraction is not None:
        return max(1, round(config.federation.cohort_fraction * n))
    size = int(config.federation.cohort_size or 0)
    if size > n:
        raise UserError(
            f"federation.cohort_size is {size} but the population has {n} clients: lower it or raise the number of "
            "clients (partition)"
        )
    return size


def num_rounds(config: Config, population: Population) -> int:
    """Rounds of the run. A local run has as many as a client expects to be sampled for in the federation."""
    if config.mode != "local":
        return config.federation.rounds
    n = population.num_clients
    fraction = config.federation.cohort_fraction
    size = fraction * n if fraction is not None else min(int(config.federation.cohort_size or 0), n)
    return max(1, round(config.federation.rounds * size / n))


def plan_round(
    config: Config,
    population: Population,
    examples: Examples,
    round_: int,
    workers: Sequence[int],
    block_size: int,
) -> Plan:
    """The plan of round `round_` (from 1) for the ranks `workers`."""
    size, seed = cohort_size(config, population), config.run.seed
    if config.mode == "federated":
        cohort = generator(seed, "cohort", round_).choice(population.num_clients, size, replace=False)
        drop = config.federation.dropout
        dropped = {int(c) for c in cohort if drop and generator(seed, "dropout", round_, int(c)).random() < drop}
    else:
        cohort = np.sort(generator(seed, "local clients").choice(population.num_clients, size, replace=False))
        dropped = set()
    sizes = {int(c): population.num_examples(int(c)) for c in cohort}
    empty = {c for c, n in sizes.items() if n == 0}
    costs = {c: _cost(config, population, examples, c) for c in sizes if c not in dropped and c not in empty}
    blocks = form_blocks(costs, block_size)
    return Plan(
        round=round_,
        cohort=tuple(sizes),
        dropped=frozenset(dropped),
        empty=frozenset(empty - dropped),
        blocks=tuple(place(blocks, [sum(costs[c] for c in b) for b in blocks], workers)),
    )


def resolve_block_size(config: Config, size: int, device: str) -> int:
    """K: from the configuration, or with auto from the size of the cohort and the kind of device alone."""
    if config.runtime.block_size != "auto":
        return int(config.runtime.block_size)
    return max(min(2, size), min(_AUTO_BLOCK[device], math.ceil(size / _AUTO_WORKERS)))


def most_together(config: Config, block_size: int, device: str) -> int:
    """Clients of one worker that train in one forward at most.

    With auto a GPU takes more than one block: few clients do not fill it, and there the same bits on any number of
    workers are promised with runtime.deterministic alone.
    """
    joins = device == "cuda" and config.runtime.block_size == "auto" and not config.runtime.deterministic
    return max(block_size, _AUTO_BLOCK[device]) if joins else block_size


def joined(blocks: Sequence[Block], most: int) -> list[Block]:
    """The blocks of one worker put together, as they come, to at most `most` clients each."""
    together: list[Block] = []
    for block in blocks:
        last = together[-1] if together else None
        if last and len(last.clients) + len(block.clients) <= most:
            together[-1] = Block(last.clients + block.clients, block.worker, last.cost + block.cost)
        else:
            together.append(block)
    return together


def form_blocks(costs: dict[int, float], block_size: int) -> list[tuple[int, ...]]:
    """Clients of like cost together, in blocks of at most `block_size`, which differ by one client at most at first.

    Where the busiest of as many workers as there are blocks, but of no more than 8, would keep all others waiting for
    longer than it must, its costliest block is halved, and so on. The workers that there are have no say in it.
    """
    clients = sorted(costs, key=lambda c: (-costs[c], c))
    if not clients:
        return []
    number = math.ceil(len(clients) / block_size)
    if number > _AUTO_WORKERS:  # as many for each of them
        number = min(len(clients), math.ceil(number / _AUTO_WORKERS) * _AUTO_WORKERS)
    blocks = [tuple(part.tolist()) for part in np.array_split(np.array(clients), number)]
    workers = range(min(_AUTO_WORKERS, len(blocks)))
    most = _UNEVEN * _least([costs[c] for c in clients], len(workers))
    while True:
        load = [0.0] * len(workers)
        placed = place(blocks, [sum(costs[c] for c in block) for block in blocks], workers)
        for block in placed:
            load[block.worker] += block.cost
        busiest = load.index(max(load))
        halvable = [b for b in placed if b.worker == busiest and len(b.clients) > 1]
        if load[busiest] <= most or not halvable:
            return blocks
        large = max(halvable, key=lambda block: block.cost).clients
        at, half = blocks.index(large), len(large) // 2
        blocks[at : at + 1] = [large[:half], large[half:]]


def _least(costs: Sequence[float], workers: int) -> float:
    """What the busiest worker has at least: the mean, or of any costs, descending, those that must share a worker."""
    together = [costs[j * workers - j : j * workers + 1] for j in range((len(costs) - 1) // workers + 1)]
    return max(sum(costs) / workers, *map(sum, together))


def place(blocks: Sequence[tuple[int, ...]], costs: Sequence[float], workers: Sequence[int]) -> list[Block]:
    """Longest first, each to the worker that has least to do (Graham 1969)."""
    load = dict.fromkeys(workers, 0.0)
    placed = []
    for clients, cost in sorted(zip(blocks, costs, strict=True), key=lambda item: (-item[1], item[0])):
        worker = min(workers, key=lambda w: (load[w], w))
        load[worker] += cost
        placed.append(Block(clients, worker, cost))
    return placed


def _cost(config: Config, population: Population, examples: Examples, client: int) -> float:
    """Tokens that the client sees in the round."""
    indices = population.indices(client)
    tokens = float((examples.offsets[indices + 1] - examples.offsets[indices]).sum())
    rows = num_steps(len(indices), config.client) * config.client.batch_size
    return tokens / len(indices) * rows
