"""How many clients and rounds there are, and which clients a round samples.

Draws are keyed by seed, round and client alone, so every rank draws the same.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from itertools import islice

import numpy as np

from fedhpc import registry
from fedhpc.config import Config
from fedhpc.data.population import Population
from fedhpc.errors import UserError
from fedhpc.participation.devices.base import Devices
from fedhpc.rng import generator

COHORT_SIZE = 10  # where neither federation.cohort_size nor cohort_fraction is given, if there are as many clients


def cohort_size(config: Config, population: Population) -> int:
    """Clients whose updates make a round: those that are sampled, unless the schedule samples more for the case that
    some are late. UserError where the population is smaller than that."""
    n = population.num_clients
    if config.mode != "federated":
        return min(n, config.local.max_clients)
    if config.federation.cohort_fraction is not None:
        return max(1, round(config.federation.cohort_fraction * n))
    size = config.federation.cohort_size
    if size is None:
        schedule = registry.choice("schedules", config.federation.schedule.name)
        return min(n, schedule.buffer_size(config) or COHORT_SIZE)
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
    size = fraction * n if fraction is not None else min(config.federation.cohort_size or COHORT_SIZE, n)
    return max(1, round(config.federation.rounds * size / n))


def draw_clients(
    config: Config,
    population: Population,
    devices: Devices,
    keys: tuple[int, ...],
    count: int,
    excluded: Collection[int] = (),
) -> tuple[int, ...]:
    """`count` clients that can be asked, in sampling order; fewer where there are fewer.

    Clients that are not available are passed over. keys: of the draw, the round first. Costs nothing per client of the
    population.
    """
    draws = generator(config.run.seed, "cohort", *keys)
    least = devices.lowest_availability
    asked = count if least >= 1 else math.ceil(4 * count / least) + 16  # enough but for a rare draw
    chosen = draws.choice(population.num_clients, min(asked + len(excluded), population.num_clients), replace=False)
    free = (c for c in chosen.tolist() if c not in excluded and (least >= 1 or devices.is_available(c, *keys)))
    return tuple(islice(free, count))


def draw_by_poisson(config: Config, population: Population, round_: int, expected: int) -> tuple[int, ...]:
    """The clients of a round into which each is drawn on its own, in sampling order; `expected` of them on average.

    With privacy.bands b only every b-th client can be, another b-th in the next round. A binomial number of clients,
    and any of them in that number, is the same as a draw for each, and costs nothing per client of the population.
    """
    n, bands = population.num_clients, config.privacy.bands
    first = (round_ - 1) % bands
    members = len(range(first, n, bands))
    keys = (round_,)  # as `draw_clients` has them
    draws = generator(config.run.seed, "cohort", *keys)
    size = draws.binomial(members, expected * bands / n)
    return tuple(first + bands * int(member) for member in draws.choice(members, size, replace=False))


def drops_out(config: Config, round_: int, client: int) -> bool:
    """Whether a client that was asked in a round does not report back."""
    dropout = config.federation.dropout
    return bool(dropout and generator(config.run.seed, "dropout", round_, client).random() < dropout)


def fixed_clients(config: Config, population: Population) -> tuple[int, ...]:
    """The clients of every round of modes centralized and local, in ascending order."""
    size = cohort_size(config, population)
    clients = np.sort(generator(config.run.seed, "local clients").choice(population.num_clients, size, replace=False))
    return tuple(int(c) for c in clients)
