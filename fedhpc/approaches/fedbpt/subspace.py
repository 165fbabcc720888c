"""Soft prompts in a random subspace: p(z) = p_0 + A z (Black-Box Tuning, Sun et al. 2022, arXiv 2201.03514, section 3).

A is normal, scaled so that p(z) - p_0 with z ~ N(0, sigma^2 I) spreads like the embeddings of words (BBTv2, Sun et al.
2022, arXiv 2205.11200, section 3.3): entries of deviation alpha * s / (sqrt(d) sigma), s being that of the embeddings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedhpc.approaches.scoring.likelihoods import Float64
from fedhpc.lazy import lazy
from fedhpc.models.base import Base
from fedhpc.rng import generator

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


@dataclass(frozen=True)
class Subspace:
    """The map from coordinates z (..., d) to soft prompts (..., n, D), computed in float64 on the CPU."""

    origin: Float64  # (n, D): p_0
    projection: Float64  # (d, n * D): the transpose of A

    def prompts(self, z: Float64) -> Tensor:
        """The soft prompts of z: float64 (..., n, D) on the CPU."""
        # Row by row: in a product of matrices, how a row is rounded may depend on the other rows.
        rows = [row @ self.projection for row in z.reshape(-1, z.shape[-1])]
        return torch.from_numpy(np.stack(rows).reshape(*z.shape[:-1], *self.origin.shape) + self.origin)


def subspace(base: Base, origin: Float64, dimension: int, sigma: float, alpha: float, seed: int) -> Subspace:
    """Draw the subspace through the soft prompt `origin` (n, D); the same for the same seed."""
    words = base.model.get_input_embeddings().weight.detach()
    deviation = alpha * float(words.double().std()) / (np.sqrt(dimension) * sigma)
    draws = generator(seed, "projection").standard_normal((dimension, origin.size))
    return Subspace(origin, draws * deviation)
