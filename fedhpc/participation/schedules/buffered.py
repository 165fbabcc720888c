"""Buffered rounds: clients train all the time, and the server steps whenever enough updates have arrived.

FedBuff (Nguyen et al. 2022, arXiv 2106.06639, algorithm 1): of `concurrency` clients at work, each from the state that
was the newest when it was asked, the server adds up the updates as they arrive, and after `buffer_size` of them takes a
step. An update for which s steps were taken while its client was at work counts (1 + s)^-a; the paper has a = 1/2.

FedAsync (Xie et al. 2019, arXiv 1903.03934, algorithm 1) is a buffer of 1 with `contribution: model`: theta becomes
(1 - alpha) theta + alpha theta_i with alpha = lr (1 + s)^-a, lr that of the server; its mu is client.proximal.

When clients arrive follows from their devices alone, so a plan is a pure function of the round: it is found by letting
the virtual clock run from the start. An update is computed in the round that uses it, together with the others of its
buffer, so blocks are as full as in synchronous rounds.
"""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING, Literal, NamedTuple

from pydantic import Field

from fedhpc import registry
from fedhpc.errors import UserError
from fedhpc.participation.plan import Plan, Times
from fedhpc.participation.sampling import draw_clients, drops_out
from fedhpc.participation.schedules.base import Schedule
from fedhpc.registry import Section

if TYPE_CHECKING:
    from fedhpc.config import Config

_KEY = "federation.schedule"


class _Job(NamedTuple):
    """A client at work; jobs are in the order in which they end."""

    end: float  # virtual seconds since the run began
    number: int  # jobs that were started before it
    client: int
    version: int
    seconds: float


class Buffered(Schedule):
    """Clients that start from several versions of the server's state in one round."""

    class Options(Section):
        concurrency: int = Field(20, ge=1, description="clients at work at any time")
        buffer_size: int = Field(10, ge=1, description="updates that make a round; 1: asynchronous")
        staleness_exponent: float = Field(
            0.5, ge=0, description="a: an update that is s server steps behind counts (1 + s)^-a"
        )
        contribution: Literal["update", "model"] = Field(
            "update",
            description="what pulls the server's state: the client's update (FedBuff), or the model that it arrived at "
            "(FedAsync)",
        )

        def conflict(self, config: Config) -> str | None:
            federation = config.federation
            if config.mode != "federated":
                return f"in mode {config.mode} nobody waits for anybody: give {_KEY}.name synchronous"
            if config.devices.name == "none":
                return "buffered needs devices, which say who arrives when: give devices.name, such as lognormal"
            if self.buffer_size > self.concurrency:
                return (
                    f"{_KEY}.buffer_size {self.buffer_size} is more than {_KEY}.concurrency {self.concurrency}, the "
                    "clients that are at work: give at most as many"
                )
            for key in ("cohort_size", "cohort_fraction"):
                if getattr(federation, key) is not None:
                    return (
                        f"{_KEY}.buffer_size says how many updates a round has: take federation.{key} out or give null"
                    )
            if registry.is_approach(config.method.name):
                return f"buffered adds up updates of parameters, which method.name {config.method.name} does not send"
            if config.beside_theta:
                return (
                    f"{config.beside_theta[0]} is of the one state that all clients of a round start from, and "
                    "buffered ones start from several: give one of the two"
                )
            return None

    _clock: _Clock | None = None

    @classmethod
    def buffer_size(cls, config: Config) -> int | None:
        return int(config.federation.schedule.buffer_size)

    def plan(self, round_: int) -> Plan:
        clients, wanted = self.population.num_clients, self.config.federation.schedule.concurrency
        if wanted > clients:
            raise UserError(
                f"concurrency is {wanted}, and the population has {clients} clients",
                key=f"{_KEY}.concurrency",
                remedy="lower it, or raise the number of clients (partition)",
            )
        if self._clock is None or round_ < self._clock.round:
            self._clock = _Clock(self)
        while self._clock.round < round_:
            self._clock.advance()
        return self._clock.plan


class _Clock:
    """The virtual clock of a run, which goes from step to step of the server."""

    def __init__(self, schedule: Buffered) -> None:
        self._schedule, self._options = schedule, schedule.config.federation.schedule
        #: Steps that the server has taken.
        self.round = 0
        #: The plan of the round that ended with the last of them.
        self.plan: Plan
        self._now, self._started = 0.0, 0
        self._at_work: list[_Job] = []  # a heap

    def advance(self) -> None:
        """Let the clock run until the buffer is full.

        All that happens at one moment is done before new clients are asked, who so start from the state after it.
        """
        schedule, began, version = self._schedule, self._now, self.round
        ended, arrived = list[_Job](), list[_Job]()
        dropped, empty = set[int](), set[int]()
        while len(arrived) < self._options.buffer_size:
            self._ask(version, {job.client for job in ended})
            if not self._at_work:  # nobody is left who is not in the buffer
                break
            self._now = self._at_work[0].end
            while self._at_work and self._at_work[0].end == self._now and len(arrived) < self._options.buffer_size:
                job = heapq.heappop(self._at_work)
                ended.append(job)
                if drops_out(schedule.config, job.version + 1, job.client):
                    dropped.add(job.client)
                elif schedule.empty([job.client]):
                    empty.add(job.client)
                else:
                    arrived.append(job)
        self.round = version + 1
        ended.sort(key=lambda job: job.number)
        staleness = [version - job.version for job in ended]
        self.plan = Plan(
            round=self.round,
            cohort=tuple(job.client for job in ended),
            versions=tuple(job.version for job in ended),
            dropped=frozenset(dropped),
            empty=frozenset(empty),
            blocks=schedule.blocks([job.client for job in sorted(arrived, key=lambda job: job.number)]),
            times=Times(self._now - began, tuple(job.seconds for job in ended)),
            weights=tuple((1.0 + steps) ** -self._options.staleness_exponent for steps in staleness),
            pulls_to_models=self._options.contribution == "model",
            needed_later=tuple(sorted({job.version for job in self._at_work})),
        )

    def _ask(self, version: int, ended: set[int]) -> None:
        """Start clients until enough are at work, none of them twice from one version.

        ended: the clients that have ended since the last step.
        """
        schedule, missing = self._schedule, self._options.concurrency - len(self._at_work)
        excluded = {job.client for job in self._at_work} | ended
        if not missing or len(excluded) == schedule.population.num_clients:
            return
        # The first of a version are those that a synchronous round would sample.
        keys = (version + 1, self._started) if excluded else (version + 1,)
        chosen = draw_clients(schedule.config, schedule.population, schedule.devices, keys, missing, excluded)
        for client in chosen:
            seconds = schedule.seconds(client, version)
            heapq.heappush(self._at_work, _Job(self._now + seconds, self._started, client, version, seconds))
            self._started += 1
