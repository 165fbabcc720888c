"""Block training: the local training of K clients in one forward and backward over the shared frozen base.

The clients of a block lie along the first axis of every tensor: parameters, gradients and optimizer buffers are
(K, T), and each row of a batch goes through the base with its own client's parameters. The loss of a step is the sum
over clients of the mean over that client's supervised tokens, so each client gets exactly the gradient that it would
get alone. Clients are ordered by their number of steps, so those still training are always the leading ones and those
that are done are not touched (a zero gradient is not a no-op under Adam).

A step is: the gradient, by backpropagation or by the central difference of two forwards
(`fedhpc.training.rules.zeroth_order`); the local rules in their order (`fedhpc.training.rules`); the step of the
client optimizer (`fedhpc.training.optimizers`). Nothing in it reads from the device, so a GPU is never waited for.

T is the size of the method's trainable, P that of its payload; they differ where a method reparametrises.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from fedhpc.data.tokens import Examples
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods.base import Method, PerClient
from fedhpc.models.base import Base
from fedhpc.models.experts import ExpertLoad
from fedhpc.models.load import autocast
from fedhpc.objectives.base import Objective
from fedhpc.rng import torch_seed
from fedhpc.training import rules
from fedhpc.training.example_privacy import ExamplePrivacy
from fedhpc.training.forwards import Forward, Step, make_step
from fedhpc.training.local import LocalTraining
from fedhpc.training.memory import Memory
from fedhpc.training.rules import zeroth_order
from fedhpc.training.schedule import batches, examples_per_step, learning_rates, poisson_batches

if TYPE_CHECKING:
    from fedhpc.models.parts import Parts

_Values = TypeVar("_Values", Tensor, np.ndarray)
_FP16_SCALE = 1024.0  # keeps small gradients of an fp16 forward above its smallest number


@dataclass(frozen=True)
class Work:
    """One client's part in a round."""

    client_id: int
    indices: np.ndarray  # its training examples
    #: Whose draws, number of steps and learning rates it has; None: those of all. The rest is the same for all.
    local: LocalTraining | None = None


@dataclass(frozen=True)
class Trained:
    """The outcome of a block; row i belongs to works[i] as given. All of it is on the CPU."""

    updates: Tensor  # (K, P): pseudo-gradients theta_t - theta_i; (0, P) where another rank takes them
    memory: Memory | None  # of the optimizers, where train_block was given one
    #: (K, T): sum of the learning rates times the gradients, corrections included, that the optimizer was given. None
    #: without corrections, and where the updates are this sum (`ClientOptimizer.follows_gradients`).
    gradients: Tensor | None
    distance: Tensor  # (K,): sum of the learning rates of the steps
    steps: np.ndarray  # int64 (K,)
    tokens: np.ndarray  # int64 (K,): supervised tokens seen
    loss_sum: np.ndarray  # float64 (K,): summed over those tokens
    loss_first: np.ndarray  # float64 (K,): mean over the tokens of the first step
    loss_last: np.ndarray  # float64 (K,): mean over the tokens of the last step
    input_tokens: int  # of the whole block, padding included
    padded_tokens: int
    expert_load: np.ndarray  # int64 (L, E): tokens sent to each routed expert; (0, 0) where a base has none

    def apart(self, sizes: Sequence[int]) -> list[Trained]:
        """The outcomes of several groups of clients, of these sizes one after the other, that trained as one block.

        Padding is everybody's: it is divided by the supervised tokens that were seen. Not for bases with experts, nor
        for optimizers that go on.
        """
        assert self.memory is None and self.gradients is None and not self.expert_load.size
        ends = np.cumsum(sizes)
        seen = np.append(0, np.cumsum(self.tokens))[ends] / max(int(self.tokens.sum()), 1)
        inputs, padded = (np.diff(np.rint(seen * all_), prepend=0) for all_ in (self.input_tokens, self.padded_tokens))
        return [
            replace(
                self,
                updates=self.updates[rows],
                distance=self.distance[rows],
                steps=self.steps[rows],
                tokens=self.tokens[rows],
                loss_sum=self.loss_sum[rows],
                loss_first=self.loss_first[rows],
                loss_last=self.loss_last[rows],
                input_tokens=int(inputs[i]),
                padded_tokens=int(padded[i]),
            )
            for i, rows in enumerate(slice(end - size, end) for size, end in zip(sizes, ends, strict=True))
        ]


