"""Inner-product manipulation (IPM, Xie et al. 2020, arXiv 1903.03936, section 4): against the honest mean."""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedhpc.attacks.base import Attack, AttackContext
from fedhpc.lazy import Tensor
from fedhpc.registry import Section


class InnerProductManipulation(Attack):
    """All attackers send the mean of the honest updates times -`epsilon`."""

    class Options(Section):
        epsilon: float = Field(2.0, gt=0, description="how many times as long as the mean")

    def sent(self, updates: Tensor, context: AttackContext) -> Tensor:
        honest = context.honest
        mean = honest.everywhere(honest.weighted_sum(np.full(len(honest), 1 / len(honest))))
        return (-self.options.epsilon * mean).expand(len(updates), -1)
