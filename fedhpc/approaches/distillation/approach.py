"""Knowledge distillation: models teach each other on a public set, and no parameters are exchanged.

A round follows FedMD (Li and Wang 2019, arXiv 1910.03581, algorithm 1, which calls its steps digest and revisit):

- the server sends what is likely at every supervised position of the public set, according to the ensemble of the last
  round (FedMD) or to the server's own model (FedMKT, Fan et al. 2024, arXiv 2406.02224; FedCoLLM, arXiv 2411.11707);
- a client learns from that (digest), then from its private data (revisit), and sends what is likely according to its
  own model. Its parameters stay on it from round to round, so clients may have different bases and methods (`groups`);
- the server's ensemble is the weighted mean of the clients (ensemble.py), from which its student learns, as in FedDF
  (Lin et al. 2020, arXiv 2006.07242, algorithm 1). FedDF starts the student from the average of the clients'
  parameters, one for each architecture; here it continues from its own, so no parameters are sent.

The bytes of each direction are the positions of the public set times a record of `top_k` classes (knowledge.Format),
however large the models are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fedhpc import data
from fedhpc.approaches.base import Approach, BlockResult, accepted_indices, broadcast_versions
from fedhpc.approaches.distillation.ensemble import MOST_EXAMPLES, exchange
from fedhpc.approaches.distillation.knowledge import (
    Format,
    Knowledge,
    num_classes,
    targets_of,
    with_targets_where_unknown,
)
from fedhpc.approaches.distillation.learner import Learner, LearnerGroup, group_of
from fedhpc.approaches.export import export
from fedhpc.approaches.inputs import Inputs
from fedhpc.config import Config
from fedhpc.data import Data
from fedhpc.data.tokens import tokenizer_content
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import Outcome, subset
from fedhpc.methods.base import Method
from fedhpc.models.base import Base, Predictor
from fedhpc.models.load import load_tokenizer, model_class, stored_classes
from fedhpc.objectives.base import PredictedObjective
from fedhpc.participation.plan import Plan
from fedhpc.ranks.transport.base import Transport
from fedhpc.results.record import FinalResults
from fedhpc.rng import generator
from fedhpc.server.state import ServerState
from fedhpc.training import client_state
from fedhpc.training.block import Work, train_block
from fedhpc.training.client_state import OwnPayload
from fedhpc.training.local import LocalTraining
from fedhpc.updates.cohort import accepted


@dataclass(frozen=True)
class GroupedData(Data):
    """The data of a run, in the tokens of the server and in those of every group; None for a group with the same."""

    groups: tuple[Data | None, ...] = ()


@dataclass(frozen=True)
class Download:
    """What clients get from the server at the beginning of a round."""

    knowledge: Knowledge | None  # None as long as there is nothing to learn from
    versions: Mapping[int, int]


class StudentState(ServerState):
    """The server's state: the student's payload, and the knowledge that is sent in the next round."""

    def __init__(self, theta: Tensor) -> None:
        """theta: (P,), on the CPU."""
        super().__init__()
        self.theta = theta
        self.knowledge: Knowledge | None = None

    def tensors(self) -> dict[str, np.ndarray]:
        knowledge = self.knowledge
        tensors: dict[str, np.ndarray] = {"theta": self.theta.numpy()}
        if knowledge is not None:
            tensors |= {"knowledge.index": knowledge.index, "knowledge.probability": knowledge.probability}
        return {**tensors, **super().tensors()}

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        super().load(tensors)
        self.theta = torch.from_numpy(tensors["theta"].copy())
        if "knowledge.index" in tensors:
            self.knowledge = Knowledge(tensors["knowledge.index"].copy(), tensors["knowledge.probability"].copy())


class Distillation(Approach[StudentState, Download, Tensor, Knowledge | None]):
    """Clients and a student on the server teach each other by their predictions on a public set."""

    trains_in_steps = True
    server_trains = True  # its student

    base: Predictor
    objective: PredictedObjective

    reasons: ClassVar[tuple[str, ...]] = (
        "",
        "its parameters are not finite",
        "its predictions on the public set are not finite",
    )

    def __init__(self, inputs: Inputs) -> None:
        super().__init__(inputs)
        options, grouped = self.config.method, self.data
        assert isinstance(grouped, GroupedData)
        self.student = Learner(self.config, options.student, grouped, self.base, self.objective)
        listed = [(_model(self.config, group.model), group.method, group.share) for group in options.groups]
        listed = listed or [(self.config.model, options.student, 1.0)]  # `read` gives None for it
        self.groups = [
            LearnerGroup(self.config, model, method, of_group, self.student)
            for (model, method, _), of_group in zip(listed, grouped.groups, strict=True)
        ]
        for learner in (self.student, *(group for group in self.groups if group.model == self.config.model)):
            learner.method  # noqa: B018  made now, so that an error about it comes before the run
        self._shares = [share for _, _, share in listed]
        classes = num_classes(self.base)
        k = classes if options.top_k is None else min(options.top_k, classes)
        weighted = options.aggregation == "entropy" or any(group.aligned for group in self.groups)
        self._up, self._down = Format(classes, k, weighted), Format(classes, k, weighted=False)
        self._targets = targets_of(self.objective, self.student.public)

    @classmethod
    def read(cls, config: Config, tokenizer: Any, model: type[Base], write_cache: bool) -> GroupedData:
        """Load the splits and the public set in the tokens of the server and of every group."""
        public, head = config.method.public, stored_classes(config.model)
        of_server = data.load_data(config, tokenizer, model, write_cache, public, head)
        groups: list[Data | None] = []
        by_content: dict[str, Data] = {}  # of the tokenizer
        messages = list(of_server.messages)
        for i, group in enumerate(config.method.groups):
            of_group = _model(config, group.model)
            groups.append(None)
            if of_group == config.model:
                continue
            key = f"method.groups[{i}].model"
            try:
                theirs, their_class = load_tokenizer(of_group), model_class(of_group)
            except UserError as error:
                raise error.but(key=key) from error
            if their_class.task != model.task:
                raise UserError(
                    f"{key}: '{of_group.name}' is trained as {their_class.task} and the server's model as "
                    f"{model.task}: they answer different questions; choose models of one kind"
                )
            content = tokenizer_content(theirs)
            if content == tokenizer_content(tokenizer):
                continue
            if content not in by_content:
                changed = config.model_copy(update={"model": of_group})
                by_content[content] = data.load_data(changed, theirs, model, write_cache, public, head)
                messages += [f"{key}: {line}" for line in by_content[content].messages if line not in messages]
            same = model.has_target and _same_tokens(tokenizer, of_server, theirs, by_content[content])
            if model.has_target and not same and config.method.align == "none":
                raise UserError(
                    f"{key}: '{of_group.name}' has other tokens than '{config.model.name}', so the predictions of "
                    "one mean nothing to the other; method.align edit_distance maps the one to the other"
                )
            groups[-1] = None if same else by_content[content]
        every = "".join(d.fingerprint for d in (of_server, *by_content.values()))
        fingerprint = hashlib.sha256(every.encode()).hexdigest()
        parts = {field.name: getattr(of_server, field.name) for field in fields(of_server)}
        parts |= {"fingerprint": fingerprint, "messages": messages}
        return GroupedData(**parts, groups=tuple(groups) or (None,))

    @property
    def keeps_client_state(self) -> bool:
        return True  # its own parameters

    # ---- a round

    def initial_state(self) -> StudentState:
        return StudentState(self.student.initial)

    def download(self, transport: Transport, state: ServerState | None, plan: Plan) -> Download:
        return Download(self._known(transport, state), broadcast_versions(transport, state, plan.cohort))

    def _known(self, transport: Transport, state: ServerState | None) -> Knowledge | None:
        if self.config.method.down == "none":
            return None
        known = _student(state).knowledge if state else None
        there = torch.tensor([known is not None], dtype=torch.uint8)
        transport.broadcast(there)
        if not there:
            return None
        size = (len(self._targets), self._down.record_bytes)
        records = torch.empty(size, dtype=torch.uint8) if known is None else self._down.pack(known)
        transport.broadcast(records)
        return self._down.unpack(records)

    def local(self, plan: Plan, clients: Sequence[int], down: Download) -> BlockResult[Any]:
        """Let clients learn from the server's knowledge, train on private data, and predict the public set."""
        count = len(clients)
        reason, tokens, steps = (np.zeros(count, np.int64) for _ in range(3))
        loss_sum, first, last, norms = (np.zeros(count) for _ in range(4))
        upload = torch.zeros(count, len(self._targets), self._up.record_bytes, dtype=torch.uint8)
        padded_tokens, fit = 0, self.examples_that_fit
        for group, indices in self._parts(clients):
            members = [clients[i] for i in indices]
            start = self._client_payloads(group, members, down.versions)
            payloads, options = start, self.config.method
            if down.knowledge is not None:
                knowledge = group.from_server(down.knowledge)
                learnt = group.learn(payloads, members, knowledge, options.digest, plan.round, self.rounds, fit)
                payloads = payloads - learnt.updates
                padded_tokens += learnt.padded_tokens
            works = [Work(c, self.data.population.indices(c)) for c in members]
            local = LocalTraining.of(self.config, plan.round, self.rounds, fit)
            trained = train_block(group.base, group.method, group.objective, payloads, works, group.data.train, local)
            payloads = payloads - trained.updates
            finite = torch.isfinite(payloads).all(dim=1).tolist()
            for i, payload, is_finite, knowledge_up in zip(
                indices, payloads, finite, group.knowledge_for_server(payloads, self._up.k), strict=True
            ):
                reason[i] = 1 if not is_finite else 2 if knowledge_up is None else 0
                if not reason[i]:
                    assert knowledge_up is not None
                    upload[i] = self._up.pack(knowledge_up)
                    client_state.save(self.config.run_dir, clients[i], plan.round, {"theta": payload.clone()})
            tokens[indices], steps[indices] = trained.tokens, trained.steps
            loss_sum[indices], first[indices], last[indices] = trained.loss_sum, trained.loss_first, trained.loss_last
            norms[indices] = torch.linalg.vector_norm((start - payloads).double(), dim=1).numpy()
            padded_tokens += trained.padded_tokens
        bytes_up = np.full(count, self._record_bytes_up)
        return BlockResult(
            tuple(clients), upload, reason, tokens, steps, loss_sum, first, last, norms, bytes_up, padded_tokens
        )

    def _parts(self, clients: Sequence[int]) -> Iterator[tuple[LearnerGroup, list[int]]]:
        """The indices of the clients that can train together, with their group."""
        of = [group_of(self._shares, self.config.run.seed, client) for client in clients]
        for number, group in enumerate(self.groups):
            indices = [i for i, chosen in enumerate(of) if chosen == number]
            size = len(indices) if indices and group.method.shares_base else 1
            for start in range(0, len(indices), size):
                yield group, indices[start : start + size]

    def _client_payloads(self, group: LearnerGroup, clients: Sequence[int], versions: Mapping[int, int]) -> Tensor:
        """The payload that stays on each client (K, P); the initial one for a client that was never sampled."""
        keeper = OwnPayload(lambda: group.initial)
        return keeper.of_clients(client_state.read(self.config.run_dir, clients, versions, [keeper]))

    def combine(
        self, transport: Transport, state: ServerState | None, plan: Plan, results: Sequence[BlockResult[Any]]
    ) -> Knowledge | None:
        """Combine the knowledge of the accepted clients into the ensemble's."""
        positions = accepted_indices(plan, results)
        chosen, owners = accepted(transport, positions, len(plan.cohort))
        if not len(chosen):
            return None
        none = torch.empty(0, len(self._targets), self._up.record_bytes, dtype=torch.uint8)
        records = torch.cat([none, *(result.upload[torch.from_numpy(result.accepted)] for result in results)])
        weights = self._weights([plan.cohort[i] for i in chosen])
        if weights.sum() > MOST_EXAMPLES:
            raise UserError(
                f"server.weighting: the cohort has {weights.sum():,} examples and weights are exact up to "
                f"{MOST_EXAMPLES:,}: use uniform"
            )
        return exchange(transport, positions, records, owners, weights, self._up, self._down.k)

    def _weights(self, clients: Sequence[int]) -> np.ndarray:
        """The weight n_i of each client: int64 (C,)."""
        if self.config.server.weighting == "uniform":
            return np.ones(len(clients), np.int64)
        return np.array([self.data.population.num_examples(c) for c in clients], np.int64)

    def step(self, state: Any, plan: Plan, combined: Any) -> float:
        """Let the student learn from the ensemble; returns the L2 norm of its move."""
        before, options = state.theta, self.config.method
        knowledge = with_targets_where_unknown(combined, self._targets)
        state.theta = self._taught(before, knowledge, plan.round)
        state.knowledge = knowledge
        if options.down == "server":
            (state.knowledge,) = self.student.knowledge(state.theta[None])
        if not bool(torch.isfinite(state.theta).all()) or state.knowledge is None:
            raise UserError(
                f"the server's model diverged in round {plan.round} (it is not finite): lower method.distil.lr"
            )
        return float(torch.linalg.vector_norm(state.theta.double() - before.double()))

    def _taught(self, theta: Tensor, knowledge: Knowledge | None, round_: int) -> Tensor:
        """The student's payload (P,) after a round on the public set."""
        nobody = self.data.population.num_clients  # the server's draws are those of a client number that nobody has
        learning = self.config.method.distil
        trained = self.student.learn(theta[None], [nobody], knowledge, learning, round_, self.rounds)
        return theta - trained.updates[0]

    @property
    def _record_bytes_up(self) -> int:
        """How many bytes a client sends: a record for each position of the public set."""
        return len(self._targets) * self._up.record_bytes

    def bytes_down(self, plan: Plan, download: Download | None = None) -> int:
        """Records of all positions; nothing is sent before there is a first ensemble."""
        if self.config.method.down == "none" or (download is not None and download.knowledge is None):
            return 0
        return len(self._targets) * self._down.record_bytes * len(plan.cohort)

    def bytes_up(self, plan: Plan) -> int:
        return self._record_bytes_up * len(plan.training)

    # ---- results

    def _theta(self, transport: Transport, state: ServerState | None) -> Tensor:
        """The student's payload (1, P) on the device of every rank."""
        theta = _student(state).theta.clone() if state else torch.empty_like(self.student.initial)
        transport.broadcast(theta)
        return theta[None].to(self.base.device)

    def evaluate(self, transport: Transport, state: ServerState | None, round_: int) -> Outcome | None:
        """Evaluate the student."""
        config, examples = self.config, self.data.validation
        return self.evaluator(transport).evaluate(
            self.student.method,
            self._theta(transport, state),
            examples,
            subset(len(examples), config.evaluation.max_examples),
            config.evaluation.metrics,
        )

    def finish(self, transport: Transport, state: ServerState | None) -> FinalResults | None:
        """Test the student and the models it is compared with, and export the student."""
        config, method = self.config, self.student.method
        theta = self._theta(transport, state)
        outcomes = {"student": self._test(transport, method, theta, config.evaluation.samples)}
        outcomes["base"] = self._test(transport, None, theta, 0)
        if config.method.alone:
            alone = StudentState(self._trained_alone()) if state else None
            outcomes["alone"] = self._test(transport, method, self._theta(transport, alone), 0)
        ensemble = self._test_ensemble(transport, state)
        if state is None or ensemble is None:
            return None
        tested = {name: outcome.metrics for name, outcome in outcomes.items() if outcome} | {"ensemble": ensemble}
        views = method.payload.views(_student(state).theta)
        export(method, views, config.run_dir / "adapter", config)
        student, base = outcomes["student"], outcomes["base"]
        assert student is not None and base is not None
        return FinalResults(
            test=tested["student"],
            base=tested["base"],
            test_sampling=student.sampling,
            base_sampling=base.sampling,
            samples=student.samples,
            tensors={name: view.numpy() for name, view in views.items()},
            tables={"comparison": _columns(tested)},
            lines=[*_lines(tested), self._bytes_line()],
        )

    def _test(self, transport: Transport, method: Method | None, payloads: Tensor, samples: int) -> Outcome | None:
        metrics = self.config.evaluation.metrics_of_test
        evaluator, tested = self.evaluator(transport), self._tested()
        return evaluator.evaluate(method, payloads, self.data.test, tested, metrics, samples, intervals=True)

    def _tested(self) -> np.ndarray:
        return subset(len(self.data.test), self.config.evaluation.test_max_examples)

    def _trained_alone(self) -> Tensor:
        """The student's payload after as many steps on the public set's targets, without any knowledge."""
        theta = self.student.initial
        for round_ in range(1, self.rounds + 1):
            theta = self._taught(theta, None, round_)
        return theta

    def _test_ensemble(self, transport: Transport, state: ServerState | None) -> dict[str, float] | None:
        """Test the weighted mean of the clients' predictions; the metrics on rank 0. Collective.

        They are the loss, if all groups have the server's tokens, and the accuracy. The clients are those that have
        been sampled in any round; of many, a seeded sample.
        """
        n, limit = self.data.population.num_clients, self.config.evaluation.max_clients
        rng = generator(self.config.run.seed, "evaluated clients")
        chosen = range(n) if n <= limit else sorted(rng.choice(n, limit, replace=False).tolist())
        versions = broadcast_versions(transport, state, chosen)
        clients = [c for c in chosen if versions[c]]
        weights = self._weights(clients)
        targets = self.label_targets if "accuracy" in self.config.evaluation.metrics_of_test else None
        indices, test = self._tested(), self.data.test
        same_tokens = not any(group.aligned for group in self.groups)
        # Each block has its own row, which one rank fills, so the sums do not depend on the number of ranks.
        blocks = [clients[begin : begin + self.block_size] for begin in range(0, len(clients), self.block_size)]
        tokens = int(self.objective.num_supervised(test, indices).sum()) if same_tokens else 0
        of_tokens = torch.zeros(len(blocks), tokens, dtype=torch.float64)
        of_labels = torch.zeros(len(blocks), len(indices), len(targets or ()), dtype=torch.float64)
        for number, block in enumerate(blocks):
            if transport.evaluator(number) != transport.rank:
                continue
            for group, indices_in_block in self._parts(block):
                members = [block[i] for i in indices_in_block]
                probabilities, labels = replace(self.evaluator(transport), base=group.base).mixed_probabilities(
                    group.method,
                    self._client_payloads(group, members, versions).to(group.base.device),
                    self._weights(members) / weights.sum(),
                    group.data.test,
                    indices,
                    labels=targets is not None,
                )
                if same_tokens:
                    of_tokens[number] += torch.from_numpy(probabilities)
                if labels is not None:
                    of_labels[number] += torch.from_numpy(labels)
        transport.reduce_sum(of_tokens)
        transport.reduce_sum(of_labels)
        if state is None:
            return None
        metrics = {}
        if tokens and clients:
            metrics["loss"] = float(-of_tokens.sum(dim=0).log().mean())
        if targets is not None and clients and test.labels is not None:
            right = of_labels.sum(dim=0).argmax(dim=1).numpy() == test.labels[indices]
            metrics["accuracy"] = float(right.mean())
        return metrics

    # ---- what is said of it

    def attributes(self) -> dict[str, Any]:
        # A client sends `public_positions` records of `record_bytes`.
        return {
            "payload_parameters": self.student.method.payload.size,
            "trainable_parameters": self.student.method.trainable.size,
            "public_examples": len(self.student.public),
            "public_positions": len(self._targets),
            "record_bytes": self._up.record_bytes,
        }

    def summary(self) -> str:
        student = self.config.method.student.name
        return f"{self.student.method.payload.size:,} parameters of a student by {student}, taught by {self._who()}"

    def _who(self) -> str:
        described = self.config.method.groups or [None]
        named = [
            f"{self.config.method.student.name} of {self.config.model.name}"
            if group is None
            else f"{group.method.name} of {group.model or self.config.model.name}"
            for group in described
        ]
        total = sum(self._shares)
        return " and ".join(f"{s / total:.0%} {name}" for s, name in zip(self._shares, named, strict=True))

    def details(self, plan: Plan) -> list[str]:
        sent = "all" if self._up.has_all_classes else f"{self._up.k} of"
        held = max(sum(len(b.clients) for b in self.blocks_of(plan, rank)) for rank in self.topology.training)
        each = self._up.record_bytes * len(self._targets)
        return [
            f"public set: {len(self.student.public):,} examples, {len(self._targets):,} positions, {sent} "
            f"{self._up.classes:,} classes each: {self._up.record_bytes} bytes a position, {each / 2**20:.2f} MiB a "
            "client",
            f"memory per worker without models: {held * each / 2**20:.1f} MiB of what its clients send",
        ]

    def _bytes_line(self) -> str:
        up = self._up.record_bytes * len(self._targets)
        averaged = self.student.initial.numel() * self.student.initial.element_size()
        return (
            f"bytes that a client sends in a round: {up:,}; averaging the student's parameters would be {averaged:,} "
            f"({up / averaged:.3g} times as many are sent)"
        )