def train_block(
    base: Base,
    method: Method,
    objective: Objective,
    starts: Tensor,
    works: Sequence[Work],
    examples: Examples,
    local: LocalTraining,
    memory: Memory | None = None,
    corrections: Tensor | None = None,
    on_step: Callable[[float], None] = lambda clients: None,
    takes: bool = True,
) -> Trained:
    """Train the clients `works`, each from its row of `starts`.

    starts: payloads, (1, P) for one start that all share, or (K, P); what this rank has of them, where it has parts
    (`Method.received`). memory: of optimizers that go on; fresh ones where
    None, as FedAvg has it. corrections (K, T): added to every gradient of a client (`fedhpc.training.rules.scaffold`).
    on_step: told after each step which part of the block's clients it was: a client with six steps counts a sixth.
    takes: whether this rank is given the update, of those that train a client together (`Method.parts`): each has some
    of the rows of every forward, and an optimizer for its part of what is trained.

    Where a method has several in a round (`Method.in_round`), losses, tokens and steps are those of the last.
    """
    methods = method.in_round(local.round)
    if len(methods) > 1:
        assert memory is None and corrections is None  # both are of one set of parameters

        def on_part(clients: float) -> None:
            on_step(clients / len(methods))

        each = [train_block(base, m, objective, starts, works, examples, local, on_step=on_part) for m in methods]
        return replace(each[-1], updates=torch.stack([trained.updates for trained in each]).sum(dim=0))
    (method,) = methods
    parts = method.parts
    if parts is not None:
        local = replace(local, total=parts.add_up)
    clients = _Clients(works, local)
    model = _Model(base, method, objective, clients, starts, local)
    parameters, gradient = model.parameters, model.gradient
    if corrections is not None:
        corrections = corrections[clients.order].to(base.device)
    local_rules = rules.in_order(local, parameters, corrections, method)
    direction = None if local.direction is None else local.direction.on(parameters)
    buffers, count = _optimizer_state(local, clients, memory, gradient)
    sums = None if corrections is None or local.optimizer.follows_gradients else torch.zeros_like(gradient)
    losses = _Losses(len(works), base.device)
    for number in range(clients.most_steps):
        rows = clients.rows(number)
        active = len(rows)  # clients that take this step: the first of the block
        step = make_step(
            base, objective, examples, rows, number, model.client_keys, parameters.dtype, local.examples_at_once,
            local.packing, local.privacy is not None, (0, 1) if parts is None else (parts.member, parts.size),
        )  # fmt: skip
        losses.add(step, model.differentiate(step), model.passes)
        with torch.no_grad():
            for rule in local_rules:
                rule.change(gradient[:active], parameters[:active])
            count[:active] += 1
            counts, rates = _on_device(count[:active], clients.rates_of(number, active), parameters)
            mine = rates if direction is None else (1 - direction.share) * rates
            if model.lr_ratios is not None:
                mine = mine * model.lr_ratios
            if sums is not None:
                sums[:active].addcmul_(gradient[:active], rates)
            of_active = {name: buffer[:active] for name, buffer in buffers.items()}
            local.optimizer.step(parameters[:active], gradient[:active], of_active, counts, mine)
            if direction is not None:
                direction.move(parameters[:active], rates)
        on_step(float((1.0 / clients.steps[:active]).sum()))
        del step  # before the next one takes memory too: what teachers say of a step can be large

    if parts is not None:
        losses.add_up(parts.add_up)
        if model.expert_load.layers:  # else it is empty, and on no GPU
            parts.add_up(model.expert_load.counts)
    with torch.no_grad():
        updates = model.updates() if parts is None else model.updates_of(parts, takes)
    return Trained(
        updates=clients.as_given(updates.to("cpu")),
        memory=_memory_of(clients, buffers, count) if memory is not None else None,
        gradients=None if sums is None else clients.as_given(sums.to("cpu")),
        distance=torch.tensor(clients.as_given(clients.distances()), dtype=updates.dtype),
        steps=clients.as_given(clients.steps),
        tokens=clients.as_given(losses.tokens),
        loss_sum=clients.as_given(losses.total.cpu().numpy()),
        loss_first=clients.as_given(losses.first.cpu().numpy()),
        loss_last=clients.as_given(losses.last.cpu().numpy()),
        input_tokens=losses.input_tokens,
        padded_tokens=losses.padded_tokens,
        expert_load=model.expert_load.counts.cpu().numpy(),
    )


