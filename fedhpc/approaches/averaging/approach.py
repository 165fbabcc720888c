"""Averaging of parameters: clients train a payload from the server's, and their updates meet in one sum.

What a client keeps from round to round depends on the run: its own payload and its optimizer's memory in modes
centralized and local, its control variate with client.scaffold, its own part of the payload with
personalization.parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedhpc import registry
from fedhpc.approaches.base import Approach, Final, Returned, accepted_slots, broadcast_versions
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import Outcome, client_evaluation, evaluate, over_clients, subset
from fedhpc.methods._head import with_head
from fedhpc.methods.base import Method
from fedhpc.participation import Block, Plan
from fedhpc.ranks.transport.base import LoopbackTransport, Transport
from fedhpc.rng import generator
from fedhpc.server.state import Server, State
from fedhpc.task import Task
from fedhpc.training import client_state
from fedhpc.training.block import Memory, Trained, Work, train_block
from fedhpc.training.rules import scaffold
from fedhpc.training.schedule import learning_rates, num_steps
from fedhpc.updates.cohort import Cohort
from fedhpc.updates.layout import Layout, Split


@dataclass(frozen=True)
class Download:
    """What clients know of the server when a round begins, on the CPU."""

    theta: Tensor | None  # (S,): theta_t; None in local mode, where nothing is exchanged
    control: Tensor | None  # (S,): c, with client.scaffold
    versions: Mapping[int, int]  # client -> the round whose file holds its state, 0: none yet; empty where none is kept


@dataclass(frozen=True)
class Upload:
    """What a block of clients sends, on the CPU."""

    updates: Tensor  # (K, S): of the shared part, after the transforms
    changes: Tensor | None  # (K, S): of the control variates, with client.scaffold


class Averaging(Approach):
    """See the module. A method (fedhpc.methods) says what the payload is; S is the size of its shared part."""

    def __init__(self, task: Task, method: Method | None = None) -> None:
        """method: instead of the one that the configuration names."""
        super().__init__(task)
        config = self.config
        made = method or registry.load("methods", config.method.name).METHOD(config.method, self.base, config.run.seed)
        self.method = with_head(made)
        if config.client.scaffold and self.method.trainable.shapes != self.method.payload.shapes:
            raise UserError(
                f"client.scaffold: {config.method.name} with these options trains other parameters than it exchanges, "
                "so there is no control variate for them; exchange what is trained (prefix: exchange raw or mlp; lora: "
                "aggregation average or ffa)"
            )
        #: The payload in two: what is exchanged, and what stays on the client.
        self.split = _split(config, self.method)

    @property
    def block_size(self) -> int:
        """See the base class; clients that cannot share a base train in turn."""
        return super().block_size if self.method.shares_base else 1

    @property
    def together(self) -> int:
        """See the base class."""
        return super().together if self.method.shares_base else 1

    @property
    def exchanges(self) -> bool:
        """See the base class; in mode local every client goes its own way."""
        return self.config.mode != "local"

    @property
    def keeps_client_state(self) -> bool:
        """See the base class."""
        return self.config.keeps_client_state

    @property
    def payload_dtype(self) -> torch.dtype:
        """Of what is exchanged and trained, whatever the base computes in."""
        return self.base.payload_dtype

    def initial_payload(self) -> Tensor:
        """The payload before the first round (P,), on the CPU."""
        tensors = self.method.initial()
        return self.method.payload.flatten({name: t.to(self.payload_dtype) for name, t in tensors.items()})

    @cached_property
    def initial_personal(self) -> Tensor:
        """The personal part of a client that was never sampled (P - S,), on the CPU."""
        if not self.split.personal.shapes:
            return torch.empty(0, dtype=self.payload_dtype)
        return self.split.apart(self.initial_payload())[1]

    # ---- a round

    def state(self) -> Server:
        """See the base class."""
        return Server(self.config, self.split.apart(self.initial_payload())[0])

    def download(self, transport: Transport, state: State | None, plan: Plan) -> Download:
        """See the base class."""
        theta = control = None
        if self.config.corrects_drift:
            size = self.split.shared.size
            both = _server(state).with_control() if state else torch.empty(2 * size, dtype=self.payload_dtype)
            transport.broadcast(both)
            theta, control = both.split(size)
        elif self.config.mode != "local":
            theta = self._theta(transport, state)
        return Download(theta, control, self._versions(transport, state, plan.cohort))

    def _theta(self, transport: Transport, state: State | None) -> Tensor:
        """theta_t (S,) on the CPU of every rank."""
        theta = _server(state).theta if state else torch.empty(self.split.shared.size, dtype=self.payload_dtype)
        transport.broadcast(theta)
        return theta

    def _versions(self, transport: Transport, state: State | None, clients: Sequence[int]) -> dict[int, int]:
        # In local mode this is all that workers wait for.
        return broadcast_versions(transport, state, clients) if self.keeps_client_state else {}

    def local(self, plan: Plan, clients: Sequence[int], down: Download) -> Returned:
        """Train `clients` together and write what they keep. UserError where a client on its own diverged."""
        config, round_ = self.config, plan.round
        works = [Work(c, self.data.population.indices(c)) for c in clients]
        found = [self._kept(client, down.versions) for client in clients]
        change: Tensor | None = None
        if config.mode == "federated":
            trained, change, kept = self._train_federated(round_, works, found, down)
        else:
            trained, kept = self._train_alone(round_, works, found, down.theta)
        updates, personal = self.split.apart(trained.updates)
        for transform in config.transforms:
            updates = registry.load("transforms", transform.name).on_client(updates, transform)
        finite: np.ndarray = (torch.isfinite(updates).all(dim=1) & torch.isfinite(personal).all(dim=1)).numpy()
        if change is not None:
            finite &= torch.isfinite(change).all(dim=1).numpy()
        for client, state, ok in zip(clients, kept, finite, strict=True):
            if not ok and config.mode != "federated":
                raise UserError(
                    f"client {client}: training diverged in round {round_} (its parameters are not finite): "
                    "lower client.lr"
                )
            if ok and state:
                client_state.save(config.run_dir, client, round_, state)
        return Returned(
            upload=Upload(updates, change),
            reason=np.where(finite, 0, 1),
            tokens=trained.tokens,
            steps=trained.steps,
            loss_sum=trained.loss_sum,
            loss_first=trained.loss_first,
            loss_last=trained.loss_last,
            norms=torch.linalg.vector_norm(updates.double(), dim=1).numpy(),
            input_tokens=trained.input_tokens,
            padded_tokens=trained.padded_tokens,
        )

    def _kept(self, client: int, versions: Mapping[int, int]) -> dict[str, Tensor]:
        version = versions.get(client, 0)
        return client_state.load(self.config.run_dir, client, version) if version else {}

    def personal_parts(self, found: Sequence[Mapping[str, Tensor]]) -> Tensor:
        """Each client's own part of the payload (K, P - S), from what it has kept."""
        return torch.stack([state.get("personal", self.initial_personal) for state in found])

    def _train_federated(
        self, round_: int, works: Sequence[Work], found: Sequence[Mapping[str, Tensor]], down: Download
    ) -> tuple[Trained, Tensor | None, list[dict[str, Tensor]]]:
        """From theta_t, with fresh optimizers; also the changes of c_i, and what each client keeps."""
        assert down.theta is not None
        own = self.personal_parts(found)
        start = self.split.join(down.theta.unsqueeze(0), own)
        about = (works, self.data.train, self.config, round_, self.rounds)
        if down.control is None:
            trained = train_block(self.base, self.method, start, *about)
            if not self.split.personal.shapes:
                return trained, None, [{} for _ in works]
            return trained, None, [{"personal": part} for part in own - self.split.apart(trained.updates)[1]]
        zero = torch.zeros_like(down.control)
        controls = torch.stack([state.get("control", zero) for state in found])
        trained = train_block(self.base, self.method, start, *about, corrections=down.control - controls)
        change = scaffold.change(down.control, trained.updates, trained.distance)
        return trained, change, [{"control": control} for control in controls + change]

    def _train_alone(
        self, round_: int, works: Sequence[Work], found: Sequence[Mapping[str, Tensor]], theta: Tensor | None
    ) -> tuple[Trained, list[dict[str, Tensor]]]:
        """Going on with each client's optimizer, from theta or, in local mode, from its own payload."""
        rule: Any = registry.load("client_optimizers", self.config.client.optimizer)
        names = rule.state_names(self.config.client)
        memories = [
            client_state.unpack(state) if state else Memory.fresh(names, self.method.trainable.size, self.payload_dtype)
            for state in found
        ]
        if theta is not None:
            start = theta.unsqueeze(0)
        else:
            start = torch.stack([state["theta"] if state else self.initial_payload() for state in found])
        about = (works, self.data.train, self.config, round_, self.rounds)
        trained = train_block(self.base, self.method, start, *about, memories)
        kept = [client_state.pack(memory) for memory in trained.memories]
        if theta is None:
            kept = [{"theta": own, **state} for own, state in zip(start - trained.updates, kept, strict=True)]
        return trained, kept

    def combine(
        self, transport: Transport, plan: Plan, returned: Sequence[tuple[Block, Returned]]
    ) -> tuple[Tensor | None, Tensor | None] | None:
        """The aggregated pseudo-gradient of the accepted updates, and with client.scaffold 1/N of the changes of
        c_i: both float64 (S,)."""
        if not self.exchanges:
            return None
        layout, positions = self.split.shared, accepted_slots(plan, returned)
        none = torch.empty(0, layout.size, dtype=self.payload_dtype)
        used = [(back.upload, torch.from_numpy(back.reason == 0)) for _, back in returned]
        updates = torch.cat([none, *(upload.updates[ok] for upload, ok in used)])
        cohort = Cohort(transport, layout, plan.cohort, self._shares(plan), positions, updates)
        total = self._aggregated(cohort, plan) if len(cohort) else torch.zeros(layout.size, dtype=torch.float64)
        if not self.config.corrects_drift:
            return total, None
        changes = cohort.replaced(torch.cat([none, *(upload.changes[ok] for upload, ok in used)]))
        return total, changes.weighted_sum(np.full(len(cohort), 1.0 / self.data.population.num_clients))

    def _shares(self, plan: Plan) -> np.ndarray:
        """Share of each client in the weight of the planned cohort (C,): 0 for one that does not train, in all 1."""
        training = set(plan.training)
        sizes = np.array([self.data.population.num_examples(c) if c in training else 0 for c in plan.cohort])
        uniform = self.config.server.weighting == "uniform"
        counted = np.array([c in training for c in plan.cohort]) if uniform else sizes
        return counted / max(counted.sum(), 1)

    def _aggregated(self, cohort: Cohort, plan: Plan) -> Tensor:
        """The aggregated pseudo-gradient: float64 (S,), of no meaning above rank 0."""
        config = self.config
        rule = registry.load("aggregators", config.server.aggregator)
        if rule.LINEAR:
            steps = [num_steps(self.data.population.num_examples(c), config.client) for c in cohort.clients]
            rates = {n: learning_rates(config.client, plan.round, self.rounds, n) for n in set(steps)}
            return cohort.weighted_sum(rule.weights(cohort.shares, [rates[n] for n in steps], config.client))
        weights = torch.from_numpy(cohort.shares)
        return cohort.by_coordinate(lambda values: rule.combine(values, weights, config.server))

    def step(self, state: Any, plan: Plan, combined: Any) -> float:
        """See the base class."""
        total, change = combined
        norm: float = state.step(total)
        if change is not None:
            state.correct(change)
        return norm

    def exchanged_bytes(self, plan: Plan, down: Any = None) -> tuple[int, int]:
        """Shared parts, with client.scaffold control variates too."""
        if self.config.mode != "federated":
            return 0, 0
        each = self.payload_dtype.itemsize * (2 if self.config.corrects_drift else 1)
        down = self.split.shared.size * len(plan.cohort)
        up = sum(self.method.numbers_sent(c) - self.split.personal.size for c in plan.training)
        return each * down, each * up

    # ---- results

    def _payloads(self, transport: Transport, state: State | None, round_: int) -> Tensor:
        """What an evaluation after `round_` is of: (1, P), or in local mode (M, P), one row per client.

        Personal parts are the initial ones, those of a client that was never sampled.
        """
        if self.config.mode != "local" or round_ == 0:
            theta = self._theta(transport, state).unsqueeze(0)
            return self.split.join(theta, self.initial_personal).to(self.base.device)
        transport.barrier()  # another rank may have written the client's file
        clients = self.plan(round_).training
        rows = [client_state.load(self.config.run_dir, c, round_)["theta"] for c in clients]
        return torch.stack(rows).to(self.base.device)

    def evaluate(self, transport: Transport, state: State | None, round_: int) -> Outcome | None:
        """See the base class."""
        config, examples = self.config, self.data.validation
        return evaluate(
            self.base,
            self.method,
            self._payloads(transport, state, round_),
            examples,
            subset(len(examples), config.evaluation.max_examples),
            config.evaluation.metrics,
            config.evaluation,
            config.runtime.precision,
            transport,
            label_targets=self.label_targets,
        )

    def finish(self, transport: Transport, state: State | None) -> Final | None:
        """Test, per-client evaluation, final payload, export."""
        config, test = self.config, self.data.test
        limit = config.evaluation.test_max_examples or config.evaluation.max_examples
        indices = subset(len(test), limit)
        payloads = self._payloads(transport, state, self.rounds)

        def on_test(method: Method | None, samples: int) -> Outcome | None:
            return evaluate(
                self.base,
                method,
                payloads,
                test,
                indices,
                config.evaluation.metrics_of_test,
                config.evaluation,
                config.runtime.precision,
                transport,
                samples=samples,
                label_targets=self.label_targets,
            )

        untouched = on_test(None, 0)
        final = on_test(self.method, config.evaluation.samples)
        per_client = self._per_client(transport, state, payloads) if config.evaluation.client_fraction > 0 else None
        if state is None or final is None or untouched is None:
            return None
        layout, folder = self.method.payload, config.run_dir / "adapter"
        if config.mode == "local":
            views = layout.views(payloads.cpu())
            for i, client in enumerate(self.plan(self.rounds).training):
                self.method.export({name: view[i] for name, view in views.items()}, folder / str(client))
        else:
            views = layout.views(self.split.join(_server(state).theta, self.initial_personal))
            self.method.export(views, folder)
        apart = "test, /final and the adapter: the shared part with the initial personal part of a client never sampled"
        return Final(
            test=final.metrics,
            base=untouched.metrics,
            samples=final.samples,
            client_eval=per_client,
            tensors={name: view.numpy() for name, view in views.items()},
            lines=[
                *(_client_lines(over_clients(per_client)) if per_client else []),
                *([apart] if self.split.personal.shapes else []),
            ],
        )

    def _per_client(self, transport: Transport, state: State | None, payloads: Tensor) -> dict[str, np.ndarray] | None:
        config = self.config
        clients = self.plan(self.rounds).training if config.mode == "local" else self._evaluated_clients()
        found = self._evaluate_clients(payloads, clients, transport)
        if config.personalization.parts or config.personalization.finetune_steps:
            personal = self._evaluate_personal(transport, state, clients)
            if found is not None and personal is not None:
                found |= personal
        return found

    def _evaluated_clients(self) -> list[int]:
        """Clients of the per-client evaluation: all, or a seeded sample of a large population."""
        n, limit = self.data.population.num_clients, self.config.evaluation.max_clients
        if n <= limit:
            return list(range(n))
        chosen = generator(self.config.run.seed, "evaluated clients").choice(n, limit, replace=False)
        return sorted(int(c) for c in chosen)

    def _evaluate_clients(
        self, payloads: Tensor, clients: Sequence[int], transport: Transport
    ) -> dict[str, np.ndarray] | None:
        """`client_evaluation` of `payloads` (1 or M, P) on the clients' held-out examples. Collective."""
        options = self.config.evaluation
        return client_evaluation(
            self.base,
            self.method,
            payloads.to(self.base.device),
            self.data.train,
            clients,
            [self.data.population.held_out(c) for c in clients],
            options,
            self.config.runtime.precision,
            transport,
            label_targets=self.label_targets if "accuracy" in options.metrics_of_test else None,
        )

    def _evaluate_personal(
        self, transport: Transport, state: State | None, clients: Sequence[int]
    ) -> dict[str, np.ndarray] | None:
        """Per-client results with each client's own part and after its fine-tuning, `_personal` behind their names."""
        theta = self._theta(transport, state)
        versions = self._versions(transport, state, clients)
        metrics = ["loss", *(["accuracy"] if "accuracy" in self.config.evaluation.metrics_of_test else [])]
        # Blocks do not depend on the number of ranks, and each slot is filled by one of them.
        slots = torch.zeros(len(metrics), len(clients), dtype=torch.float64)
        for number, begin in enumerate(range(0, len(clients), self.block_size)):
            if transport.evaluator(number) == transport.rank:
                block = clients[begin : begin + self.block_size]
                own = self.personal_parts([self._kept(c, versions) for c in block])
                start = self.split.join(theta.unsqueeze(0), own).expand(len(block), -1)
                columns = self._evaluate_clients(self.fine_tuned(start, block), block, LoopbackTransport())
                assert columns is not None
                found = torch.from_numpy(np.stack([columns[metric] for metric in metrics]))
                slots[:, begin : begin + self.block_size] = found
        transport.reduce_sum(slots)
        if state is None:
            return None
        return {f"{metric}_personal": slot.numpy() for metric, slot in zip(metrics, slots, strict=True)}

    def fine_tuned(self, payloads: Tensor, clients: Sequence[int]) -> Tensor:
        """(K, P) after personalization.finetune_steps local steps of each client from its row of `payloads` (K, P).

        The optimizer is fresh and the learning rate constant. A client without training examples stays where it is.
        """
        config, steps = self.config, self.config.personalization.finetune_steps
        works = [Work(c, self.data.population.indices(c)) for c in clients]
        rows = [i for i, work in enumerate(works) if len(work.indices)]
        if not steps or not rows:
            return payloads
        constant = {"steps": steps, "epochs": None, "schedule": "constant", "warmup": 0.0}
        config = config.model_copy(update={"client": config.client.model_copy(update=constant)})
        after = self.rounds + 1  # of draws that no round has made
        about = ([works[i] for i in rows], self.data.train, config, after, after)
        tuned = payloads.clone()
        tuned[rows] -= train_block(self.base, self.method, payloads[rows], *about).updates
        return tuned

    # ---- what is said of it

    def attributes(self) -> dict[str, Any]:
        """See the base class."""
        return {
            "payload_parameters": self.method.payload.size,
            "trainable_parameters": self.method.trainable.size,
            "personal_parameters": self.split.personal.size,
            "payload_dtype": str(self.payload_dtype).removeprefix("torch."),
        }

    def summary(self) -> str:
        """See the base class."""
        twice = ", exchanged with control variates of that size" if self.config.corrects_drift else ""
        kept = self.split.personal.size
        apart = f", {kept:,} of them personal" if kept else ""
        return f"{self.method.payload.size:,} parameters{apart}{twice}"

    def details(self, plan: Plan) -> list[str]:
        """See the base class."""
        config, personal = self.config, self.split.personal
        payload, state, item = self.method.payload, self.method.trainable.size, self.payload_dtype.itemsize
        base_bytes = sum(p.numel() * p.element_size() for p in self.base.model.parameters())
        rule: Any = registry.load("client_optimizers", config.client.optimizer)
        copies = 2 + len(rule.state_names(config.client))
        largest = max((len(b.clients) for w in self.workers for b in self.blocks_of(plan, w)), default=0)
        held = max((sum(len(b.clients) for b in plan.blocks if b.worker == w) for w in self.workers), default=0)
        update = self.split.shared.size * item * (2 if config.corrects_drift else 1)
        stays = f"personal: {personal.size:,} parameters in {len(personal.shapes)} tensors stay on each client"
        return [
            f"payload: {payload.size:,} parameters in {len(payload.shapes)} tensors, "
            f"{payload.size * item / 2**20:.2f} MiB",
            *([stays] if personal.shapes else []),
            f"memory per worker without activations: {base_bytes / 2**20:.1f} MiB base, "
            f"{copies * state * item * largest / 2**20:.1f} MiB block, {update * held / 2**20:.1f} MiB updates",
        ]


