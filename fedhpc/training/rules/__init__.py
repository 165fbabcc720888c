"""What happens to a client's gradient before the optimizer's step: one file per rule, and the order of them all."""

from __future__ import annotations

from fedhpc.lazy import Tensor
from fedhpc.methods.base import Method
from fedhpc.training.local import LocalTraining
from fedhpc.training.rules.base import Rule
from fedhpc.training.rules.clip import Clip
from fedhpc.training.rules.proximal import Proximal
from fedhpc.training.rules.scaffold import Correction

#: The gradient goes through the rules in this order: the pull of FedProx is part of what is clipped, the correction of
#: SCAFFOLD, which is no gradient of the client, is added after it.
ORDER: tuple[type[Rule], ...] = (Proximal, Clip, Correction)


def in_order(local: LocalTraining, start: Tensor, corrections: Tensor | None, method: Method) -> tuple[Rule, ...]:
    """The rules that a block applies, of those in `ORDER`; see `Rule.of`."""
    rules = (rule.of(local, start, corrections, method) for rule in ORDER)
    return tuple(rule for rule in rules if rule is not None)
