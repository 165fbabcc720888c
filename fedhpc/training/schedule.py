"""What a client does in a round: which examples are in which step, and the learning rate of each step.

A client's step s is slice s of its seeded permutation; every epoch has a permutation of its own. Nothing here
depends on blocks, workers or the order in which clients train.
"""

from __future__ import annotations

import math
from typing import Literal, Protocol

import numpy as np

from fedhpc.rng import generator


class Pace(Protocol):
    """How far and how fast a client goes: the section `client` of the configuration, or a LocalTraining."""

    @property
    def batch_size(self) -> int:
        """Examples per batch."""

    @property
    def gradient_accumulation_steps(self) -> int:
        """Batches per step."""

    @property
    def epochs(self) -> int | None:
        """Passes over the client's data in a round."""

    @property
    def steps(self) -> int | None:
        """Steps in a round, whatever the client's data; instead of `epochs`."""

    @property
    def lr(self) -> float:
        """The learning rate, where the schedule is at its highest."""

    @property
    def schedule(self) -> Literal["constant", "linear", "cosine"]:
        """How the learning rate goes down over the whole run."""

    @property
    def schedule_per(self) -> Literal["step", "round"]:
        """When it changes."""

    @property
    def lr_min(self) -> float:
        """The learning rate with which the schedule ends."""

    @property
    def warmup(self) -> float:
        """Share of the whole run in which it rises from 0."""


def examples_per_step(pace: Pace) -> int:
    """How many examples a local step is on."""
    return pace.batch_size * pace.gradient_accumulation_steps


def num_steps(num_examples: int, pace: Pace) -> int:
    """How many steps a client with `num_examples` examples takes in one round."""
    if num_examples == 0:
        return 0
    if pace.steps is not None:
        return pace.steps
    assert pace.epochs is not None  # the configuration gives one of the two
    return pace.epochs * math.ceil(num_examples / examples_per_step(pace))


def batches(num_examples: int, pace: Pace, seed: int, round_: int, client_id: int) -> list[np.ndarray]:
    """Which of its examples a client takes in each step of the round: indices (int64) below `num_examples`."""
    size, count = examples_per_step(pace), num_steps(num_examples, pace)
    per_epoch = math.ceil(num_examples / size)
    steps: list[np.ndarray] = []
    for epoch in range(math.ceil(count / per_epoch) if count else 0):
        order = generator(seed, "batches", round_, client_id, epoch).permutation(num_examples)
        steps += [order[s * size : (s + 1) * size] for s in range(per_epoch)]
    return steps[:count]


def sampling_rate(num_examples: int, pace: Pace) -> float:
    """q, the probability with which a step takes each of a client's examples where batches are drawn by Poisson."""
    return min(1.0, examples_per_step(pace) / num_examples)


def poisson_batches(num_examples: int, pace: Pace, seed: int, round_: int, client_id: int) -> list[np.ndarray]:
    """`batches` of which each example is part or not by a draw of its own: of varying size, and some are empty.

    There are as many steps as of other batches, and q num_examples examples in a step on average.
    """
    count = num_steps(num_examples, pace)
    if not count:
        return []
    rate = sampling_rate(num_examples, pace)
    return [
        np.flatnonzero(generator(seed, "poisson batches", round_, client_id, step).random(num_examples) < rate)
        for step in range(count)
    ]


def learning_rate(pace: Pace, progress: float) -> float:
    """The client learning rate when the share `progress` (0 to 1) of the whole run is done.

    Behind the warm-up a cosine is that of SGDR without restarts (Loshchilov and Hutter 2017, arXiv 1608.03983,
    equation 5).
    """
    if progress < pace.warmup:
        return float(pace.lr * progress / pace.warmup)
    after_warmup = (progress - pace.warmup) / (1 - pace.warmup)
    if pace.schedule == "constant":
        return float(pace.lr)
    left = 1 - after_warmup if pace.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * after_warmup))
    return float(pace.lr_min + (pace.lr - pace.lr_min) * left)


def learning_rates(pace: Pace, round_: int, rounds: int, steps: int) -> list[float]:
    """The learning rate of each of the `steps` of a client in round `round_` (from 1) of `rounds`."""
    if pace.schedule_per == "round":
        return [learning_rate(pace, (round_ - 1) / rounds)] * steps
    return [learning_rate(pace, (round_ - 1 + s / steps) / rounds) for s in range(steps)]
