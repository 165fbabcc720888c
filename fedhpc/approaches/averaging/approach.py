"""Averaging of parameters: clients train a payload from the server's, and their updates meet in one sum.

The rounds are here; what a block of clients does is in `local`, how updates and model are sent in `sending`, what stays
on a client in `personal`, what attackers do to examples in `poisoning`, what the server trains on its own in `root`,
and what is measured in `evaluation`.

What a client keeps from round to round depends on the run: its own payload and its optimizer's memory in modes
centralized and local, its control variate with client.scaffold, its own part of the payload with
personalization.parts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedhpc import registry
from fedhpc.approaches.averaging.evaluation import (
    ATTACK_SUCCESS,
    Evaluation,
    client_lines,
    turn_lines,
    writes_texts,
)
from fedhpc.approaches.averaging.local import (
    Auxiliaries,
    BlockTraining,
    Download,
    Job,
    Upload,
    train_jobs,
    with_updates,
    with_zeros,
)
from fedhpc.approaches.averaging.packing import require_packing
from fedhpc.approaches.averaging.personal import PersonalPart, fine_tuned
from fedhpc.approaches.averaging.poisoning import Poisoning
from fedhpc.approaches.averaging.root import Root
from fedhpc.approaches.averaging.sending import Sending
from fedhpc.approaches.averaging.together import parts_on_every_rank, require_together
from fedhpc.approaches.averaging.warm_start import WarmStart
from fedhpc.approaches.base import Approach, BlockResult, Share, accepted_indices, broadcast_versions
from fedhpc.approaches.export import export, serving, write_client_names
from fedhpc.approaches.inputs import Inputs
from fedhpc.approaches.memory import WORKER_RANKS, Held, table
from fedhpc.attacks.base import Attack, attacked, attackers
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import Outcome, over_clients
from fedhpc.methods import make_method, require_layers
from fedhpc.methods.base import Method
from fedhpc.models.experts import ExpertLoad
from fedhpc.models.generative import Generative
from fedhpc.models.parts import Parts
from fedhpc.participation.plan import Plan
from fedhpc.participation.sampling import cohort_size
from fedhpc.privacy.base import Privacy, Releases
from fedhpc.ranks.devices import memory_of, peak_memory
from fedhpc.ranks.transport.base import Transport
from fedhpc.results.record import FinalResults
from fedhpc.secure import primitives
from fedhpc.secure.masked_sum import Masking, bytes_of_neighbours
from fedhpc.secure.protocols.base import Protocol
from fedhpc.server.aggregation import Aggregation
from fedhpc.server.selection import average
from fedhpc.server.state import ParameterState
from fedhpc.training import client_state
from fedhpc.training.schedule import learning_rates, num_steps
from fedhpc.updates.cohort import Cohort

NOISE = "noise_multiplier"  # in `Averaging.decisions`


@dataclass(frozen=True)
class Combined:
    """What the server makes its step from."""

    total: Tensor  # float64 (S,): the aggregated pseudo-gradient
    auxiliary: dict[str, Tensor]  # float64 (A,) each: what clients sent beside their updates, added up, by name
    distance: float | None  # the mean sum of the clients' learning rates, with client.server_momentum
    clients: list[int]  # the accepted ones
    memory: dict[str, Tensor]  # what the aggregator keeps now; of meaning on rank 0
    spent: dict[str, Tensor]  # what privacy keeps now; of meaning on rank 0
    masking: Masking | None  # what secure aggregation sent


class Averaging(Approach[ParameterState, Download, Upload, Combined | None]):
    """Federated averaging of a payload, whose tensors the method defines; S is the size of its shared part."""

    trains_in_steps = True

    def __init__(self, inputs: Inputs, method: Method | None = None) -> None:
        """method: instead of the one that the configuration names."""
        super().__init__(inputs)
        config = self.config
        seed, max_length = config.run.seed, config.data.max_length
        self.method = method or make_method(config.method, self.base, seed, max_length)
        if self.trains_together:
            require_together(config, self.method, self.objective)
        if config.model.offload != "none" and not self.method.shares_base:
            raise UserError(
                f"method.name {config.method.name} changes the weights of the base, of which the device has a layer at "
                "a time", key="model.offload", remedy="take it out, or give a method that leaves the base as it is",
            )  # fmt: skip
        source = config.method.goes_on_from
        #: The adapter from which training goes on.
        self._adapter = None if source is None else WarmStart.of(self.method, source)
        if config.beside_theta:
            _require_same(self.method, config.method.name, config.beside_theta[0])
        if config.client.layer_lr_decay != 1.0:
            require_layers(self.method)
        if config.client.packing:
            require_packing(self.objective, self.method, max_length)
        #: What stays on the client.
        self.personal = PersonalPart(
            config, self.method, self.payload_dtype, self._adapter.payload if self._adapter else None
        )
        #: The payload in two: what is exchanged, and what stays on the client.
        self.split = self.personal.split
        #: What attackers do, and who they are.
        self.attack: Attack = registry.choice("attacks", config.attack.name)(config.attack)
        self.attackers: frozenset[int] = frozenset() if config.attack.name == "none" else self._attackers()
        poisoning = Poisoning.of(self.attack, self.base, inputs.label_targets, self.data, max_length)
        if poisoning is not None:
            train = poisoning.train(self.data, self.attackers, seed)
            self.data = replace(self.data, train=train)
        #: What is done to updates and to the model on their way, and what goes beside these. Privacy asks for plans,
        #: and these for the bytes of both.
        self.sending = Sending(config, self.method, self.personal)
        self.auxiliaries = Auxiliaries(config, self.method, self.personal)
        self._protocol: Protocol = registry.choice("secure_protocols", config.secure.name)(config.secure)
        clients = self.data.population
        sampled = cohort_size(config, clients)
        privacy: type[Privacy] = registry.choice("privacy", config.privacy.name)
        #: What the run promises to its clients, or to the owners of their examples.
        self.privacy = privacy(
            config, Releases(clients, self.split.shared.size, sampled, self._sends, inputs.decided.get(NOISE))
        )
        self.privacy.check(self.method, self.objective)
        self.rounds = int(inputs.decided.get("rounds") or self.privacy.affordable(self.rounds))
        self.training = BlockTraining(
            config, self.base, self.method, self.objective, self.data, self.personal, self.sending, self.auxiliaries,
            self.privacy, self.rounds,
        )  # fmt: skip
        self.evaluation = Evaluation(config, self.method, self.data, self.evaluator, poisoning)
        self.aggregation = Aggregation(config.server, seed, sampled if self.moves_server else None)
        needs_root = config.mode == "federated" and self.aggregation.aggregator.needs_root
        if needs_root and self.topology.group_size > 1:
            raise UserError(
                f"server.aggregator {config.server.aggregator} lets the server train, which holds no layers where the "
                "ranks of a worker hold the base together", key="runtime.worker_ranks",
                remedy="give 1, or another aggregator",
            )  # fmt: skip
        self._root = Root(config, self.data, self.rounds) if needs_root else None
        if config.masks_uploads:
            primitives.require()
            self._protocol.require(len(self.plan(1).cohort), sampled)

    @classmethod
    def spreads(cls, config: Config) -> bool:
        needs_root = config.mode == "federated" and registry.choice("aggregators", config.server.aggregator).needs_root
        # A property of those classes of which it depends on the options, or on the model.
        return not needs_root and registry.choice("methods", config.method.name).shares_base is not False

    def _attackers(self) -> frozenset[int]:
        fraction, population = self.config.attack.fraction, self.data.population.num_clients
        chosen = attackers(fraction, population, self.config.run.seed)
        if not 0 < len(chosen) < population:
            who = "nobody" if not len(chosen) else "everybody"
            raise UserError(
                f"{fraction:g} of {population} clients is {who}",
                key="attack.fraction", remedy="choose another one, or more clients (partition)",
            )  # fmt: skip
        return frozenset(chosen.tolist())

    def _sends(self, round_: int) -> tuple[int, ...]:
        """The clients that send an update in a round, in time or not."""
        return self.plan(round_).sending

    def _traffic(self, client: int) -> tuple[int, int]:
        """With secure aggregation also what a client alone has not: the keys and shares of its neighbours."""
        down, up = super()._traffic(client)
        if not self.config.masks_uploads:
            return down, up
        more_down, more_up = bytes_of_neighbours(self._protocol.degree(self.schedule.sampled))
        return down + more_down, up + more_up

    @property
    def trains_together(self) -> bool:
        return self.topology.group_size > 1 and not self.method.shares_base

    @property
    def block_size(self) -> int:
        # Clients that cannot share a base train in turn.
        return super().block_size if self.method.shares_base else 1

    @property
    def most_together(self) -> int:
        return super().most_together if self.method.shares_base else 1

    @property
    def messages(self) -> list[str]:
        adapter = self._adapter.messages if self._adapter else ()
        statement = self.privacy.statement(self.rounds)
        more = [*([statement] if statement else []), *([self._attack_message()] if self.attackers else [])]
        return [*super().messages, *self.method.messages, *adapter, *more]

    def _attack_message(self) -> str:
        some, population = sorted(self.attackers), self.data.population.num_clients
        shown = ", ".join(map(str, some[:10])) + (", ..." if len(some) > 10 else "")
        return f"attack: {self.config.attack.name} by {len(some)} of {population:,} clients: {shown}"

    @property
    def decisions(self) -> dict[str, float]:
        noise = self.privacy.noise_multiplier
        return {} if noise is None else {NOISE: noise, "rounds": self.rounds}

    @property
    def fingerprint(self) -> str:
        weights = super().fingerprint
        return weights if self._adapter is None else f"{weights} {self._adapter.digest[:16]}"

    @property
    def moves_server(self) -> bool:
        # In mode local every client trains alone.
        return self.config.mode != "local"

    @property
    def min_cohort(self) -> int:
        # Under client-level privacy whether a round takes place must not depend on who completed it.
        return 0 if self.privacy.any_cohort else max(super().min_cohort, self.aggregation.fewest)

    @property
    def keeps_client_state(self) -> bool:
        """Whether anything of the clients' side keeps something."""
        return any(keeper.keeps for keeper in self.training.keepers)

    @property
    def payload_dtype(self) -> torch.dtype:
        """The type of the exchanged and trained tensors, whatever type the base computes in."""
        return self.base.payload_dtype

    def initial_payload(self) -> Tensor:
        """The payload before the first round (P,), on the CPU."""
        return self.personal.initial_payload()

    # ---- a round

    def initial_state(self) -> ParameterState:
        """theta_0, with the server optimizer; what one client alone has trained (centralized) is taken as it is."""
        config, theta = self.config, self.split.apart(self.initial_payload())[0]
        optimizer = registry.choice("server_optimizers", config.server.optimizer)(config.server)
        tensors = self.sending.pipeline.server_tensors()
        if self.sending.downlink is not None:
            tensors |= self.sending.downlink.initial(theta)
        optimizer = optimizer if config.mode == "federated" else None
        memory = self.aggregation.initial_memory(len(theta))
        auxiliary = {one.name: one.initial_vector() for one in self.auxiliaries.every}
        averaged = average(config.evaluation.ema, config.evaluation.lawa)
        return ParameterState(theta, optimizer, auxiliary, tensors, memory, self.privacy.initial(), averaged)

    def download(self, transport: Transport, state: ParameterState | None, plan: Plan) -> Download:
        theta = sent_bytes = None
        if self.sending.downlink is not None:
            known = None
            if state is not None:
                known, sent_bytes = self.sending.downlink.send(state.theta, plan.round, plan.cohort, state.transforms)
            theta = self._on_every_rank(transport, known)
        elif self.config.mode != "local":
            theta = self._theta(transport, state)
        auxiliary: dict[str, Tensor] = {}
        for one in self.auxiliaries.every:
            vector = state.auxiliary[one.name] if state else torch.empty(one.size, dtype=self.payload_dtype)
            transport.broadcast(vector)
            auxiliary[one.name] = vector
        past = self._past(transport, state, plan)
        return Download(theta, auxiliary, self._versions(transport, state, plan.cohort), past, sent_bytes)

    def _past(self, transport: Transport, state: ParameterState | None, plan: Plan) -> dict[int, Tensor]:
        """theta (S,) of the earlier versions from which clients of this round start, on the CPU of every rank."""
        newest = plan.round - 1
        versions = sorted({plan.versions[plan.index[client]] for client in plan.training} - {newest})
        past = {v: self._on_every_rank(transport, state.past[v] if state else None) for v in versions}
        if state:
            state.keep_past(newest, plan.needed_later)
        return past

    def _theta(self, transport: Transport, state: ParameterState | None) -> Tensor:
        """theta_t (S,) on the CPU of every rank."""
        return self._on_every_rank(transport, state.theta if state else None)

    def _evaluated(self, transport: Transport, state: ParameterState | None) -> Tensor:
        """What an evaluation is of now (S,), on the CPU of every rank."""
        return self._on_every_rank(transport, state.evaluated if state else None)

    def _chosen(self, transport: Transport, state: ParameterState | None) -> Tensor:
        """What the run ends with (S,), on the CPU of every rank."""
        return self._on_every_rank(transport, state.chosen if state else None)

    def _on_every_rank(self, transport: Transport, theta: Tensor | None) -> Tensor:
        if self.trains_together:
            return parts_on_every_rank(transport, self.method, theta, torch.empty(0, dtype=self.payload_dtype))
        theta = torch.empty(self.split.shared.size, dtype=self.payload_dtype) if theta is None else theta
        transport.broadcast(theta)
        return theta

    def _versions(self, transport: Transport, state: ParameterState | None, clients: Sequence[int]) -> dict[int, int]:
        # In local mode this is all that workers wait for.
        return broadcast_versions(transport, state, clients) if self.keeps_client_state else {}

    def local(self, plan: Plan, clients: Sequence[int], down: Download) -> BlockResult[Upload]:
        result = self.training.train(plan, clients, down, self.progress.add, self.examples_that_fit)
        assert result is not None  # this rank takes it
        return result

    @property
    def joins(self) -> Hashable | None:
        return self.training.joins

    def local_in_parts(self, shares: Sequence[Share]) -> list[list[BlockResult[Upload]]]:
        if self.method.parts is not None:
            return [self._local_on_ranks(shares[0], self.method.parts)]
        if len(shares) == 1:
            return super().local_in_parts(shares)
        results: list[list[BlockResult[Upload]]] = [[] for _ in shares]

        def train(part: Sequence[tuple[int, int]]) -> None:
            jobs: dict[int, Job] = {}
            for number in dict.fromkeys(number for number, _ in part):
                one, clients = shares[number], [client for of, client in part if of == number]
                assert isinstance(one.approach, Averaging)  # as it has the same `joins`
                jobs[number] = one.approach.training.job(one.plan, clients, one.download, self.examples_that_fit)
            trained = train_jobs(list(jobs.values()), self.progress.add)
            for (number, job), outcome in zip(jobs.items(), trained, strict=True):
                results[number].append(job.training.result(job, outcome))

        def title(member: tuple[int, int]) -> str:
            approach = shares[member[0]].approach
            return f"{approach.config.run.name}: {approach.data.population.title(member[1])}"

        members = [(number, client) for number, one in enumerate(shares) for client in one.clients]
        self.in_parts(members, train, title)
        return results

    def _local_on_ranks(self, one: Share, parts: Parts) -> list[BlockResult[Upload]]:
        """`local` of a block that all ranks of a worker train together: the result is on one of them."""
        plan, clients = one.plan, one.clients
        takes = next(block.member == parts.member for block in plan.blocks if block.clients == clients)
        on_step = self.progress.add if takes else _unseen
        try:
            result = self.training.train(plan, clients, one.download, on_step, takes=takes)
        except torch.OutOfMemoryError as error:  # the others could not know that it goes on in halves
            raise UserError(
                f"{self.data.population.title(clients[0])} takes more memory than the GPU has, on {parts.size} ranks "
                "together: lower client.micro_batch or data.max_length, or set model.gradient_checkpointing"
            ) from error
        return [] if result is None else [result]

    def combine(
        self, transport: Transport, state: ParameterState | None, plan: Plan, results: Sequence[BlockResult[Upload]]
    ) -> Combined | None:
        """Aggregate the accepted updates of all ranks: `server` on a `Cohort`, where FedAvg's sum is."""
        if not self.moves_server:
            return None
        if self.privacy.any_cohort:
            results = [with_zeros(result) for result in results]
        memory = dict(state.memory) if state else self.aggregation.initial_memory(0)
        masking = self._masking(plan)
        updates, root = self._weighted(plan, results), self._root_update(state, plan)
        cohort = self._cohort(transport, plan, results, updates, memory, masking, root)
        spent = dict(state.privacy) if state else {}
        total = self.privacy.combine(transport, cohort, plan.round, self._aggregate, spent)
        auxiliary: dict[str, Tensor] = {}
        for one in self.auxiliaries.exchanged:
            rows = self._accepted_rows(results, [result.upload.auxiliary[one.name] for result in results], one.size)
            weights = one.weights(cohort.shares, self.data.population.num_clients)
            auxiliary[one.name] = cohort.replaced(rows, one.layout).weighted_sum(weights)
        distance = None if self.auxiliaries.momentum is None else self._distance(cohort, plan.round)
        return Combined(total, auxiliary, distance, cohort.clients, memory, spent, masking)

    def _distance(self, cohort: Cohort, round_: int) -> float:
        """The mean, by weight, of the sums of the learning rates that the accepted clients had in a round."""
        options, population = self.config.client, self.data.population

        @cache
        def of_steps(steps: int) -> float:
            return math.fsum(learning_rates(options, round_, self.rounds, steps))

        distances = [of_steps(num_steps(population.num_examples(client), options)) for client in cohort.clients]
        return math.fsum(cohort.shares * distances) / math.fsum(cohort.shares) if distances else 0.0

    def _masking(self, plan: Plan) -> Masking | None:
        """How the updates of a round are masked: of all clients of the cohort that have data; None where none are."""
        taking_part = [client for client in plan.cohort if client not in plan.empty]
        if not self.config.masks_uploads or not taking_part:
            return None
        return Masking(self._protocol, self.config.run.seed, plan.round, taking_part)

    def shortfall(self, plan: Plan, completed: np.ndarray) -> str:
        """Too few clients, or too few of those that can recover the masks of the others."""
        masking = self._masking(plan)
        few = super().shortfall(plan, completed)
        if few or masking is None:
            return few
        accepted = [client for client, ok in zip(plan.cohort, completed, strict=True) if ok]
        return masking.shortfall(plan.training if self.privacy.any_cohort else accepted)

    def _aggregate(self, cohort: Cohort, round_: int) -> Tensor:
        """The pseudo-gradient of server.aggregator, float64 (S,); zeros where too few clients are in the cohort."""
        if len(cohort) < self.aggregation.fewest:
            return torch.zeros(cohort.size, dtype=torch.float64)
        return self.aggregation.combine(cohort, round_)

    def _cohort(
        self,
        transport: Transport,
        plan: Plan,
        results: Sequence[BlockResult[Upload]],
        updates: Tensor,
        memory: dict[str, Tensor] | None = None,
        masking: Masking | None = None,
        root: Tensor | None = None,
    ) -> Cohort:
        """The accepted updates of all ranks, of which this one has these (c, S). Collective."""
        return Cohort(
            transport, self.split.shared, plan.cohort, self._shares(plan), accepted_indices(plan, results), updates,
            self._movement(plan), memory, masking, cohort_size(self.config, self.data.population), root,
        )  # fmt: skip

    def _root_update(self, state: ParameterState | None, plan: Plan) -> Tensor | None:
        """What the server trains on its own, (S,) on rank 0; None where nobody asks for it."""
        root = self._root
        if root is None:
            return None
        if state is None:
            return torch.empty(0)
        learnt = self.base, self.method, self.objective, self.personal, state.theta, plan.round
        (update,) = self.in_parts(
            [root.client], lambda _: root.update(*learnt, self.examples_that_fit), lambda _: "the server"
        )
        return update

    def _accepted_rows(self, results: Sequence[BlockResult[Upload]], sent: Sequence[Tensor], size: int) -> Tensor:
        """What accepted clients have sent, (c, size). sent: for each of the results (K, size)."""
        none = torch.empty(0, size, dtype=self.payload_dtype)
        used = [
            rows if result.accepted.all() else rows[torch.from_numpy(result.accepted)]
            for result, rows in zip(results, sent, strict=True)
        ]
        return torch.cat([none, *used])

    def _accepted_updates(self, results: Sequence[BlockResult[Upload]]) -> Tensor:
        return self._accepted_rows(results, [result.upload.updates for result in results], self.split.shared.size)

    def _weighted(self, plan: Plan, results: Sequence[BlockResult[Upload]]) -> Tensor:
        """The accepted updates (c, S), each times the weight that its staleness leaves it."""
        updates = self._accepted_updates(results)
        if not plan.weights:
            return updates
        weights = np.array(plan.weights)[accepted_indices(plan, results)]
        return updates * torch.from_numpy(weights).to(updates.dtype).unsqueeze(1)

    def attacked(
        self, transport: Transport, plan: Plan, results: list[BlockResult[Upload]]
    ) -> list[BlockResult[Upload]]:
        if not self.attackers.intersection(plan.training):
            return results
        cohort = self._cohort(transport, plan, results, self._accepted_updates(results))
        rows = iter(attacked(self.attack, cohort, self.attackers, plan.round, self.config.run.seed))
        return [with_updates(result, rows) for result in results]

    @property
    def more_metrics(self) -> Sequence[str]:
        return [] if self.evaluation.poisoning is None else [ATTACK_SUCCESS]

    def client_columns(self, plan: Plan) -> dict[str, np.ndarray]:
        if not self.attackers:
            return {}
        return {"attacker": np.array([client in self.attackers for client in plan.cohort])}

    def _shares(self, plan: Plan) -> np.ndarray:
        """Share of each client in the weight of the planned cohort (C,): 0 for one that does not train, in all 1."""
        counted = np.zeros(len(plan.cohort), dtype=bool)
        counted[[plan.index[client] for client in plan.training]] = True
        if self.config.server.weighting != "uniform":
            counted = counted * self.data.population.num_examples_of(plan.cohort)
        return counted / max(counted.sum(), 1)

    def _movement(self, plan: Plan) -> Callable[[int], float]:
        """How far a client's optimizer goes in this round under a constant gradient of 1, by client."""
        options, optimizer = self.config.client, self.training.optimizer

        @cache
        def of_steps(version: int, steps: int) -> float:
            return optimizer.movement(learning_rates(options, version + 1, self.rounds, steps))

        def of_client(client: int) -> float:
            steps = num_steps(self.data.population.num_examples(client), options)
            return of_steps(plan.versions[plan.index[client]], steps)

        return of_client

    def step(self, state: ParameterState, plan: Plan, combined: Combined | None) -> float:
        """Run the transforms' server halves over the aggregate, then the server optimizer's step."""
        assert combined is not None  # as moves_server says
        _expect_finite(combined.total, plan.round, "server.aggregator", self.config.server.aggregator)
        total = self.sending.pipeline.on_server(combined.total, plan.round, combined.clients, state.transforms)
        named = ", ".join(transform.name for transform in self.config.transforms)
        _expect_finite(total, plan.round, "transforms", named)
        norm: float = state.step(total)
        if self.config.mode == "federated":
            state.theta = self._on_server(state.theta)
        if state.average is not None:
            state.average.see(state.theta)
        state.memory, state.privacy = combined.memory, combined.spent
        following = {
            one.name: one.after(state.auxiliary[one.name].double(), combined.auxiliary[one.name])
            for one in self.auxiliaries.exchanged
        }
        if self.auxiliaries.momentum is not None and combined.distance is not None:
            following[self.auxiliaries.momentum.name] = self.auxiliaries.momentum.after(total, combined.distance)
        state.auxiliary = {name: vector.to(self.payload_dtype) for name, vector in following.items()}
        return norm

    def _on_server(self, theta: Tensor) -> Tensor:
        """What the method makes of theta (S,) on the server."""
        values = self.method.payload.views(self.split.join(theta, self.personal.initial_part))
        after = self.method.on_server(values)
        return theta if after is values else self.split.apart(self.method.payload.flatten(after))[0]

    def bytes_down(self, plan: Plan, download: Download | None = None) -> int:
        """The shared part and what goes beside it, to every client of the cohort.

        In an estimate also what secure aggregation sends down, and a compressed model at its full size, the most it is.
        """
        if self.config.mode != "federated":
            return 0
        beside = self.auxiliaries.bytes_down * len(plan.cohort)
        if download is not None and download.bytes is not None:
            return download.bytes + beside
        masking = self._masking(plan) if download is None else None
        told = 0 if masking is None else masking.expected_bytes(plan.training, self.split.shared.size)[1]
        return int(self.sending.bytes_down(plan.cohort).sum()) + beside + told

    def bytes_up(self, plan: Plan) -> int:
        """The updates as they are sent, and what goes beside them.

        Masked ones with what their masks take.
        """
        if self.config.mode != "federated":
            return 0
        masking = self._masking(plan)
        if masking is not None:
            return masking.expected_bytes(plan.training, self.split.shared.size)[0]
        beside = self.auxiliaries.bytes_up * len(plan.training)
        return int(self.sending.expected_bytes(plan.training, plan.round).sum()) + beside

    def bytes_fetched(self, plan: Plan, combined: Combined | None) -> int:
        """Masked updates, keys, shares and what unmasked the sum, of secure aggregation."""
        return combined.masking.bytes_up if combined and combined.masking else 0

    def bytes_told(self, plan: Plan, combined: Combined | None) -> int:
        """The neighbours' keys and shares, and who uploaded, of secure aggregation."""
        return combined.masking.bytes_down if combined and combined.masking else 0

    def spend(self, server_state: ParameterState, plan: Plan) -> dict[str, float]:
        self.privacy.account(server_state.privacy, plan.sending)
        return self.privacy.reported(server_state.privacy)

    # ---- results

    def _payloads(
        self, transport: Transport, state: ParameterState | None, round_: int, at_the_end: bool = False
    ) -> Tensor:
        """What an evaluation after `round_` is of: (1, P), or in local mode (M, P), one row per client.

        at_the_end: of the state that the run ends with. Personal parts are the initial ones, those of a client that was
        never sampled.
        """
        if self.config.mode != "local" or round_ == 0:
            theta = self._chosen(transport, state) if at_the_end else self._evaluated(transport, state)
            return self.split.join(theta.unsqueeze(0), self.personal.initial_part).to(self.base.device)
        transport.barrier()  # another rank may have written the client's file
        clients = self.plan(round_).training
        rows = [client_state.load(self.config.run_dir, c, round_)["theta"] for c in clients]
        return torch.stack(rows).to(self.base.device)

    def evaluate(self, transport: Transport, state: ParameterState | None, round_: int) -> Outcome | None:
        return self.evaluation.validation(transport, self._payloads(transport, state, round_))

    def judge(self, server_state: ParameterState, round_: int, metrics: Mapping[str, float]) -> None:
        options = self.config.evaluation
        if options.keep == "best" or options.patience is not None:
            higher_is_better = registry.choice("metrics", options.metrics[0]).higher_is_better
            better = server_state.selection.see(round_, metrics[self._judged_by], higher_is_better)
            if better and options.keep == "best":
                server_state.best = server_state.evaluated.clone()

    def ends_early(self, transport: Transport, server_state: ParameterState | None) -> bool:
        patience = self.config.evaluation.patience
        if patience is None:
            return False
        waited = torch.tensor([server_state.selection.waited if server_state else 0])
        transport.broadcast(waited)
        return int(waited) >= patience

    @property
    def _judged_by(self) -> str:
        """The metric that says which state is better, as in eval_<metric>."""
        return registry.short_name(self.config.evaluation.metrics[0])

    def _selection_lines(self, state: ParameterState) -> list[str]:
        """What to print of the choice between states."""
        best, options, lines = state.selection, self.config.evaluation, []
        if options.patience is not None and best.waited >= options.patience:
            lines.append(
                f"ended: eval_{self._judged_by} was best after round {best.round}, {best.waited} evaluations ago"
            )
        if state.average is not None:
            lines.append(f"evaluated, tested and exported: {state.average.title}")
        if state.best is not None:
            lines.append(
                f"test, /final and the adapter: the state after round {best.round}, whose eval_{self._judged_by} "
                f"{best.value:.4f} was the best"
            )
        return lines

    def finish(self, transport: Transport, state: ParameterState | None) -> FinalResults | None:
        """Test, per-client evaluation, final payload, export."""
        config = self.config
        payloads = self._payloads(transport, state, self.rounds, at_the_end=True)
        tested = self.evaluation.test(transport, payloads)
        per_client = self._per_client(transport, state, payloads) if config.evaluation.client_fraction > 0 else None
        if state is None or tested is None:
            return None
        untouched, final = tested
        summary = over_clients(per_client, config.evaluation.metrics_of_test) if per_client else {}
        layout, folder = self.method.payload, config.run_dir / "adapter"
        promise = self.privacy.promise(state.privacy)
        if config.mode == "local":
            views = layout.views(payloads.cpu())
            for i, client in enumerate(self.plan(self.rounds).training):
                one = {name: view[i] for name, view in views.items()}
                export(self.method, one, folder / str(client), config, promise)
            write_client_names(folder, self.data.population.names)
        else:
            views = layout.views(self.split.join(state.chosen, self.personal.initial_part))
            export(self.method, views, folder, config, promise)
        apart = "test, /final and the adapter: the shared part with the initial personal part of a client never sampled"
        return FinalResults(
            test=final.metrics,
            base=untouched.metrics,
            test_sampling=final.sampling,
            base_sampling=untouched.sampling,
            samples=final.samples,
            client_eval=per_client,
            client_summary=summary,
            tensors={name: view.numpy() for name, view in views.items()},
            tables={} if final.turns is None else {"turns": final.turns},
            lines=[
                *turn_lines(final.turns),
                *client_lines(summary),
                *([apart] if self.split.personal.shapes else []),
                *self._selection_lines(state),
            ],
            attributes={
                **({} if state.best is None else {"best_round": state.selection.round}),
                **self.privacy.attributes(state.privacy),
            },
        )

    def _per_client(
        self, transport: Transport, state: ParameterState | None, payloads: Tensor
    ) -> dict[str, np.ndarray] | None:
        config = self.config
        local = config.mode == "local"
        clients = self.plan(self.rounds).training if local else self.evaluation.clients_evaluated()
        results = self.evaluation.of_clients(transport, payloads, clients)
        if config.personalization.parts or config.personalization.finetune_steps:
            theta = self._chosen(transport, state)
            versions = self._versions(transport, state, clients)

            def personalize(block: Sequence[int]) -> Tensor:
                part = partial(self._personalized, theta, versions)
                return torch.cat(self.in_parts(block, part, self.data.population.title))

            personal = self.evaluation.personalized(transport, personalize, clients, self.block_size)
            if results is not None:
                results |= personal
        return results

    def _personalized(self, theta: Tensor, versions: Mapping[int, int], clients: Sequence[int]) -> Tensor:
        """(K, P): theta (S,) with what each client keeps in its version, fine-tuned where the run asks for it."""
        tensors = client_state.read(self.config.run_dir, clients, versions, [self.personal])
        start = self.split.join(theta.unsqueeze(0), self.personal.of_clients(tensors)).expand(len(clients), -1)
        learnt = self.base, self.method, self.objective, self.data, self.rounds
        return fine_tuned(self.config, *learnt, start, clients, self.examples_that_fit)

    # ---- what is exported of a checkpoint

    @property
    def has_models_of_clients(self) -> bool:
        """Whether clients end with models of their own."""
        config = self.config
        return config.mode == "local" or bool(config.personalization.parts or config.personalization.finetune_steps)

    def export_client(self, state: ParameterState, client: int, folder: Path) -> str:
        """Write the model of one client, as its last round left it, to `folder`; only where clients have some.

        Returns what privacy promises of it, in a sentence; empty where nothing.
        """
        if self.config.mode == "local":
            row = client_state.load(self.config.run_dir, client, state.versions[client])["theta"]
        else:
            row = self._personalized(state.chosen, state.versions, [client])[0].cpu()
        promise = self.privacy.promise(state.privacy)
        of_client = "That is of what the clients share: this model is one client's, as its own examples made it."
        return self._export(row, folder, f"{promise} {of_client}" if promise else "")

    def export_round(self, state: ParameterState, theta: Tensor, folder: Path) -> str:
        """Write a payload whose shared part is theta (S,), of the state's last round or an earlier one, to `folder`.

        Returns what privacy promises of it, in a sentence; empty where nothing.
        """
        shared = self.split.join(theta, self.personal.initial_part)
        return self._export(shared, folder, self.privacy.promise(state.privacy))

    def _export(self, payload: Tensor, folder: Path, promise: str) -> str:
        export(self.method, self.method.payload.views(payload), folder, self.config, promise)
        return promise

    # ---- what is said of it

    @property
    def columns(self) -> list[str]:
        of_privacy = [f"rounds/{name}" for name in self.privacy.columns]
        of_experts = (
            [f"experts/{name}" for name in ("round", "layer", "expert", "share")] if self.experts.layers else []
        )
        options = self.config.evaluation
        of_texts = (
            [f"eval_samples/{name}" for name in ("round", "prompt", "references", "text")]
            if options.samples and writes_texts(options.metrics)
            else []
        )
        return [*of_privacy, *["clients/attacker"] * bool(self.attackers), *of_experts, *of_texts]

    @cached_property
    def experts(self) -> ExpertLoad:
        return ExpertLoad(self.base)

    def attributes(self) -> dict[str, Any]:
        return {
            "payload_parameters": self.method.payload.size,
            "trainable_parameters": self.method.trainable.size,
            "personal_parameters": self.split.personal.size,
            "payload_dtype": str(self.payload_dtype).removeprefix("torch."),
        }

    def summary(self) -> str:
        size = self.split.personal.size
        apart = f", {size:,} of them personal" if size else ""
        beside = "".join(f", exchanged with {one.size:,} {one.contents}" for one in self.auxiliaries.every)
        return f"{self.method.payload.size:,} parameters{apart}{beside}"

    def rehearse(self, plan: Plan) -> None:
        """Take a step of the largest block, and write a token where samples are asked for."""
        blocks = [block for rank in self.topology.training for block in self.blocks_of(plan, rank)]
        in_one_piece = self.method.shares_base or self.topology.group_size == 1
        # The server, which rehearses where a worker is one rank, may have no GPU.
        if blocks and in_one_piece and self.base.device.type == self.placement.trains_on:
            largest = max(blocks, key=lambda block: (len(block.clients), block.cost))

            def step(part: Sequence[int]) -> None:
                self.training.rehearse(part, self.examples_that_fit)

            self.in_parts(largest.clients, step, self.data.population.title)
            if self.config.evaluation.samples and isinstance(self.base, Generative):
                views = self.method.payload.views(self.initial_payload().unsqueeze(0).to(self.base.device))
                rows = torch.zeros(1, dtype=torch.int64, device=self.base.device)
                with torch.no_grad(), self.method.attach(self.method.start(views), views, rows) as attached:
                    self.base.generate(attached, [self.data.train.prompt(0)], 1)
            self.peak = peak_memory(self.base.device)

    def _memory_lines(self, plan: Plan) -> list[str]:
        """What a rank will hold: as a step of the largest block has shown, where one was rehearsed."""
        ranks, item = self.topology.training, self.payload_dtype.itemsize
        largest = max((len(b.clients) for rank in ranks for b in self.blocks_of(plan, rank)), default=0)
        of_rank = dict.fromkeys(ranks, 0)
        for b in plan.blocks:
            of_rank[self.topology.rank_of(b.worker, b.member)] += len(b.clients)
        clients = max(of_rank.values())
        optimizer = self.training.optimizer
        copies = 2 + len(optimizer.buffers)
        if self.config.corrects_drift:  # the corrections, and the sum of the gradients
            copies += 1 if optimizer.follows_gradients else 2
        block = copies * self.method.trainable.size * item * largest
        size = self.split.shared.size + sum(one.size for one in self.auxiliaries.every)
        on_cpu, activations = self.placement.trains_on == "cpu", None
        if self.peak is not None:
            taken = self.program_bytes + block + self.weights.on_rank(self.topology.group_size)
            activations = max(self.peak - taken, 0)
        # What is sent lies on the CPU; sums are of int64 and float64 (updates/exact_sum.py).
        exchanged = size * (item + 8) if on_cpu else 0
        program = self.program_bytes if on_cpu else 0
        together, down = self.method.can_be_divided, size * item if on_cpu else 0
        held = Held(block, down * clients, exchanged, exchanged, program, activations, down, together)
        # The server may see no GPU beside workers that do.
        there = memory_of(torch.device(self.placement.trains_on)) if on_cpu or torch.cuda.is_available() else None
        divides = self.spreads(self.config) or self.method.can_be_divided
        spread = divides and not self.weights.few_bits
        sizes = WORKER_RANKS if spread else WORKER_RANKS[:1]
        return table(self.weights, held, sizes, self.topology.worker_of(0) is not None, there, on_cpu)

    def details(self, plan: Plan) -> list[str]:
        config, personal = self.config, self.split.personal
        payload, item = self.method.payload, self.payload_dtype.itemsize
        stays = f"personal: {personal.size:,} parameters in {len(personal.shapes)} tensors stay on each client"
        masking = self._masking(plan)
        dropout, hidden = config.federation.dropout, ""
        if masking is not None:
            hidden = f"secure {config.secure.name}: {masking.describe()}"
            if dropout:
                void = masking.chance_of_void(dropout, cohort_size(config, self.data.population))
                hidden += f"; with federation.dropout {dropout:g} about {void:.0%} of the rounds are void"
        clients, examples = self.fits
        fewer = f"{clients} clients, and {examples} examples of a client" if examples else f"{clients} clients"
        return [
            f"payload: {payload.size:,} parameters in {len(payload.shapes)} tensors, "
            f"{payload.size * item / 2**20:.2f} MiB",
            *([stays] if personal.shapes else []),
            *([hidden] if hidden else []),
            *([f"serving: {served}"] if (served := serving(self.method)) else []),
            *self._memory_lines(plan),
            *([f"memory is enough for {fewer} at a time: larger blocks train in parts"] if clients else []),
        ]


def _unseen(clients: float) -> None:
    """For the parts of clients that another rank counts."""


def _require_same(method: Method, name: str, key: str) -> None:
    """UserError where what is trained is not what is exchanged, so that `key` has nothing to exchange for it."""
    if method.trainable.shapes != method.payload.shapes:
        raise UserError(
            f"{key}: {name} with these options trains other parameters than it exchanges; exchange what is "
            "trained (prefix: exchange raw or mlp; lora: aggregation average or ffa)"
        )


def _expect_finite(total: Tensor, round_: int, key: str, name: str) -> None:
    """UserError where an aggregate would spoil the server's state; what the rounds before made is kept."""
    if not total.isfinite().all():
        raise UserError(f"round {round_}: {name} gave an aggregate that is not finite", key=key)
