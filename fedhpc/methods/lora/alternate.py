"""`aggregation: alternate`: odd rounds train B and even ones A, each from the mean of the round before.

RoLoRA (Chen et al. 2025, arXiv 2502.01755). The factor that rests is the same for all clients, so the mean of the
B_i A, or of the B A_i, is the product of the means. Clients send the factor of the round; both go down, since a client
may have missed rounds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedhpc.methods.lora.average import Average, needs_plain_mean
from fedhpc.methods.lora.factors import name_a, name_b
from fedhpc.methods.lora.part import Part


class Alternate(Average):
    """A and B are exchanged, and trained in turn."""

    def in_round(self, round_: int) -> Sequence[Average]:
        # B comes first: it is zero at first, and as long as it is A has no gradient.
        name = name_b if round_ % 2 else name_a
        return [Part(self, [name(path) for path in self.factors.widths])]

    @classmethod
    def conflict(cls, options: Any, config: Any) -> str | None:
        if config.client.scaffold:
            return "method.aggregation alternate trains one factor a round, and client.scaffold corrects both: use ffa"
        if config.personalization.parts or config.personalization.finetune_steps:
            return (
                "method.aggregation alternate trains one factor a round, which personalization does not know: use "
                "average or ffa"
            )
        return needs_plain_mean(options, config)