class _Clients:
    """The clients of a block in the order of its tensors: those with the most steps first."""

    def __init__(self, works: Sequence[Work], local: LocalTraining) -> None:
        draw = batches if local.privacy is None else poisson_batches
        ways = [local if w.local is None else w.local for w in works]
        plans = [
            draw(len(w.indices), way, way.seed, way.round, w.client_id) for w, way in zip(works, ways, strict=True)
        ]
        steps = np.array([len(plan) for plan in plans], dtype=np.int64)
        #: For each row of the block's tensors, which of `works` it is; and the other way round.
        self.order = np.argsort(-steps, kind="stable")
        self._rows = np.argsort(self.order)
        self._works = [works[i] for i in self.order]
        self._plans = [plans[i] for i in self.order]
        #: How each of them trains.
        self.ways = [ways[i] for i in self.order]
        self._rates = [
            learning_rates(way, way.round, way.rounds, len(plan))
            for way, plan in zip(self.ways, self._plans, strict=True)
        ]
        self.steps = steps[self.order]  # int64 (K,)

    @property
    def ids(self) -> list[int]:
        """The client of each row."""
        return [work.client_id for work in self._works]

    @property
    def most_steps(self) -> int:
        """Steps of the client that takes the most."""
        return int(self.steps.max(initial=0))

    def rows(self, number: int) -> list[np.ndarray]:
        """The examples of step `number` (from 0), for each client that takes it."""
        active = int((self.steps > number).sum())
        return [
            work.indices[plan[number]] for work, plan in zip(self._works[:active], self._plans[:active], strict=True)
        ]

    def expected_examples(self, local: LocalTraining, active: int) -> np.ndarray:
        """How many examples a step has on average where batches are drawn by Poisson: (active,)."""
        sizes = [len(work.indices) for work in self._works[:active]]
        return np.minimum(sizes, examples_per_step(local))

    def rates_of(self, number: int, active: int) -> np.ndarray:
        """The learning rates (active,) of step `number`."""
        return np.array([rates[number] for rates in self._rates[:active]])

    def distances(self) -> np.ndarray:
        """The sum of each client's learning rates (K,)."""
        return np.array([math.fsum(rates) for rates in self._rates])

    def as_given(self, values: _Values) -> _Values:
        """Values (K, ...) of the block's rows, in the order of `works`."""
        return values[self._rows] if len(self._works) > 1 else values


