"""Synchronous rounds: every sampled client starts from the newest state, and the round waits for all of them (FedAvg,
McMahan et al. 2017, arXiv 1602.05629, algorithm 1).

With devices that take time more clients can be sampled than are needed, and a deadline ends the wait: the first to
arrive are taken, stragglers are cut off (Bonawitz et al. 2019, arXiv 1902.01046, sections 2.2 and 9).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from fedhpc.errors import UserError
from fedhpc.participation.plan import Plan, Times
from fedhpc.participation.sampling import cohort_size, draw_by_poisson, draw_clients, drops_out, fixed_clients
from fedhpc.participation.schedules.base import Schedule
from fedhpc.registry import Section

if TYPE_CHECKING:
    from fedhpc.config import Config


class Synchronous(Schedule):
    """One version of the server's state at a time."""

    class Options(Section):
        over_selection: float = Field(
            1.0, ge=1, description="clients sampled, as a multiple of the cohort size: the first to arrive are taken"
        )
        deadline_s: float | None = Field(
            None, gt=0, description="virtual seconds after which a round takes no more updates"
        )

        def conflict(self, config: Config) -> str | None:
            key = "over_selection" if self.over_selection > 1 else "deadline_s" if self.deadline_s is not None else None
            if key is not None and config.devices.name == "none":
                return (
                    f"federation.schedule.{key} is of clients that are late, and with devices.name none nobody is: "
                    "choose devices, such as lognormal"
                )
            return None

    def plan(self, round_: int) -> Plan:
        if self.config.mode != "federated":
            cohort, dropped = fixed_clients(self.config, self.population), frozenset[int]()
        else:
            if getattr(self.config.privacy, "sampling", "fixed") == "poisson":
                cohort = draw_by_poisson(self.config, self.population, round_, self._wanted)
            else:
                cohort = draw_clients(self.config, self.population, self.devices, (round_,), self.sampled)
            dropped = frozenset(c for c in cohort if drops_out(self.config, round_, c))
        empty = self.empty(cohort) - dropped
        reporting = [c for c in cohort if c not in dropped and c not in empty]
        late, times = frozenset[int](), None
        if self.devices.takes_time:
            seconds = {c: self.seconds(c, round_ - 1) for c in cohort}
            in_time, end = self._first(reporting, seconds)
            late = frozenset(reporting) - frozenset(in_time)
            reporting, times = in_time, Times(end, tuple(seconds.values()))
        return Plan(
            round=round_,
            cohort=cohort,
            versions=(round_ - 1,) * len(cohort),
            dropped=dropped,
            empty=empty,
            blocks=self.blocks(reporting),
            late=late,
            times=times,
        )

    @property
    def _wanted(self) -> int:
        """Updates that a round waits for."""
        return cohort_size(self.config, self.population)

    @property
    def sampled(self) -> int:
        """Clients that a round samples. UserError where there are fewer."""
        sampled = math.ceil(round(self._wanted * self.config.federation.schedule.over_selection, 9))
        if sampled > self.population.num_clients:
            raise UserError(
                f"a cohort of {self._wanted} times {self.config.federation.schedule.over_selection} are {sampled} "
                f"clients, and the population has {self.population.num_clients}",
                key="federation.schedule.over_selection",
                remedy="lower it, or federation.cohort_size",
            )
        return sampled

    def _first(self, reporting: list[int], seconds: Mapping[int, float]) -> tuple[list[int], float]:
        """The clients whose updates are taken, in sampling order, and when the round ends.

        It ends with the last update that is wanted, else at its deadline. Without one it waits for all that report.
        """
        deadline = self.config.federation.schedule.deadline_s or math.inf
        arrived = sorted((c for c in reporting if seconds[c] <= deadline), key=lambda c: seconds[c])
        taken = arrived[: self._wanted]
        last = max((seconds[c] for c in taken), default=0.0)
        end = last if len(taken) == self._wanted or math.isinf(deadline) else deadline
        return [c for c in reporting if c in set(taken)], end
