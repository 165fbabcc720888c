"""Synchronous rounds: every sampled client starts from the newest state, and the round waits for all of them (FedAvg,
McMahan et al. 2017, arXiv 1602.05629, algorithm 1)."""

from __future__ import annotations

from fedhpc.participation.blocks import assign, client_cost, form_blocks
from fedhpc.participation.plan import Plan
from fedhpc.participation.sampling import draw_cohort
from fedhpc.participation.schedules.base import Schedule


class Synchronous(Schedule):
    """One version of the server's state at a time."""

    def plan(self, round_: int) -> Plan:
        cohort, dropped = draw_cohort(self.config, self.population, round_)
        empty = frozenset(c for c in cohort if self.population.num_examples(c) == 0)
        costs = {
            c: client_cost(self.config, self.population, self.examples, c)
            for c in cohort
            if c not in dropped and c not in empty
        }
        blocks = form_blocks(costs, self.block_size)
        return Plan(
            round=round_,
            cohort=cohort,
            versions=(round_ - 1,) * len(cohort),
            dropped=dropped,
            empty=empty - dropped,
            blocks=tuple(assign(blocks, [sum(costs[c] for c in block) for block in blocks], self.workers)),
        )
