"""What the round loop asks of an approach: what goes down, what a block of clients does with it, how their
contributions combine, how the server's state moves, what is evaluated and what a run ends with.

Rank 0 alone has the state, so an approach knows the server by `state is not None`. `local` runs on the workers without
collectives; all that is called collective is called by every rank, in the same order.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import torch

from fedhpc import data, registry
from fedhpc.config import Config
from fedhpc.data import Data
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import Outcome
from fedhpc.kinds.base import Kind
from fedhpc.participation import Block, Plan, cohort_size, joined, most_together, plan_round, resolve_block_size
from fedhpc.ranks.transport.base import Transport
from fedhpc.server.state import State
from fedhpc.task import Task
from fedhpc.training.schedule import num_steps


@dataclass(frozen=True)
class Returned:
    """What a block of K clients sends back and reports; row i belongs to clients[i] as given."""

    upload: Any  # what `combine` takes
    reason: np.ndarray  # int64 (K,): 0 accepted, else the index in `Approach.reasons`
    tokens: np.ndarray  # int64 (K,): supervised tokens seen
    steps: np.ndarray  # int64 (K,)
    loss_sum: np.ndarray  # float64 (K,): summed over those tokens
    loss_first: np.ndarray  # float64 (K,): mean over the tokens of the first step
    loss_last: np.ndarray  # float64 (K,): and of the last
    norms: np.ndarray  # float64 (K,): L2 norm of what is sent
    input_tokens: int = 0
    padded_tokens: int = 0


@dataclass(frozen=True)
class Final:
    """What rank 0 knows at the end of a run."""

    test: Mapping[str, float]
    base: Mapping[str, float]  # the same metrics of the untouched base
    tensors: Mapping[str, np.ndarray]  # /final
    samples: Sequence[Mapping[str, Any]] = ()
    client_eval: Mapping[str, np.ndarray] | None = None
    tables: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)  # /tables/<name>/<column>
    lines: Sequence[str] = ()  # to print


class Approach(ABC):
    """One way to customize, on one rank."""

    #: Why a contribution was not used; the first stands for one that was.
    reasons: ClassVar[tuple[str, ...]] = ("", "its update is not finite")

    #: What metrics can NEED beside the answers of the kind of task.
    answers: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, task: Task) -> None:
        self.config, self.base, self.data = task.config, task.base, task.data
        for name in (*task.config.evaluation.metrics, *task.config.evaluation.metrics_of_test):
            needed = registry.choice("metrics", name).needs
            if needed not in self.base.kind.answers | self.answers:
                raise UserError(
                    f"evaluation.metrics: {name} is of {needed}, which method.name {task.config.method.name} of "
                    f"'{self.base.name}' does not give"
                )
        self.rounds, self.workers, self.label_targets = task.rounds, task.workers, task.label_targets
        self.placement = task.placement
        self.fits: int | None = None  # clients that this rank has memory for at a time, once more were too many

    @classmethod
    def read(cls, config: Config, tokenizer: Any, kind: Kind, write_cache: bool) -> Data:
        """The splits and the population. UserError for all that is wrong with the data."""
        return data.load_data(config, tokenizer, kind, write_cache)

    @property
    def fingerprint(self) -> str:
        """Of the weights of all models: a resumed run must find the same."""
        return self.base.fingerprint

    @property
    def block_size(self) -> int:
        """Clients that work together, the same on every rank."""
        return resolve_block_size(self.config, cohort_size(self.config, self.data.population), self.placement.trains_on)

    @property
    def together(self) -> int:
        """Clients of one worker that work together at most."""
        return most_together(self.config, self.block_size, self.placement.trains_on)

    @property
    def exchanges(self) -> bool:
        """Whether rounds move the server's state."""
        return True

    @property
    def min_cohort(self) -> int:
        """With fewer completed clients a round changes nothing."""
        return self.config.federation.min_cohort

    @property
    def keeps_client_state(self) -> bool:
        """Whether clients keep something from round to round (fedhpc.training.client_state)."""
        return False

    def plan(self, round_: int) -> Plan:
        """Who does what in a round; pure."""
        return plan_round(self.config, self.data.population, self.data.train, round_, self.workers, self.block_size)

    def blocks_of(self, plan: Plan, worker: int) -> list[Block]:
        """What a worker trains, a forward each."""
        blocks = [block for block in plan.blocks if block.worker == worker]
        return joined(blocks, self.together) if self.together > self.block_size else blocks

    # ---- a round

    @abstractmethod
    def state(self) -> State:
        """The server's state before the first round."""

    @abstractmethod
    def download(self, transport: Transport, state: State | None, plan: Plan) -> Any:
        """What clients know of the server in this round, on every rank. Collective."""

    @abstractmethod
    def local(self, plan: Plan, clients: Sequence[int], down: Any) -> Returned:
        """What a block of clients does. No collectives, no files but the clients' own."""

    @abstractmethod
    def combine(self, transport: Transport, plan: Plan, returned: Sequence[tuple[Block, Returned]]) -> Any:
        """All accepted contributions in one; on rank 0, of no meaning elsewhere. Collective.

        The same bits on any number of ranks. Of no meaning where fewer than `min_cohort` clients completed.
        """

    @abstractmethod
    def step(self, state: Any, plan: Plan, combined: Any) -> float:
        """Move the server's state; the L2 norm of the move."""

    @abstractmethod
    def exchanged_bytes(self, plan: Plan, down: Any = None) -> tuple[int, int]:
        """Protocol bytes of a round, down and up, all clients together.

        down: what went down in it; None for an estimate before the run (--check).
        """

    # ---- results

    @abstractmethod
    def evaluate(self, transport: Transport, state: State | None, round_: int) -> Outcome | None:
        """Validation after `round_`; the outcome on rank 0. Collective."""

    @abstractmethod
    def finish(self, transport: Transport, state: State | None) -> Final | None:
        """Test, and the export to the run directory's adapter/; the results on rank 0. Collective."""

    @abstractmethod
    def attributes(self) -> dict[str, Any]:
        """Root attributes of results.h5 that are the approach's own, such as payload_parameters."""

    @abstractmethod
    def summary(self) -> str:
        """What is customized, in a few words: for the first line of the log."""

    @abstractmethod
    def details(self, plan: Plan) -> list[str]:
        """Lines for --check: what is exchanged, and the memory that it takes."""

    # ---- what is said before a run

    def work(self, plan: Plan) -> str:
        """What clients do in a round, in a few words."""
        steps = [num_steps(self.data.population.num_examples(c), self.config.client) for c in plan.training]
        return f"{min(steps, default=0)} to {max(steps, default=0)} local steps"

    def headline(self, world_size: int, transport: str) -> str:
        """What is about to run, in one line."""
        config, population = self.config, self.data.population
        more = f" (up to {self.together} on one GPU)" if self.together > self.block_size else ""
        return (
            f"{config.run.name}: {config.mode} {config.method.name} of {self.base.name} "
            f"({self.summary()}), {population.num_clients:,} clients, "
            f"{cohort_size(config, population)} a round in blocks of {self.block_size}{more}, {world_size} ranks over "
            f"{transport} on {self.placement.describe()}"
        )

    def describe(self, world_size: int, transport: str) -> list[str]:
        """The plan that --check prints: clients, blocks, steps, what is exchanged, bytes per round, memory."""
        population, plan = self.data.population, self.plan(1)
        per_worker = {w: sum(b.cost for b in plan.blocks if b.worker == w) for w in self.workers}
        largest = max((len(b.clients) for b in plan.blocks), default=0)
        down, up = self.exchanged_bytes(plan)
        exchanged, *rest = self.details(plan)
        return [
            self.headline(world_size, transport),
            *self.data.messages,
            *data.describe(population, self.data.train),
            f"examples: {len(self.data.train):,} training, {len(self.data.validation):,} validation, "
            f"{len(self.data.test):,} test",
            f"rounds: {self.rounds}; round 1: {len(plan.cohort)} clients, {len(plan.blocks)} blocks of at most "
            f"{largest}, {self.work(plan)} each",
            "tokens of round 1 per worker: " + ", ".join(f"{w}: {cost:,.0f}" for w, cost in per_worker.items()),
            exchanged,
            f"bytes per round: {down:,} down, {up:,} up (protocol)",
            *rest,
        ]


def broadcast_versions(transport: Transport, state: State | None, clients: Sequence[int]) -> dict[int, int]:
    """Which version of each client's own state counts, 0 where it has none; on every rank. Collective."""
    known = state.versions if state else {}
    versions = torch.tensor([known.get(c, 0) for c in clients], dtype=torch.int64)
    transport.broadcast(versions)
    return dict(zip(clients, versions.tolist(), strict=True))


def accepted_slots(plan: Plan, returned: Sequence[tuple[Block, Returned]]) -> np.ndarray:
    """The place in the cohort of each accepted client of this rank, in the order of `returned`: int64 (c,)."""
    place = {client: i for i, client in enumerate(plan.cohort)}
    accepted = [
        client for block, back in returned for client, why in zip(block.clients, back.reason, strict=True) if not why
    ]
    return np.array([place[client] for client in accepted], dtype=np.int64)
