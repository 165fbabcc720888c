"""A little is enough (ALIE, Baruch et al. 2019, arXiv 1902.06156, algorithm 3): within the spread of the honest."""

from __future__ import annotations

from pydantic import Field

from fedhpc.attacks.base import Attack, AttackContext
from fedhpc.lazy import Tensor
from fedhpc.registry import Section


class ALittleIsEnough(Attack):
    """All attackers send, in every coordinate, the honest mean and `z` standard deviations more."""

    class Options(Section):
        z: float = Field(1.5, gt=0, description="standard deviations; the more attackers, the more can hide")

    def sent(self, updates: Tensor, context: AttackContext) -> Tensor:
        z = float(self.options.z)
        vector = context.honest.everywhere(context.honest.by_coordinate(lambda values: shifted(values, z)))
        return vector.expand(len(updates), -1)


def shifted(values: Tensor, z: float) -> Tensor:
    """Mean and z times the standard deviation (with C - 1; 0 of one client) of every column: (C, n) -> (n,).

    Row after row, so that no bit depends on how many columns there are.
    """
    mean = values[0].clone()
    for row in values[1:]:
        mean += row
    mean /= len(values)
    square = (values[0] - mean) ** 2
    for row in values[1:]:
        square += (row - mean) ** 2
    return mean + z * (square / max(len(values) - 1, 1)).sqrt()