class _Model:
    """The frozen base with the method on it, and what the clients of a block train."""

    def __init__(
        self,
        base: Base,
        method: Method,
        objective: Objective,
        clients: _Clients,
        starts: Tensor,
        local: LocalTraining,
    ) -> None:
        self.base, self.method, self.objective, self.clients, self.local = base, method, objective, clients, local
        starts = starts.to(base.device)
        self._starts = starts if len(starts) == 1 else starts[kernels.on_device(clients.order, base.device)]
        self._received: PerClient = method.received(self._starts)
        initial = method.start(self._received, local.round, clients.ids)
        expanded = {name: tensor.expand(len(clients.ids), *tensor.shape[1:]) for name, tensor in initial.items()}
        #: What is trained (K, T), and its gradient, to which a backward pass adds in place.
        self.parameters = method.trainable.flatten(expanded).clone()
        self.gradient = torch.zeros_like(self.parameters)
        self.parameters.requires_grad_().grad = self.gradient
        keys = [
            torch_seed(way.seed, "noise", way.round, client)
            for way, client in zip(clients.ways, clients.ids, strict=True)
        ]
        #: (1, T): by what the learning rate is multiplied; None where it is by 1.
        self.lr_ratios = _lr_ratios(method, local.layer_lr_decay, self.parameters)
        #: int64 (K,): the key of each client's random draws.
        self.client_keys = kernels.on_device(np.array(keys, dtype=np.int64), base.device)
        self.expert_load = ExpertLoad(base)
        #: Forward passes of a row in a step.
        self.passes = 1 if method.finite_difference_step is None else 2
        self._scale = _FP16_SCALE if local.precision == "float16" else 1.0

    def differentiate(self, step: Step) -> Tensor:
        """Make `gradient` that of a step, in the rows of its clients.

        Returns their losses, summed over each client's tokens: float64 (k,).
        """
        active = len(step.tokens)
        gradient = self.gradient[:active].zero_()
        distance = self.method.finite_difference_step
        if self.local.privacy is not None:
            return self._differentiate_privately(step, gradient, self.local.privacy)
        if distance is None:
            losses = self._losses(self.parameters, step, self._scale)
            if self._scale != 1.0:
                gradient.div_(self._scale)
            return losses
        along = zeroth_order.coordinates(
            self.local.seed, self.local.round, step.number, self.clients.ids[:active], self.gradient.shape[1]
        )
        return zeroth_order.central_difference(
            lambda parameters: self._losses(parameters, step, None),
            self.parameters[:active],
            gradient,
            kernels.on_device(along, self.base.device),
            distance,
            step.divisors,
        )

    def _differentiate_privately(self, step: Step, gradient: Tensor, privacy: ExamplePrivacy) -> Tensor:
        """Add the clipped gradients of the single examples of a step, and noise, to `gradient` (k, T), which is zero.

        Returns the losses, summed over each client's tokens: float64 (k,).
        """
        losses = torch.zeros(len(gradient), dtype=torch.float64, device=self.base.device)
        for forward in step.forwards:
            parameters = self.parameters.detach().index_select(0, forward.owners).requires_grad_()  # (E, T)
            received = self._received
            if len(self._starts) > 1:
                received = self.method.payload.views(self._starts.index_select(0, forward.owners))
            of_tokens = self._forward(forward, parameters, received, forward.examples, self._scale)
            losses.index_add_(0, forward.clients.index_select(0, forward.batch.row), of_tokens.double())
            of_examples = parameters.grad
            assert of_examples is not None  # the pass went back to what is trained
            if self._scale != 1.0:
                of_examples.div_(self._scale)
            privacy.add_clipped(gradient, of_examples, forward.owners)
        rounds, clients = [way.round for way in self.clients.ways[: len(gradient)]], self.clients.ids[: len(gradient)]
        privacy.add_noise(gradient, self.local.seed, rounds, step.number, clients)
        expected = self.clients.expected_examples(self.local, len(gradient))
        gradient.mul_(kernels.on_device(1.0 / expected, gradient.device, gradient.dtype).unsqueeze(1))
        return losses

    def _losses(self, parameters: Tensor, step: Step, scale: float | None) -> Tensor:
        """The losses of a step with `parameters`, summed over each client's tokens: float64 (k,).

        They are backpropagated, times `scale`, unless it is None.
        """
        losses = torch.zeros(len(step.tokens), dtype=torch.float64, device=self.base.device)
        for forward in step.forwards:
            of_tokens = self._forward(forward, parameters, self._received, forward.clients, scale)
            if forward.counts:
                losses.index_add_(0, forward.clients.index_select(0, forward.batch.row), of_tokens.double())
        return losses

    def _forward(
        self, forward: Forward, parameters: Tensor, received: PerClient, rows: Tensor, scale: float | None
    ) -> Tensor:
        """The loss of each supervised token (S,) of a forward, in which row b has the parameters rows[b].

        They are backpropagated, times `scale`, unless it is None.
        """
        base, method, objective = self.base, self.method, self.objective
        trained = method.trainable.views(parameters)
        with (
            self.expert_load.of(forward.batch) if forward.counts else nullcontext(),
            autocast(base, self.local.precision),
            method.attach(trained, received, rows, forward.row_keys) as attached,
        ):
            if scale is None:
                return objective.losses(base, attached, forward.batch)
            return objective.backward(base, attached, forward.batch, forward.row_weights, scale)

    def updates(self) -> Tensor:
        """The pseudo-gradients theta_t - theta_i of the payloads (K, P)."""
        trained = self.method.trainable.views(self.parameters)
        return self._starts - self.method.payload.flatten(self.method.finish(trained, self._received))

    def updates_of(self, parts: Parts, takes: bool) -> Tensor:
        """`updates`, on the CPU of the rank that takes them; elsewhere none (0, P). Collective over the ranks."""
        method = self.method
        changes = method.received(self._starts - self.parameters)
        total = torch.empty(int(takes), method.payload.size, dtype=self.parameters.dtype)
        views = method.payload.views(total)
        for name in method.payload.shapes:  # one at a time, for want of room
            change = parts.gathered(name, changes[name].squeeze(0))
            views[name].copy_(change.expand_as(views[name]))
        return total


