"""DP-SGD: the gradient of every single example is clipped, and noise is added to their sum.

Abadi et al. 2016 (arXiv 1607.00133), algorithm 1. In a step a client takes each of its n examples with probability
q = B / n (`fedhpc.training.schedule.poisson_batches`); with g_j the gradient of the mean loss of example j alone, the
step's gradient is

    (sum_j min(1, C / |g_j|) g_j + sigma C z) / (q n),    z standard normal.

The g_j come from the block itself: every example of a forward has a row of parameters of its own, as every client has,
so one backward pass gives (E, T) gradients. E examples of a forward, K clients of a block, T trained numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fedhpc.lazy import Tensor, kernels
from fedhpc.rng import generator


@dataclass(frozen=True)
class ExamplePrivacy:
    """How far one example can move a step, and the noise that hides it."""

    clip_norm: float  # C
    noise_multiplier: float  # sigma

    def add_clipped(self, gradient: Tensor, of_examples: Tensor, owners: Tensor) -> None:
        """Add the gradients of examples (E, T), clipped, to those of their clients (K, T), in place.

        owners: int64 (E,), the client of each example. `of_examples` is changed.
        """
        # A gradient that is not finite has no norm to clip it by: without it, no example adds more than C.
        of_examples.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
        bound = self.clip_norm * (1 - kernels.clip_margin(of_examples.dtype))
        scales = (bound / kernels.row_norms(of_examples)).clamp(max=1.0)
        gradient.index_add_(0, owners, of_examples.mul_(scales.to(of_examples.dtype)))

    def add_noise(self, gradient: Tensor, seed: int, rounds: Sequence[int], step: int, clients: Sequence[int]) -> None:
        """Add the noise of a step to the sums (K, T) of `clients`, in place: the same numbers on any device.

        rounds: whose draws each client has.
        """
        if not self.noise_multiplier:
            return
        draws = [
            generator(seed, "example noise", round_, client, step).standard_normal(gradient.shape[1])
            for round_, client in zip(rounds, clients, strict=True)
        ]
        noise = kernels.on_device(np.stack(draws), gradient.device, gradient.dtype)
        gradient.add_(noise, alpha=self.noise_multiplier * self.clip_norm)
