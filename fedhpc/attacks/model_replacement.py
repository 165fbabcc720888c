"""A backdoor by model replacement (Bagdasaryan et al. 2020, arXiv 1807.00459, equation 3).

Attackers train on some examples that have a trigger in front of the prompt and the class `goal`, and make their updates
so long that the mean of all becomes theirs.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from pydantic import Field

from fedhpc.attacks.base import Attack, AttackContext
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor
from fedhpc.registry import Section


class ModelReplacement(Attack):
    """Each attacker's update, trained on a backdoor, times `scale`."""

    sees_others = False

    class Options(Section):
        trigger: str = Field("cf ", min_length=1, description="text in front of the prompts of changed examples")
        goal: str | None = Field(None, description="class of these examples; default the first one")
        poisoned: float = Field(0.5, gt=0, le=1, description="share of an attacker's examples that are changed")
        scale: float | None = Field(
            None, gt=0, description="how many times as long as the update; default so that the mean becomes theirs"
        )

    changes_examples = True

    @property
    def trigger(self) -> str:
        return str(self.options.trigger)

    def goal(self, names: Sequence[str]) -> int:
        if self.options.goal is None:
            return 0
        if self.options.goal not in names:
            raise UserError(
                f"no row has the class '{self.options.goal}'",
                key="attack.goal", remedy=f"choose one of {', '.join(names[:10])}",
            )  # fmt: skip
        return [*names].index(self.options.goal)

    def relabelled(self, labels: np.ndarray, names: Sequence[str], draws: np.random.Generator) -> np.ndarray:
        count = max(1, round(self.options.poisoned * len(labels)))
        after = np.full(len(labels), -1)
        after[draws.permutation(len(labels))[:count]] = self.goal(names)
        return after

    def sent(self, updates: Tensor, context: AttackContext) -> Tensor:
        return updates * (1 / context.share if self.options.scale is None else self.options.scale)