class _Losses:
    """Losses and tokens of the clients of a block, over its steps. Losses stay on the device, for nobody to wait."""

    def __init__(self, clients: int, device: torch.device) -> None:
        self.total = torch.zeros(clients, dtype=torch.float64, device=device)  # summed over tokens
        self.first = torch.zeros_like(self.total)  # mean over the tokens of the first step
        self.last = torch.zeros_like(self.total)
        self.tokens = np.zeros(clients, dtype=np.int64)
        self.input_tokens = self.padded_tokens = 0

    def add(self, step: Step, losses: Tensor, passes: int) -> None:
        """Count a step. losses: summed over each client's tokens (k,); passes: forwards of each row."""
        active, mean = len(losses), losses / step.divisors
        # Batches that are drawn by Poisson can be empty, and have no mean.
        with_tokens = step.tokens > 0
        _put(self.first, mean, with_tokens & (self.tokens[:active] == 0))
        _put(self.last, mean, with_tokens)
        self.total[:active] += losses
        self.tokens[:active] += step.tokens
        for forward in step.forwards:
            self.input_tokens += passes * forward.batch.tokens
            real = forward.batch.real_tokens if forward.counts else 0
            self.padded_tokens += passes * (forward.batch.tokens - real)

    def add_up(self, total: Callable[[Tensor], Tensor]) -> None:
        """Make these those of all ranks that train the clients together, which `total` adds up."""
        self.total, self.first, self.last = total(torch.stack([self.total, self.first, self.last]))
        tokens = torch.tensor([self.input_tokens, self.padded_tokens], device=self.total.device)
        self.input_tokens, self.padded_tokens = total(tokens).tolist()


def _lr_ratios(method: Method, decay: float, like: Tensor) -> Tensor | None:
    """By what the learning rate is multiplied for each of T numbers, (1, T) beside `like`; None where it is by 1.

    decay: client.layer_lr_decay.
    """
    ratios = {name: [method.lr_ratio(name, shape)] for name, shape in method.trainable.shapes.items()}
    if decay != 1.0:
        ratios = {n: [ratio * decay**above for above in method.layers_above(n)] for n, (ratio,) in ratios.items()}
    if all(ratio == 1.0 for of_blocks in ratios.values() for ratio in of_blocks):
        return None
    of_blocks = {name: torch.tensor([values], dtype=like.dtype) for name, values in ratios.items()}
    return method.trainable.of_blocks(of_blocks).to(like.device)


def _put(values: Tensor, those: Tensor, chosen: np.ndarray) -> None:
    """Put `those` (k,) where `chosen`, bool (k,), among the first k of `values`, without waiting for the device."""
    if chosen.all():
        values[: len(those)] = those
    elif chosen.any():
        where = kernels.on_device(np.flatnonzero(chosen), values.device)
        values[where] = those[where]


def _optimizer_state(
    local: LocalTraining, clients: _Clients, memory: Memory | None, gradient: Tensor
) -> tuple[dict[str, Tensor], np.ndarray]:
    """The optimizer's buffers (K, T) on the device, and the steps that each client has taken, int64 (K,)."""
    if memory is None:
        buffers = {name: torch.zeros_like(gradient) for name in local.optimizer.buffers}
        return buffers, np.zeros(len(gradient), dtype=np.int64)
    order = torch.from_numpy(clients.order)
    buffers = {name: memory.buffers[name][order].to(gradient.device) for name in local.optimizer.buffers}
    return buffers, memory.count[order].numpy()


def _memory_of(clients: _Clients, buffers: Mapping[str, Tensor], count: np.ndarray) -> Memory:
    """The inverse of `_optimizer_state`."""
    on_cpu = {name: clients.as_given(buffer.to("cpu")) for name, buffer in buffers.items()}
    return Memory(on_cpu, torch.from_numpy(clients.as_given(count)))


def _on_device(counts: np.ndarray, rates: np.ndarray, like: Tensor) -> Tensor:
    """Steps taken and learning rates (k,) of some clients, as (2, k, 1) beside their parameters.

    Both in one copy to the device, so the counts are of the parameters' dtype, too: exact up to 2^24 in float32.
    """
    return kernels.on_device(np.stack([counts, rates]), like.device, like.dtype).unsqueeze(2)