def _server(state: State) -> Server:
    assert isinstance(state, Server)
    return state


def _split(config: Config, method: Method) -> Split:
    """The payload with what matches personalization.parts apart."""
    names, patterns = list(method.payload.shapes), config.personalization.parts
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join([*names[:6], *(["..."] if len(names) > 7 else names[6:7]), *names[7:][-1:]])
            raise UserError(f"personalization.parts: no tensor of the payload matches '{pattern}'; it has: {shown}")
    own = {n: s for n, s in method.payload.shapes.items() if any(fnmatchcase(n, p) for p in patterns)}
    if len(own) == len(names):
        raise UserError(
            "personalization.parts: all tensors of the payload match, so nothing would be exchanged: use mode local"
        )
    if own and method.trainable.shapes != method.payload.shapes:
        raise UserError(
            f"personalization.parts: {config.method.name} with these options trains other parameters than it "
            "exchanges, so none of them can stay on the client; exchange what is trained"
        )
    return Split(method.payload, Layout(own))


def _client_lines(summary: Mapping[str, Any]) -> list[str]:
    """A line for each per-client result."""
    columns = dict.fromkeys(name.partition("/")[0] for name in summary)
    return [
        f"clients' {name.replace('_', ' ')}: mean {summary[f'{name}/mean']:.4f}, worst 10 % "
        f"{summary[f'{name}/worst_10_percent']:.4f}, standard deviation {summary[f'{name}/std']:.4f}"
        for name in columns
    ]


APPROACH = Averaging