def _model(config: Config, name: str | None) -> Any:
    """The section `model` with another name; without revision and trust_remote_code, which are about one model."""
    if name is None or name == config.model.name:
        return config.model
    return config.model.model_copy(update={"name": name, "revision": None, "trust_remote_code": False})


def _same_tokens(one: Any, of_one: Data, other: Any, of_other: Data) -> bool:
    """Whether two tokenizers, whose files differ, have the same vocabulary and give the same tokens for the data."""
    if one.get_vocab() != other.get_vocab() or of_one.public is None or of_other.public is None:
        return False
    pairs = zip(
        (of_one.public, of_one.train, of_one.test), (of_other.public, of_other.train, of_other.test), strict=True
    )
    return all(np.array_equal(a.ids, b.ids) and np.array_equal(a.offsets, b.offsets) for a, b in pairs)


def _student(state: ServerState) -> StudentState:
    assert isinstance(state, StudentState)
    return state


_ARMS = {
    "student": "student",
    "ensemble": "the clients' ensemble",
    "alone": "the same student on the public set's targets alone",
    "base": "untouched base",
}


def _columns(tested: Mapping[str, Mapping[str, float]]) -> dict[str, np.ndarray]:
    """The columns of /tables/comparison: a row for each model, NaN for metrics that it was not tested with."""
    arms = [arm for arm in _ARMS if arm in tested]
    metrics = list(tested["student"])
    return {
        "model": np.array(arms),
        **{metric: np.array([tested[arm].get(metric, np.nan) for arm in arms]) for metric in metrics},
    }


def _lines(tested: Mapping[str, Mapping[str, float]]) -> list[str]:
    """One line for each metric of the student, with the other models that have it."""
    return [
        f"test {metric}: "
        + ", ".join(f"{name} {tested[arm][metric]:.4f}" for arm, name in _ARMS.items() if metric in tested.get(arm, {}))
        for metric in tested["student"]
    ]
