"""What an attack is: what the clients that attack send in place of their updates. For example:

class Opposite(Attack):
    def sent(self, updates, context):
        return -updates

Attackers train as all clients do, and know what the others of the round send: the strongest case, and the usual one
in the literature. What they send does not pass the transforms, which an attacker need not run.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedhpc import rng
from fedhpc.lazy import Tensor, torch
from fedhpc.registry import Open, Section

if TYPE_CHECKING:
    from fedhpc.updates.cohort import Cohort


@dataclass(frozen=True)
class AttackContext:
    """What attackers know of the round."""

    #: Number of the round, from 1.
    round: int

    #: The client of each row of the updates (a).
    clients: Sequence[int]

    #: The updates of the clients that do not attack; its verbs are collective.
    honest: Cohort

    #: Share of all attackers of the round in the weight of the accepted updates.
    share: float

    seed: int

    def generator(self, client: int) -> np.random.Generator:
        """A generator of a client's draws in this round, the same on any number of ranks and after a resume."""
        return rng.generator(self.seed, "attack", self.round, client)


class Attack:
    """Changes what attackers send (attack.name)."""

    #: The keys it adds to the section `attack`.
    Options: ClassVar[type[Section]] = Section

    #: Whether attackers train on other examples than they have, see `relabelled`.
    changes_examples: ClassVar[bool] = False

    #: Whether it asks what honest clients send (`AttackContext.honest`), which nobody knows where it is masked.
    sees_others: ClassVar[bool] = True

    def __init__(self, options: Open) -> None:
        """options: the section `attack` of the configuration."""
        self.options = options

    @property
    def trigger(self) -> str:
        """The text in front of the prompts of changed examples."""
        return ""

    def goal(self, names: Sequence[str]) -> int | None:
        """The class that an example with the trigger is to get, of those with these names; None: there is no such."""
        return None

    def relabelled(self, labels: np.ndarray, names: Sequence[str], draws: np.random.Generator) -> np.ndarray:
        """The classes, int64 (n,), that an attacker's examples of these classes get; -1 where one stays as it is."""
        raise NotImplementedError

    def sent(self, updates: Tensor, context: AttackContext) -> Tensor:
        """What this rank's attackers send in place of their updates (a, S), of the same shape. Collective.

        Every rank calls it, also one without attackers, in rounds that have an attacker and another client.
        """
        return updates


def attackers(fraction: float, num_clients: int, seed: int) -> np.ndarray:
    """Which clients of the population attack: int64, ascending."""
    count = round(fraction * num_clients)
    chosen: np.ndarray = np.sort(rng.generator(seed, "attackers").choice(num_clients, count, replace=False))
    return chosen


def attacked(attack: Attack, cohort: Cohort, who: Collection[int], round_: int, seed: int) -> Tensor:
    """What this rank's clients send once attackers have had their way, (c, S) as `cohort.mine`. Collective.

    who: the attackers. Without honest clients in the round there is nothing to attack.
    """
    wrong = np.isin(cohort.clients, list(who))
    if not wrong.any() or wrong.all():
        return cohort.mine
    theirs = cohort.selected(wrong)
    share = float(theirs.shares.sum() / cohort.shares.sum())
    context = AttackContext(round_, theirs.my_clients, cohort.selected(~wrong), share, seed)
    sent = attack.sent(theirs.mine, context)
    updates = cohort.mine.clone()
    updates[torch.from_numpy(np.isin(cohort.my_clients, list(who)))] = sent.to(updates.dtype)
    return updates
