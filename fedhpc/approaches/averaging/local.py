"""What a block of clients does in a round: train the payload from what the server sent, and keep what is theirs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fedhpc import registry
from fedhpc.approaches.averaging.personal import PersonalPart
from fedhpc.approaches.averaging.sending import Sending
from fedhpc.approaches.base import BlockResult
from fedhpc.config import Config
from fedhpc.config.together import shared_settings
from fedhpc.data import Data
from fedhpc.errors import UserError
from fedhpc.methods.base import Method
from fedhpc.models.base import Base
from fedhpc.models.experts import ExpertLoad
from fedhpc.objectives.base import Objective
from fedhpc.participation.plan import Plan
from fedhpc.privacy.base import Privacy
from fedhpc.training import client_state
from fedhpc.training.auxiliary import Auxiliary, Exchanged
from fedhpc.training.block import Trained, Work, train_block
from fedhpc.training.client_state import Keeper, OwnPayload
from fedhpc.training.local import LocalTraining
from fedhpc.training.memory import Memory, OptimizerMemory
from fedhpc.training.moments import Moments
from fedhpc.training.optimizers.base import ClientOptimizer
from fedhpc.training.rules import scaffold
from fedhpc.training.rules.server_momentum import Direction, ServerMomentum
from fedhpc.training.schedule import examples_per_step


@dataclass(frozen=True)
class Download:
    """What clients know of the server when a round begins, on the CPU."""

    theta: Tensor | None  # (S,): theta_t; None in local mode, where nothing is exchanged
    auxiliary: Mapping[str, Tensor]  # (A,) each: what comes beside theta, by name (fedhpc.training.auxiliary)
    versions: Mapping[int, int]  # client -> the round whose file holds its state, 0: none yet; empty where none is kept
    past: Mapping[int, Tensor]  # (S,) each: theta of the earlier versions from which clients of this round start
    bytes: int | None = None  # of a compressed theta for all clients of the cohort, on rank 0


@dataclass(frozen=True)
class Upload:
    """What a block of clients sends, on the CPU."""

    updates: Tensor  # (K, S): of the shared part, after the transforms
    auxiliary: Mapping[str, Tensor]  # (K, A) each: what goes beside the updates, by name


def with_updates(result: BlockResult[Upload], rows: Iterator[Tensor]) -> BlockResult[Upload]:
    """A block whose accepted clients send other updates, the next of `rows`; those that are not finite are rejected."""
    accepted = result.accepted
    if not accepted.any():
        return result
    updates, reason, norms = result.upload.updates.clone(), result.reason.copy(), result.norms.copy()
    for row in np.flatnonzero(accepted):
        updates[row] = next(rows)
    changed = accepted & (updates != result.upload.updates).any(dim=1).numpy()
    reason[changed & ~_finite(updates)] = 1
    # Of the others, those with pulls_to_models too, they are what training gave.
    norms[changed] = torch.linalg.vector_norm(updates.double(), dim=1).numpy()[changed]
    return replace(result, upload=replace(result.upload, updates=updates), reason=reason, norms=norms)


def with_zeros(result: BlockResult[Upload]) -> BlockResult[Upload]:
    """A block all of whose clients are accepted: in place of an update that was rejected there are zeros."""
    rejected = torch.from_numpy(~result.accepted)
    if not rejected.any():
        return result
    updates = result.upload.updates.masked_fill(rejected.unsqueeze(1), 0.0)
    return replace(result, upload=replace(result.upload, updates=updates), reason=np.zeros_like(result.reason))


class Auxiliaries:
    """What the server of a run keeps for its clients beside theta."""

    def __init__(self, config: Config, method: Method, personal: PersonalPart) -> None:
        #: The clients' own, whose moments may be among it.
        self.optimizer: ClientOptimizer = registry.choice("client_optimizers", config.client.optimizer)(config.client)
        self.controls = self.moments = self.momentum = None
        if config.corrects_drift:
            self.controls = scaffold.ControlVariates(personal.split.shared, personal.dtype)
        if config.exchanges_moments:
            trainable = method.trainable
            blocks = {name: method.blocks(name) for name in trainable.shapes}
            self.moments = Moments(self.optimizer, config.client.moments, trainable, blocks, personal.dtype)
        if config.shares_direction:
            #: The direction of the last round, with client.server_momentum; None without it.
            self.momentum = ServerMomentum(personal.split.shared, personal.dtype)
        #: What goes both ways, and all of it.
        self.exchanged: list[Exchanged] = [one for one in (self.controls, self.moments) if one is not None]
        self.every: list[Auxiliary] = [*self.exchanged, *([] if self.momentum is None else [self.momentum])]
        self._itemsize = personal.dtype.itemsize

    @property
    def bytes_down(self) -> int:
        """Bytes that go down to a client beside theta."""
        return self._itemsize * sum(one.size for one in self.every)

    @property
    def bytes_up(self) -> int:
        """Bytes that a client sends up beside its update."""
        return self._itemsize * sum(one.size for one in self.exchanged)


@dataclass(frozen=True)
class Job:
    """A block of K clients that is ready to train."""

    training: BlockTraining
    plan: Plan
    clients: Sequence[int]
    down: Download
    tensors: Mapping[str, Tensor]  # what they have kept
    theta: Tensor | None  # (K, S) or (1, S): the shared parts from which they train; None in local mode
    starts: Tensor  # (K, P) or (1, P): the payloads
    works: Sequence[Work]
    local: LocalTraining
    memory: Memory | None
    corrections: Tensor | None


def train_jobs(jobs: Sequence[Job], on_step: Callable[[float], None], takes: bool = True) -> list[Trained]:
    """Train the clients of all jobs in one forward; what comes out of each job, in order.

    Several are of runs that have the same `BlockTraining.joins`. takes: as in `train_block`.
    """
    first = jobs[0]
    alone, training = len(jobs) == 1, first.training
    starts = first.starts if alone else torch.cat([job.starts.expand(len(job.works), -1) for job in jobs])
    trained = train_block(
        training.base,
        training.method,
        training.objective,
        starts,
        [work for job in jobs for work in job.works],
        training.data.train,
        first.local,
        first.memory,
        first.corrections,
        on_step,
        takes,
    )
    return [trained] if alone else trained.apart([len(job.works) for job in jobs])


class BlockTraining:
    """The clients' side of the rounds of one run. S is the size of the payload's shared part."""

    def __init__(
        self,
        config: Config,
        base: Base,
        method: Method,
        objective: Objective,
        data: Data,
        personal: PersonalPart,
        sending: Sending,
        auxiliaries: Auxiliaries,
        privacy: Privacy,
        rounds: int,
    ) -> None:
        self.config, self.base, self.method, self.objective, self.data = config, base, method, objective, data
        self.personal, self.split, self.sending = personal, personal.split, sending
        self.privacy, self.rounds = privacy, rounds
        self.optimizer = auxiliaries.optimizer
        alone = config.mode != "federated"
        self._payload = OwnPayload(personal.initial_payload) if config.mode == "local" else None
        self._memory = OptimizerMemory(self.optimizer, method.trainable.size, personal.dtype) if alone else None
        self.auxiliaries = auxiliaries
        self._controls, self._moments, self._momentum = auxiliaries.controls, auxiliaries.moments, auxiliaries.momentum
        keepers = [self._payload, self._memory, self._controls, personal]
        self._keepers: list[Keeper] = [keeper for keeper in keepers if keeper is not None]

    @property
    def keepers(self) -> list[Keeper]:
        """All that clients keep tensors for from round to round."""
        return [*self._keepers, self.sending.pipeline]

    @cached_property
    def joins(self) -> Hashable | None:
        """What runs have in common whose blocks can train in one forward (`train_jobs`); None: these train alone."""
        key = shared_settings(self.config)
        if key is None or not self.method.starts_from_payload:
            return None
        if ExpertLoad(self.base).layers:  # whose load is counted for a forward, and not for its rows
            return None
        return key, id(self.base), self.data.train.fingerprint

    def train(
        self,
        plan: Plan,
        clients: Sequence[int],
        down: Download,
        on_step: Callable[[float], None],
        fit: int | None = None,
        takes: bool = True,
    ) -> BlockResult[Upload] | None:
        """Train `clients` together and write what they keep. UserError where a client on its own diverged.

        fit: as in `LocalTraining.of`. takes: as in `train_block`; None on a rank that does not.
        """
        job = self.job(plan, clients, down, fit, takes)
        (trained,) = train_jobs([job], on_step, takes)
        return self.result(job, trained) if takes else None

    def job(
        self, plan: Plan, clients: Sequence[int], down: Download, fit: int | None = None, takes: bool = True
    ) -> Job:
        """All that `clients` need to train together: what the server sent, and what they have kept.

        fit, takes: as in `train`.
        """
        config, round_ = self.config, plan.round
        versions = [plan.versions[plan.index[client]] for client in clients]
        keepers = self.keepers if takes else ()  # what clients keep is for their updates, where ranks train together
        tensors = client_state.read(config.run_dir, clients, down.versions, keepers)
        theta = self._theta(plan, down, versions)
        starts = self._starts(theta, tensors)
        controls, moments, local = self._controls, self._moments, self._local(round_, fit)
        memory = None if self._memory is None else Memory.of(tensors)
        if moments is not None:
            optimizer, memory = moments.memory(down.auxiliary[moments.name], len(clients))
            local = replace(local, optimizer=optimizer)
        if self._momentum is not None:
            direction = Direction(down.auxiliary[self._momentum.name], config.client.server_momentum)
            local = replace(local, direction=direction)
        of_version = {version: replace(local, round=version + 1) for version in set(versions)}
        indices = self.data.population.indices_of(clients)
        works = [Work(c, mine, of_version[v]) for c, mine, v in zip(clients, indices, versions, strict=True)]
        corrections = None if controls is None else scaffold.corrections(tensors, down.auxiliary[controls.name])
        return Job(self, plan, clients, down, tensors, theta, starts, works, local, memory, corrections)

    def result(self, job: Job, trained: Trained) -> BlockResult[Upload]:
        """What the clients of a job send once they have trained; what they keep is written.

        UserError where a client on its own diverged.
        """
        config, plan, clients, down, tensors = self.config, job.plan, job.clients, job.down, job.tensors
        round_, controls, moments = plan.round, self._controls, self._moments
        beside: dict[str, Tensor] = {}
        if controls is not None:
            control = down.auxiliary[controls.name]
            sums = trained.updates if trained.gradients is None else trained.gradients
            beside[controls.name] = scaffold.changes(control, sums, trained.distance)
        if moments is not None:
            assert trained.memory is not None
            beside[moments.name] = moments.sent(down.auxiliary[moments.name], trained.memory)
        tensors_after = self._tensors_after(tensors, job.starts, trained, beside)
        updates, personal = self.split.apart(trained.updates)
        finite = _finite(updates) & _finite(personal)
        raw_bytes = self.sending.raw_bytes(clients, round_)
        sent = self.sending.pipeline.on_clients(updates, round_, clients, tensors, raw_bytes)
        if sent.updates is not updates:
            updates = sent.updates
            finite &= _finite(updates)
        for rows in beside.values():
            finite &= _finite(rows)
        if config.mode != "federated" and not finite.all():
            client = self.data.population.title(clients[int(finite.argmin())])
            raise UserError(
                f"{client}: training diverged in round {round_} (its parameters are not finite): lower client.lr"
            )
        client_state.write(config.run_dir, clients, round_, tensors_after | sent.tensors, finite)
        bytes_up = sent.bytes_up + self.auxiliaries.bytes_up
        if config.masks_uploads and (bytes_up != raw_bytes).any():
            raise UserError("a transform packs the updates, which cannot be masked then", key="transforms")
        return BlockResult(
            clients=tuple(clients),
            upload=Upload(self._from_newest(plan, down, job.theta, updates), beside),
            reason=np.where(finite, 0, 1),
            tokens=trained.tokens,
            steps=trained.steps,
            loss_sum=trained.loss_sum,
            loss_first=trained.loss_first,
            loss_last=trained.loss_last,
            norms=torch.linalg.vector_norm(updates.double(), dim=1).numpy(),
            # Masked updates are counted where they are masked, in `Masking`.
            bytes_up=bytes_up if config.mode == "federated" and not config.masks_uploads else np.zeros_like(bytes_up),
            padded_tokens=trained.padded_tokens,
            expert_load=trained.expert_load,
        )

    def rehearse(self, clients: Sequence[int], fit: int | None = None) -> None:
        """Take one local step of a block on the longest rows that its clients have, and forget what it gave.

        fit: as in `LocalTraining.of`.
        """
        local = replace(self._local(1, fit), steps=1, epochs=None)
        works = []
        for client in clients:
            indices = self.data.population.indices(client)
            by_length = np.argsort(-self.data.train.lengths_of(indices), kind="stable")
            works.append(Work(client, indices[by_length[: examples_per_step(local)]]))
        start = self.personal.initial_payload().unsqueeze(0)
        corrections = None if self._controls is None else torch.zeros_like(start).expand(len(works), -1)
        train_block(
            self.base, self.method, self.objective, start, works, self.data.train, local, corrections=corrections
        )

    def _local(self, round_: int, fit: int | None) -> LocalTraining:
        """How clients train in a round. fit: as in `LocalTraining.of`."""
        local = LocalTraining.of(self.config, round_, self.rounds, fit)
        return replace(local, packing=self.config.client.packing, privacy=self.privacy.of_examples)

    def _theta(self, plan: Plan, down: Download, versions: Sequence[int]) -> Tensor | None:
        """The shared parts from which K clients train: (K, S), or (1, S) where they share one; None in local mode."""
        if down.theta is None or all(version == plan.round - 1 for version in versions):
            return None if down.theta is None else down.theta.unsqueeze(0)
        thetas = {**down.past, plan.round - 1: down.theta}
        return torch.stack([thetas[version] for version in versions])

    def _starts(self, theta: Tensor | None, tensors: Mapping[str, Tensor]) -> Tensor:
        """The payloads from which K clients train: (K, P), or (1, P) where they share one."""
        if self._payload is not None:
            return self._payload.of_clients(tensors)
        assert theta is not None
        return self.split.join(theta, self.personal.of_clients(tensors))

    def _from_newest(self, plan: Plan, down: Download, theta: Tensor | None, updates: Tensor) -> Tensor:
        """The updates (K, S) of clients that started from `theta`; with pulls_to_models those from the newest state."""
        if not plan.pulls_to_models:
            return updates
        assert theta is not None and down.theta is not None
        return updates + (down.theta - theta)

    def _tensors_after(
        self, tensors: Mapping[str, Tensor], starts: Tensor, trained: Trained, beside: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """What the clients keep now, of everybody who keeps something. beside: what they send beside the updates."""
        after: dict[str, Tensor] = {}
        if self._payload is not None:
            after |= self._payload.tensors(starts - trained.updates)
        if self._memory is not None and trained.memory is not None:
            after |= trained.memory.tensors()
        if self._controls is not None:
            after |= scaffold.tensors_after(tensors, beside[self._controls.name])
        return after | self.personal.tensors_after(tensors, self.split.apart(trained.updates)[1])


def _finite(rows: Tensor) -> np.ndarray:
    """Which of K rows are finite: bool (K,)."""
    finite: np.ndarray = torch.isfinite(rows).all(dim=1).numpy()
    return finite
