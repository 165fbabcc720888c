"""What every rank knows before the first round: model, method, data, population and plan, loaded and checked."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fedhpc import data, registry
from fedhpc.config import Config
from fedhpc.data import Data
from fedhpc.data.templates import parse
from fedhpc.errors import UserError
from fedhpc.kinds.base import Kind
from fedhpc.methods._head import with_head
from fedhpc.methods.base import Method
from fedhpc.models import Base, load_base, load_kind, load_tokenizer
from fedhpc.participation import Plan, cohort_size, num_rounds, plan_round, resolve_block_size
from fedhpc.payload import Layout, Split
from fedhpc.rng import generator
from fedhpc.runtime import Launch
from fedhpc.training.local import num_steps


@dataclass(frozen=True)
class Task:
    """What every rank knows before the first round."""

    config: Config
    base: Base
    method: Method
    split: Split  # of the payload: what is exchanged, and what stays on the client
    data: Data
    block_size: int
    rounds: int
    workers: tuple[int, ...]
    label_targets: list[str] | None  # the target of each label, where a metric needs them

    def plan(self, round_: int) -> Plan:
        return plan_round(
            self.config,
            self.data.population,
            self.data.train,
            round_,
            self.workers,
            self.block_size,
            self.method.shares_base,
        )

    @property
    def payload_dtype(self) -> torch.dtype:
        return torch.float64 if self.base.dtype == torch.float64 else torch.float32

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


def build(config: Config, launch: Launch, world_size: int, write_cache: bool) -> Task:
    """Load and check model, data and plan. UserError for all that a person can mend; no run directory is needed."""
    device = resolve_device(config, launch)
    kind = load_kind(config.model)
    kind.check(config)
    loaded = data.load_data(config, load_tokenizer(config.model), kind, write_cache)
    base = load_base(config.model, device, loaded.train.label_names, config.run.seed)
    method = with_head(registry.load("methods", config.method.name).METHOD(config.method, base, config.run.seed))
    _check_length(config, base)
    if config.client.scaffold and method.state.shapes != method.payload.shapes:
        raise UserError(
            f"client.scaffold: {config.method.name} with these options trains other parameters than it exchanges, so "
            "there is no control variate for them; exchange what is trained (prefix: exchange raw or mlp; lora: "
            "aggregation average or ffa)"
        )
    split = _split(config, method)
    size = cohort_size(config, loaded.population)
    if config.federation.min_cohort > size:
        raise UserError(f"federation.min_cohort is {config.federation.min_cohort}, but only {size} are sampled")
    if config.mode == "centralized" and num_steps(loaded.population.num_examples(0), config.client) == 0:
        raise UserError("data.train: there is no training example left")
    block = resolve_block_size(config, size, device.type) if method.shares_base else 1
    ranks = range(world_size)
    return Task(
        config=config,
        base=base,
        method=method,
        split=split,
        data=loaded,
        block_size=block,
        rounds=num_rounds(config, loaded.population),
        workers=tuple(ranks[1:]) or (0,),
        label_targets=_label_targets(config, kind, loaded),
    )


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
    if own and method.state.shapes != method.payload.shapes:
        raise UserError(
            f"personalization.parts: {config.method.name} with these options trains other parameters than it "
            "exchanges, so none of them can stay on the client; exchange what is trained"
        )
    return Split(method.payload, Layout(own))


def _label_targets(config: Config, kind: Kind, loaded: Data) -> list[str] | None:
    """The rendered target of every label, between which accuracy decides; a head has the labels themselves."""
    evaluation = config.evaluation
    if not {"accuracy", "macro_f1"} & {*evaluation.metrics, *evaluation.metrics_of_test}:
        return None
    if not kind.has_target:
        return loaded.train.label_names
    target = parse(config.data.target, "data.target")
    if list(target.columns) != [config.data.label]:
        raise UserError(
            "evaluation.metrics: accuracy and macro_f1 choose between labels, so data.target must be made of the label "
            f"alone, like ' {{{config.data.label}}}'"
        )
    return [target.render({str(config.data.label): name}) for name in loaded.train.label_names]


def _check_length(config: Config, base: Base) -> None:
    limit = base.kind.max_positions(base)
    virtual = int(getattr(config.method, "num_virtual_tokens", 0))
    if limit is not None and config.data.max_length + virtual > limit:
        raise UserError(
            f"data.max_length: {config.data.max_length} tokens and {virtual} virtual ones exceed the {limit} positions "
            f"of '{base.name}': lower data.max_length to {limit - virtual}"
        )


def resolve_device(config: Config, launch: Launch) -> torch.device:
    """The device of this rank. UserError where cuda is asked for and missing."""
    available = torch.cuda.is_available()
    if config.runtime.device == "cuda" and not available:
        raise UserError("runtime.device: cuda is asked for, but torch sees no GPU here; use cpu or auto")
    if config.runtime.device == "cpu" or not available:
        return torch.device("cpu")
    return torch.device("cuda", launch.local_rank % torch.cuda.device_count())


def evaluated_clients(task: Task) -> list[int]:
    """Clients of the per-client evaluation: all, or a seeded sample of a large population."""
    n, limit = task.data.population.num_clients, task.config.evaluation.max_clients
    if n <= limit:
        return list(range(n))
    chosen = generator(task.config.run.seed, "evaluated clients").choice(n, limit, replace=False)
    return sorted(int(c) for c in chosen)


def exchanged_bytes(task: Task, plan: Plan) -> tuple[int, int]:
    """Protocol bytes of a round, down and up: shared parts, with client.scaffold control variates too."""
    if task.config.mode != "federated":
        return 0, 0
    each = task.payload_dtype.itemsize * (2 if task.config.corrects_drift else 1)
    down = task.split.shared.size * len(plan.cohort)
    up = sum(task.method.sent_up(c) - task.split.personal.size for c in plan.training)
    return each * down, each * up


def headline(task: Task, world_size: int, transport: str) -> list[str]:
    """What is about to run, in one line."""
    config = task.config
    size = cohort_size(config, task.data.population)
    twice = ", exchanged with control variates of that size" if config.corrects_drift else ""
    kept = task.split.personal.size
    apart = f", {kept:,} of them personal" if kept else ""
    return [
        f"{config.run.name}: {config.mode} {config.method.name} of {task.base.name} "
        f"({task.method.payload.size:,} parameters{apart}{twice}), {task.data.population.num_clients:,} clients, "
        f"{size} a round in blocks of {task.block_size}, {world_size} ranks over {transport} "
        f"on {task.base.device.type}",
    ]


def describe(task: Task, world_size: int, transport: str) -> list[str]:
    """The plan that --check prints: clients, blocks, steps, payload, bytes per round, memory."""
    config, population = task.config, task.data.population
    plan = task.plan(1)
    payload, state = task.method.payload.size, task.method.state.size
    item = task.payload_dtype.itemsize
    steps = [_steps(task, c) for c in plan.training]
    per_worker = {w: sum(b.cost for b in plan.blocks if b.worker == w) for w in task.workers}
    base_bytes = sum(p.numel() * p.element_size() for p in task.base.model.parameters())
    rule: Any = importlib.import_module(f"fedhpc.client_optimizers.{config.client.optimizer}")
    copies = 2 + len(rule.state_names(config.client))
    largest = max((len(b.clients) for b in plan.blocks), default=0)
    held = max((sum(len(b.clients) for b in plan.blocks if b.worker == w) for w in task.workers), default=0)
    down, up = exchanged_bytes(task, plan)
    update = task.split.shared.size * item * (2 if config.corrects_drift else 1)
    personal = task.split.personal
    stays = [f"personal: {personal.size:,} parameters in {len(personal.shapes)} tensors stay on each client"]
    return [
        *headline(task, world_size, transport),
        *task.data.messages,
        *data.describe(population, task.data.train),
        f"examples: {len(task.data.train):,} training, {len(task.data.validation):,} validation, "
        f"{len(task.data.test):,} test",
        f"rounds: {task.rounds}; round 1: {len(plan.cohort)} clients, {len(plan.blocks)} blocks of at most {largest}, "
        f"{min(steps, default=0)} to {max(steps, default=0)} local steps each",
        "tokens of round 1 per worker: " + ", ".join(f"{w}: {cost:,.0f}" for w, cost in per_worker.items()),
        f"payload: {payload:,} parameters in {len(task.method.payload.shapes)} tensors, "
        f"{payload * item / 2**20:.2f} MiB",
        *(stays if personal.shapes else []),
        f"bytes per round: {down:,} down, {up:,} up (protocol)",
        f"memory per worker without activations: {base_bytes / 2**20:.1f} MiB base, "
        f"{copies * state * item * largest / 2**20:.1f} MiB block, {update * held / 2**20:.1f} MiB updates",
    ]


def _steps(task: Task, client: int) -> int:
    return num_steps(task.data.population.num_examples(client), task.config.client)
