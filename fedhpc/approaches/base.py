"""What the round loop asks of an approach: what goes down, what a block of clients does with it, how their
contributions combine, how the server's state moves, what is evaluated and what a run ends with.

Rank 0 alone has the server's state, so an approach knows that it is there by `server_state is not None`. `local` runs
on the workers without collectives; whatever is marked collective is called by every rank, in the same order.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch

from fedhpc import data, registry
from fedhpc.approaches.inputs import Inputs
from fedhpc.config import Config
from fedhpc.data import Data
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import Evaluator, Outcome
from fedhpc.models.base import Base
from fedhpc.models.experts import ExpertLoad
from fedhpc.models.load import stored_classes
from fedhpc.participation.blocks import joined, most_of_runs, most_together, resolve_block_size
from fedhpc.participation.plan import Block, Plan
from fedhpc.participation.sampling import cohort_size
from fedhpc.participation.schedules.base import Schedule
from fedhpc.ranks.round_progress import RoundProgress
from fedhpc.ranks.transport.base import Transport
from fedhpc.results.record import FinalResults
from fedhpc.server.state import ServerState
from fedhpc.training.schedule import num_steps

StateT = TypeVar("StateT", bound=ServerState)  # the server's state
DownloadT = TypeVar("DownloadT")  # what clients know of it in a round
UploadT = TypeVar("UploadT")  # what a block of clients sends back
CombinedT = TypeVar("CombinedT")  # all contributions of a round in one
Result = TypeVar("Result")
Member = TypeVar("Member")  # what trains in a forward: a client, or one of several runs


@dataclass(frozen=True)
class BlockResult(Generic[UploadT]):
    """What a block of K clients sends back and reports; row i of every column belongs to clients[i]."""

    clients: tuple[int, ...]
    upload: UploadT  # what `combine` takes
    reason: np.ndarray  # int64 (K,): 0 accepted, else the index in `Approach.reasons`
    tokens: np.ndarray  # int64 (K,): supervised tokens seen
    steps: np.ndarray  # int64 (K,)
    loss_sum: np.ndarray  # float64 (K,): summed over those tokens
    loss_first: np.ndarray  # float64 (K,): mean over the tokens of the first step
    loss_last: np.ndarray  # float64 (K,): mean over the tokens of the last step
    norms: np.ndarray  # float64 (K,): L2 norm of what is sent
    bytes_up: np.ndarray  # int64 (K,): protocol bytes of what is sent
    padded_tokens: int = 0
    expert_load: np.ndarray | None = None  # int64 (L, E): tokens sent to each routed expert

    #: The columns that are reported to rank 0.
    COLUMNS: ClassVar[tuple[str, ...]] = (
        "reason",
        "tokens",
        "steps",
        "loss_sum",
        "loss_first",
        "loss_last",
        "norms",
        "bytes_up",
    )

    @property
    def accepted(self) -> np.ndarray:
        """bool (K,): whose contribution is used."""
        accepted: np.ndarray = self.reason == 0
        return accepted


@dataclass(frozen=True)
class Share:
    """Clients of one run that train in a forward, where those of other runs may be beside them."""

    approach: AnyApproach
    plan: Plan
    clients: tuple[int, ...]
    download: Any  # of the approach


class Approach(ABC, Generic[StateT, DownloadT, UploadT, CombinedT]):
    """One way to customize a model together, on one rank."""

    #: Why a contribution was not used; the first stands for one that was.
    reasons: ClassVar[tuple[str, ...]] = ("", "its update is not finite")

    #: What metrics can need beside the answers of the base model.
    answers: ClassVar[frozenset[str]] = frozenset()

    #: Whether clients train in steps whose examples can be in several forwards (`examples_that_fit`).
    trains_in_steps: ClassVar[bool] = False

    #: Whether the server trains a model, which on a CPU beside workers on GPUs would crawl.
    server_trains: ClassVar[bool] = False

    def __init__(self, inputs: Inputs) -> None:
        self.inputs = inputs
        self.config, self.base, self.objective, self.data = inputs.config, inputs.base, inputs.objective, inputs.data
        for name in (*self.config.evaluation.metrics, *self.config.evaluation.metrics_of_test):
            needed = registry.choice("metrics", name).needs
            if needed not in self.base.answers | self.answers | self.objective.answers:
                raise UserError(
                    f"evaluation.metrics: {name} is of {needed}, which method.name {self.config.method.name} of "
                    f"'{self.base.name}' does not give"
                )
        self.rounds, self.topology, self.label_targets = inputs.rounds, inputs.topology, inputs.label_targets
        self.placement, self._of_workers = inputs.placement, inputs.of_workers
        self.weights, self.program_bytes = inputs.weights, inputs.program_bytes
        #: How many clients this rank has memory for at a time; None while no block was too large.
        self.clients_that_fit: int | None = None
        #: How many examples of a client this rank has memory for in one forward; None while there was enough for all.
        self.examples_that_fit: int | None = None
        #: The largest memory in bytes of a rank that has rehearsed a step, with --check; on rank 0 of all of them.
        self.peak: int | None = None
        #: How far a round has come; the round loop puts that of its transport here.
        self.progress = RoundProgress()

    @classmethod
    def spreads(cls, config: Config) -> bool:
        """Whether the ranks of a worker may hold the base between them: only they can use it then, as it is."""
        return not cls.server_trains

    def evaluator(self, transport: Transport) -> Evaluator:
        """What measures payloads of the base."""
        evaluation, precision = self.config.evaluation, self.config.runtime.precision
        return Evaluator(self.base, self.objective, evaluation, precision, transport, self.label_targets)

    @classmethod
    def read(cls, config: Config, tokenizer: Any, model: type[Base], write_cache: bool) -> Data:
        """The splits and the population. UserError for all that is wrong with the data."""
        return data.load_data(config, tokenizer, model, write_cache, head=stored_classes(config.model))

    @property
    def messages(self) -> list[str]:
        """What was decided while model and data were loaded, a line each: for the screen, `--check` and /events."""
        needless = self.config.model.offload != "none" and self.placement.trains_on == "cpu"
        line = "model.offload: clients train on CPUs, which compute with the base where it is: nothing is offloaded"
        return [*self.base.messages, *self.data.messages, *self._of_workers, *([line] if needless else [])]

    @property
    def decisions(self) -> dict[str, float]:
        """What came out of a search that may end otherwise on another machine: all ranks take what rank 0 found."""
        return {}

    @property
    def fingerprint(self) -> str:
        """A hash of the weights of all models: a resumed run must have the same."""
        return self.base.fingerprint

    @property
    def block_size(self) -> int:
        """K, how many clients of the plan train in one forward; the same on every rank."""
        return resolve_block_size(self.config, cohort_size(self.config, self.data.population), self.placement.trains_on)

    @property
    def most_together(self) -> int:
        """How many clients of one worker train in one forward at most, once its blocks are joined."""
        return most_together(self.config, self.block_size, self.placement.trains_on)

    @property
    def joins(self) -> Hashable | None:
        """What runs in one process have in common whose clients can train in one forward; None: they train alone."""
        return None

    @property
    def most_of_runs(self) -> int:
        """How many clients of several runs train in one forward at most."""
        return most_of_runs(self.config, self.block_size, self.placement.trains_on)

    @property
    def fits(self) -> tuple[int, int]:
        """How many clients, and examples of a client, this rank has memory for at a time; 0: as many as there are."""
        return self.clients_that_fit or 0, self.examples_that_fit or 0

    @property
    def moves_server(self) -> bool:
        """Whether rounds move the server's state."""
        return True

    @property
    def min_cohort(self) -> int:
        """With fewer completed clients a round changes nothing."""
        return self.config.federation.min_cohort

    def shortfall(self, plan: Plan, completed: np.ndarray) -> str:
        """Why a round changes nothing that these clients completed, in a few words; empty where they are enough.

        completed: bool (C,), of the cohort.
        """
        few = int(completed.sum()) < self.min_cohort
        return f"{completed.sum()} of {self.min_cohort} needed clients completed" if few else ""

    @property
    def keeps_client_state(self) -> bool:
        """Whether clients keep something from round to round (fedhpc.training.client_state)."""
        return False

    @property
    def trains_together(self) -> bool:
        """Whether the ranks of a worker train each of its clients together, and not clients of their own."""
        return False

    @property
    def workers(self) -> list[int]:
        """The workers, as a plan counts them, in the order in which they get the blocks of a round."""
        first = self.inputs.first_worker
        return [*range(first, self.topology.num_workers), *range(first)]

    @cached_property
    def schedule(self) -> Schedule:
        """Which clients start when."""
        schedule: type[Schedule] = registry.choice("schedules", self.config.federation.schedule.name)
        splits, members = self.data, self.topology.group_size
        return schedule(
            self.config, splits.population, splits.train, self.workers, self.block_size, self._traffic, members,
            self.trains_together,
        )  # fmt: skip

    def _traffic(self, client: int) -> tuple[int, int]:
        """Protocol bytes that a client receives and sends in a round, as estimated before it."""
        alone = Plan(1, (client,), (0,), frozenset(), frozenset(), ())
        return self.bytes_down(alone), self.bytes_up(alone)

    def plan(self, round_: int) -> Plan:
        """Who does what in a round. It follows from configuration, population and round alone."""
        return self.schedule.plan(round_)

    def blocks_of(self, plan: Plan, rank: int) -> list[Block]:
        """What a rank trains, a forward each; nothing where it belongs to no worker."""
        if self.trains_together:
            return [block for block in plan.blocks if rank in self.topology.workers[block.worker]]
        blocks = [block for block in plan.blocks if self.topology.rank_of(block.worker, block.member) == rank]
        return joined(blocks, self.most_together) if self.most_together > self.block_size else blocks

    # ---- a round

    @abstractmethod
    def initial_state(self) -> StateT:
        """The server's state before the first round."""

    @abstractmethod
    def download(self, transport: Transport, server_state: StateT | None, plan: Plan) -> DownloadT:
        """What clients know of the server in this round, on every rank. Collective."""

    @abstractmethod
    def local(self, plan: Plan, clients: Sequence[int], download: DownloadT) -> BlockResult[UploadT]:
        """What a block of clients does. No collectives, no files but the clients' own."""

    def local_in_parts(self, shares: Sequence[Share]) -> list[list[BlockResult[UploadT]]]:
        """`local` of a block, as `in_parts` does it: what each share sends, the first of which is this run's.

        There are several where runs have the same `joins`.
        A block that failed has changed nothing: what clients keep is a file of this round, written again.
        """
        (one,) = shares
        population = self.data.population
        return [self.in_parts(one.clients, lambda part: self.local(one.plan, part, one.download), population.title)]

    def in_parts(
        self, clients: Sequence[Member], work: Callable[[Sequence[Member]], Result], title: Callable[[Member], str]
    ) -> list[Result]:
        """`work` of a block of clients; of its halves, from now on, where it takes more memory than the GPU has.

        Where a client alone does not fit, its steps go on with half as many examples in a forward. title: what a client
        is called in an error.
        """
        if self.clients_that_fit is None or len(clients) <= self.clients_that_fit:
            try:
                return [work(clients)]
            except torch.OutOfMemoryError as error:
                if len(clients) == 1 and not self._can_halve_forwards:
                    client = title(clients[0])
                    can_be_cut = self.trains_in_steps and not self.objective.needs_full_steps
                    one = f"one example of {client}" if can_be_cut else f"{client} alone"
                    raise UserError(
                        f"{one} takes more memory than the GPU has: lower client.batch_size or data.max_length, or set "
                        "model.gradient_checkpointing"
                    ) from error
            torch.cuda.empty_cache()  # not above, where the exception still holds the tensors
            self.clients_that_fit = math.ceil(len(clients) / 2)
            if len(clients) == 1:
                self.examples_that_fit = math.ceil(self._examples_at_once / 2)
                return self.in_parts(clients, work, title)
        half = math.ceil(len(clients) / 2)
        return [result for part in (clients[:half], clients[half:]) for result in self.in_parts(part, work, title)]

    @property
    def _examples_at_once(self) -> int:
        """How many examples of a client are in one forward now."""
        client = self.config.client
        return self.examples_that_fit or client.micro_batch or int(client.batch_size)

    @property
    def _can_halve_forwards(self) -> bool:
        return self.trains_in_steps and self._examples_at_once > 1 and not self.objective.needs_full_steps

    def attacked(
        self, transport: Transport, plan: Plan, results: list[BlockResult[UploadT]]
    ) -> list[BlockResult[UploadT]]:
        """The contributions of this rank's blocks once attackers have changed theirs. Collective."""
        return results

    @abstractmethod
    def combine(
        self, transport: Transport, server_state: StateT | None, plan: Plan, results: Sequence[BlockResult[UploadT]]
    ) -> CombinedT:
        """All accepted contributions in one; on rank 0, of no meaning elsewhere. Collective. Changes no state.

        results: of this rank's blocks. The same bits on any number of ranks. Of no meaning where fewer than
        `min_cohort` clients completed.
        """

    @abstractmethod
    def step(self, server_state: StateT, plan: Plan, combined: CombinedT) -> float:
        """Move the server's state; returns the L2 norm of the move."""

    def spend(self, server_state: StateT, plan: Plan) -> dict[str, float]:
        """Note on rank 0 that the clients of a round have trained, also where it is void.

        Returns what privacy reports in the round's row, by column; nothing where it promises nothing.
        """
        return {}

    # ---- what else is told of a round

    @property
    def more_metrics(self) -> Sequence[str]:
        """Metrics of the validation split beside evaluation.metrics."""
        return ()

    def client_columns(self, plan: Plan) -> dict[str, np.ndarray]:
        """The values of those `columns` that are of /clients, (C,) each by the name of the column."""
        return {}

    # ---- bytes

    @abstractmethod
    def bytes_down(self, plan: Plan, download: DownloadT | None = None) -> int:
        """Protocol bytes that a round sends to its clients, all together. download: None for an estimate before it."""

    @abstractmethod
    def bytes_up(self, plan: Plan) -> int:
        """An estimate of the protocol bytes that the clients of a round send; measured are `BlockResult.bytes_up`."""

    def bytes_fetched(self, plan: Plan, combined: CombinedT) -> int:
        """Protocol bytes that the server asked clients for once it had their answers; 0 for most approaches."""
        return 0

    def bytes_told(self, plan: Plan, combined: CombinedT) -> int:
        """Protocol bytes that the server sent to clients for them to be combined; 0 for most approaches."""
        return 0

    # ---- results

    @abstractmethod
    def evaluate(self, transport: Transport, server_state: StateT | None, round_: int) -> Outcome | None:
        """Validation after `round_`; the outcome on rank 0. Collective."""

    def judge(self, server_state: StateT, round_: int, metrics: Mapping[str, float]) -> None:
        """Note on rank 0 what the validation after `round_` says of the state."""

    def ends_early(self, transport: Transport, server_state: StateT | None) -> bool:
        """Whether no more rounds are wanted. Collective."""
        return False

    @abstractmethod
    def finish(self, transport: Transport, server_state: StateT | None) -> FinalResults | None:
        """Test, and the export to the run directory's adapter/; the results on rank 0. Collective."""

    @abstractmethod
    def attributes(self) -> dict[str, Any]:
        """Root attributes of results.h5 that are the approach's own, such as payload_parameters."""

    @property
    def columns(self) -> Sequence[str]:
        """The columns of results.h5 that runs of this approach sometimes have, like "rounds/epsilon"."""
        return ()

    @property
    def experts(self) -> ExpertLoad | None:
        """The layers and experts whose load clients report."""
        return None

    # ---- what --check and the first line of the log say of it

    @abstractmethod
    def summary(self) -> str:
        """What is customized, in a few words."""

    def rehearse(self, plan: Plan) -> None:
        """Try what a round will do, for --check: whatever fails here would fail in the round.

        On rank 0; where the ranks of a worker hold the base between them, on all of these. None where they train
        together.
        """

    @abstractmethod
    def details(self, plan: Plan) -> list[str]:
        """Lines for --check: what is exchanged, and the memory that it takes."""

    def work(self, plan: Plan) -> str:
        """What clients do in a round, in a few words."""
        steps = [num_steps(self.data.population.num_examples(c), self.config.client) for c in plan.training]
        return f"{min(steps, default=0)} to {max(steps, default=0)} local steps"


#: Whatever the states, downloads and uploads are: what the round loop and its reports ask is the same.
AnyApproach = Approach[Any, Any, Any, Any]


def broadcast_versions(
    transport: Transport, server_state: ServerState | None, clients: Sequence[int]
) -> dict[int, int]:
    """Which version of each client's own state counts, 0 where it has none; on every rank. Collective."""
    known = server_state.versions if server_state else {}
    versions = torch.tensor([known.get(c, 0) for c in clients], dtype=torch.int64)
    transport.broadcast(versions)
    return dict(zip(clients, versions.tolist(), strict=True))


def accepted_indices(plan: Plan, results: Sequence[BlockResult[Any]]) -> np.ndarray:
    """The position in the cohort of each accepted client of this rank, in the order of `results`: int64 (c,)."""
    positions = np.array([plan.index[client] for result in results for client in result.clients], dtype=np.int64)
    return positions[np.concatenate([np.zeros(0, bool), *(result.accepted for result in results)])]
