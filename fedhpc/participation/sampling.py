"""How many clients and rounds there are, and which clients a round samples.

Draws are keyed by seed, round and client alone, so every rank draws the same.
"""

from __future__ import annotations

import numpy as np

from fedhpc.config import Config
from fedhpc.data.population import Population
from fedhpc.errors import UserError
from fedhpc.rng import generator

COHORT_SIZE = 10  # where neither federation.cohort_size nor cohort_fraction is given, if there are as many clients


def cohort_size(config: Config, population: Population) -> int:
    """Clients sampled per round. UserError where the population is smaller than that."""
    n = population.num_clients
    if config.mode != "federated":
        return min(n, config.local.max_clients)
    if config.federation.cohort_fraction is not None:
        return max(1, round(config.federation.cohort_fraction * n))
    size = config.federation.cohort_size
    if size is None:
        return min(n, COHORT_SIZE)
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


def draw_cohort(config: Config, population: Population, round_: int) -> tuple[tuple[int, ...], frozenset[int]]:
    """The clients of a round in sampling order, and those of them that drop out.

    Every round of modes centralized and local has the same clients, in ascending order.
    """
    size, seed = cohort_size(config, population), config.run.seed
    if config.mode != "federated":
        cohort = np.sort(generator(seed, "local clients").choice(population.num_clients, size, replace=False))
        return tuple(int(c) for c in cohort), frozenset()
    cohort = generator(seed, "cohort", round_).choice(population.num_clients, size, replace=False)
    dropout = config.federation.dropout
    drops = {int(c) for c in cohort if dropout and generator(seed, "dropout", round_, int(c)).random() < dropout}
    return tuple(int(c) for c in cohort), frozenset(drops)
