"""Gaussian noise in place of an update (Blanchard et al. 2017, arXiv 1703.02757, section 6)."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedhpc.attacks.base import Attack, AttackContext
from fedhpc.lazy import Tensor, torch
from fedhpc.registry import Section


class Gaussian(Attack):
    """Normal numbers of mean 0, drawn anew for each attacker and round."""

    sees_others = False

    class Options(Section):
        std: float = Field(1.0, gt=0, description="standard deviation of every number")

    def sent(self, updates: Tensor, context: AttackContext) -> Tensor:
        size = updates.shape[1]
        noise = [context.generator(client).normal(scale=self.options.std, size=size) for client in context.clients]
        return torch.from_numpy(np.array(noise).reshape(-1, size))
