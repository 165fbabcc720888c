"""What a client does in a round: which examples are in which step, and the learning rate of each step.

A client's step s is slice s of its seeded permutation; every epoch has a permutation of its own. Nothing here
depends on blocks, workers or the order in which clients train.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from fedhpc.rng import generator


def num_steps(num_examples: int, client: Any) -> int:
    """Local steps of a client in one round, under client.steps or client.epochs."""
    if num_examples == 0:
        return 0
    if client.steps is not None:
        return int(client.steps)
    return int(client.epochs) * math.ceil(num_examples / client.batch_size)


def batches(num_examples: int, client: Any, seed: int, round_: int, client_id: int) -> list[np.ndarray]:
    """Positions (into the client's examples) of every local step of the round."""
    per_epoch = math.ceil(num_examples / client.batch_size)
    steps = []
    for epoch in range(math.ceil(num_steps(num_examples, client) / per_epoch)):
        order = generator(seed, "batches", round_, client_id, epoch).permutation(num_examples)
        steps += [order[s * client.batch_size : (s + 1) * client.batch_size] for s in range(per_epoch)]
    return steps[: num_steps(num_examples, client)]


def learning_rate(client: Any, progress: float) -> float:
    """The client learning rate when the share `progress` (0 to 1) of the whole run is done."""
    if progress < client.warmup:
        return float(client.lr * progress / client.warmup)
    left = (progress - client.warmup) / (1 - client.warmup)
    if client.schedule == "linear":
        return float(client.lr * (1 - left))
    if client.schedule == "cosine":
        return float(client.lr * 0.5 * (1 + math.cos(math.pi * left)))
    return float(client.lr)


def learning_rates(client: Any, round_: int, rounds: int, steps: int) -> list[float]:
    """The learning rate of each of the `steps` of a client in round `round_` (from 1) of `rounds`."""
    return [learning_rate(client, (round_ - 1 + s / steps) / rounds) for s in range(steps)]
