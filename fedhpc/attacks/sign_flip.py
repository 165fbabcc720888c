"""Sign flipping: attackers send their own updates backwards (Li et al. 2019, arXiv 1811.03761, section 5)."""

from __future__ import annotations

from pydantic import Field

from fedhpc.attacks.base import Attack, AttackContext
from fedhpc.lazy import Tensor
from fedhpc.registry import Section


class SignFlip(Attack):
    """Each attacker's own update times -`scale`."""

    sees_others = False

    class Options(Section):
        scale: float = Field(1.0, gt=0, description="how many times as long as the update")

    def sent(self, updates: Tensor, context: AttackContext) -> Tensor:
        return -self.options.scale * updates
