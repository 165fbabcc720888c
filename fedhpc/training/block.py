"""Block training: the local training of K clients in one forward and backward over the shared frozen base.

The clients of a block lie along the first axis of every tensor: parameters, gradients and optimizer buffers are
(K, T), and each row of a batch goes through the base with its own client's parameters. The loss of a step is the sum
over clients of the mean over that client's supervised tokens, so each client gets exactly the gradient that it would
get alone. Clients are ordered by their number of steps, so those still training are always the leading ones and those
that are done are not touched (a zero gradient is not a no-op under Adam).

A method with a `finite_difference_step` gets its gradient from losses alone: that of one coordinate, drawn for the
step, by the central difference of two forwards.

T is the size of the method's trainable, P that of its payload; they differ where a method reparametrises.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from fedhpc import registry
from fedhpc.config import Config
from fedhpc.data.tokens import Examples
from fedhpc.lazy import lazy
from fedhpc.methods.base import Method
from fedhpc.models.base import Base, Batch
from fedhpc.models.load import autocast
from fedhpc.objectives.base import Objective
from fedhpc.rng import bits, generator, torch_seed
from fedhpc.training.optimizers.base import ClientOptimizer
from fedhpc.training.schedule import batches, learning_rates

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedhpc import kernels
else:
    torch, kernels = lazy("torch"), lazy("fedhpc.kernels")

# What one more forward costs, in padded tokens: where the rows of a step are cut into micro-forwards.
_FORWARD_COST_TOKENS = {"cpu": 160, "cuda": 4096}
_FP16_SCALE = 1024.0  # keeps small gradients of an fp16 forward above its smallest number


@dataclass(frozen=True)
class Work:
    """One client's part in a round."""

    client_id: int
    indices: np.ndarray  # its training examples


@dataclass
class Memory:
    """What a client keeps between rounds (modes centralized and local): buffers (T,) and the steps it has taken."""

    buffers: dict[str, Tensor]
    count: int

    @classmethod
    def fresh(cls, names: Sequence[str], size: int, dtype: torch.dtype) -> Memory:
        """That of a client that has not trained."""
        return cls({name: torch.zeros(size, dtype=dtype) for name in names}, 0)


@dataclass
class Trained:
    """The outcome of a block; row i belongs to works[i] as given."""

    updates: Tensor  # (K, P) on the CPU: pseudo-gradients theta_t - theta_i
    num_examples: np.ndarray  # int64 (K,)
    steps: np.ndarray  # int64 (K,)
    distance: Tensor  # (K,) on the CPU: sum of the learning rates of the steps
    tokens: np.ndarray  # int64 (K,): supervised tokens seen
    loss_sum: np.ndarray  # float64 (K,): summed over those tokens
    loss_first: np.ndarray  # float64 (K,): mean over the tokens of the first step
    loss_last: np.ndarray  # float64 (K,): and of the last
    input_tokens: int
    padded_tokens: int
    memories: list[Memory]
    seconds: float


def train_block(
    base: Base,
    method: Method,
    objective: Objective,
    payloads: Tensor,
    works: Sequence[Work],
    examples: Examples,
    config: Config,
    round_: int,
    rounds: int,
    memories: Sequence[Memory] | None = None,
    corrections: Tensor | None = None,
) -> Trained:
    """Train the clients `works`, each from its row of `payloads`.

    payloads (1, P) for one start that all share, or (K, P). rounds: of the whole
    run, for the schedule. memories: optimizer buffers to go on with; fresh ones where None, as FedAvg has it.
    corrections (K, T): added to every gradient of a client (fedhpc.training.rules.scaffold).
    """
    started = time.perf_counter()
    options, device = config.client, base.device
    plans = [batches(len(w.indices), options, config.run.seed, round_, w.client_id) for w in works]
    steps = np.array([len(plan) for plan in plans], dtype=np.int64)
    rates = [learning_rates(options, round_, rounds, len(plan)) for plan in plans]
    order = np.argsort(-steps, kind="stable")
    clients = len(works)

    payloads = payloads.to(device)
    start = payloads if len(payloads) == 1 else payloads[kernels.on_device(order, device)]
    lead = method.payload.views(start)
    began = method.start(lead, round_, [works[i].client_id for i in order])
    theta = method.trainable.flatten({name: t.expand(clients, *t.shape[1:]) for name, t in began.items()}).clone()
    gradient = torch.zeros_like(theta)
    anchor = theta.detach().clone() if options.proximal else None
    drift = corrections[torch.from_numpy(order)].to(device) if corrections is not None else None
    theta.requires_grad_()
    theta.grad = gradient  # backward adds to it in place
    optimizer: ClientOptimizer = registry.choice("client_optimizers", options.optimizer)(options)
    buffers = {name: torch.zeros_like(gradient) for name in optimizer.buffers}
    count = np.zeros(clients, dtype=np.int64)
    if memories is not None:
        count[:] = [memories[i].count for i in order]
        for name, buffer in buffers.items():
            buffer.copy_(torch.stack([memories[i].buffers[name] for i in order]))

    seeds = [torch_seed(config.run.seed, "noise", round_, works[i].client_id) for i in order]
    keys = kernels.on_device(np.array(seeds, dtype=np.int64), device)
    loss_sum = torch.zeros(clients, dtype=torch.float64, device=device)
    first, last = torch.zeros_like(loss_sum), torch.zeros_like(loss_sum)
    tokens = np.zeros(clients, dtype=np.int64)
    input_tokens = padded_tokens = 0
    passes = 1 if method.finite_difference_step is None else 2
    scale = _FP16_SCALE if config.runtime.precision == "float16" else 1.0
    for s in range(int(steps.max(initial=0))):
        active = int((steps > s).sum())
        picked = [works[order[i]].indices[plans[order[i]][s]] for i in range(active)]
        owners = np.repeat(np.arange(active), [len(rows) for rows in picked])
        of_rows = objective.num_supervised(examples, np.concatenate(picked))
        step_tokens = np.bincount(owners, weights=of_rows, minlength=active).astype(np.int64)
        counts = kernels.on_device(np.maximum(step_tokens, 1), device)
        parts = []
        for batch, owner, place in _micro_batches(base, objective, examples, picked):
            rows = kernels.on_device(owner, device)
            # A row's draws follow from its client, the step and its place in the client's step alone.
            row_keys = bits(keys.index_select(0, rows), kernels.on_device(place + (s << 32), device))
            row_weights = kernels.on_device(1.0 / np.maximum(step_tokens, 1)[owner], device, theta.dtype)
            parts.append(_Part(batch, rows, row_keys, row_weights))
            padded_tokens += passes * (batch.tokens - batch.real_tokens)
            input_tokens += passes * batch.tokens
        live = gradient[:active].zero_()
        if method.finite_difference_step is None:
            step_loss = _losses(base, method, objective, theta, lead, parts, active, config, scale)
            if scale != 1.0:
                live.div_(scale)
        else:
            drawn = [
                generator(config.run.seed, "direction", round_, works[order[i]].client_id, s).integers(theta.shape[1])
                for i in range(active)
            ]
            along = kernels.on_device(np.array(drawn), device).unsqueeze(1)
            away = torch.zeros_like(live).scatter_(1, along, method.finite_difference_step)
            with torch.no_grad():
                ahead = _losses(base, method, objective, theta[:active] + away, lead, parts, active, config, None)
                behind = _losses(base, method, objective, theta[:active] - away, lead, parts, active, config, None)
            slope = (ahead - behind) / counts / (2 * method.finite_difference_step)
            live.scatter_(1, along, slope.to(live.dtype).unsqueeze(1))
            step_loss = (ahead + behind) / 2
        if anchor is not None:
            # FedProx (Li et al. 2020, arXiv 1812.06127, equation 2): the gradient of mu/2 |theta - theta_t|^2.
            live.add_(theta.detach()[:active] - anchor[:active], alpha=options.proximal)
        if options.clip_norm is not None:
            norm = torch.linalg.vector_norm(live, dim=1, keepdim=True)
            # The 1e-6 is that of torch.nn.utils.clip_grad_norm_.
            live.mul_((options.clip_norm / (norm + 1e-6)).clamp(max=1.0))
        if drift is not None:
            live.add_(drift[:active])
        count[:active] += 1
        now = np.array([rates[order[i]][s] for i in range(active)])
        taken, rate = kernels.on_device(np.stack([count[:active], now]), device, theta.dtype).unsqueeze(2)
        with torch.no_grad():
            leading = {name: buffer[:active] for name, buffer in buffers.items()}
            optimizer.step(theta[:active], live, leading, taken, rate)
        mean = step_loss / counts
        if s == 0:
            first[:active] = mean
        last[:active] = mean
        loss_sum[:active] += step_loss
        tokens[:active] += step_tokens

    with torch.no_grad():
        reached = method.payload.flatten(method.finish(method.trainable.views(theta), lead))
        updates = (start - reached).to("cpu")
    kept = {name: buffer.to("cpu") for name, buffer in buffers.items()} if memories is not None else {}
    back = np.argsort(order)
    ordered = torch.from_numpy(back)
    return Trained(
        updates=updates[ordered] if clients > 1 else updates,
        num_examples=np.array([len(w.indices) for w in works], dtype=np.int64),
        steps=steps,
        distance=torch.tensor([math.fsum(of_steps) for of_steps in rates], dtype=updates.dtype),
        tokens=tokens[back],
        loss_sum=loss_sum.cpu().numpy()[back],
        loss_first=first.cpu().numpy()[back],
        loss_last=last.cpu().numpy()[back],
        input_tokens=input_tokens,
        padded_tokens=padded_tokens,
        memories=[Memory({name: buffer[i].clone() for name, buffer in kept.items()}, int(count[i])) for i in back]
        if memories is not None
        else [],
        seconds=time.perf_counter() - started,
    )


@dataclass(frozen=True)
class _Part:
    """One forward of a step."""

    batch: Batch
    rows: Tensor  # int64 (B,): the client of each row, by its place in the block
    row_keys: Tensor  # int64 (B,): the key of each row's draws
    row_weights: Tensor  # (B,): one over the supervised tokens of its client's step


def _losses(
    base: Base,
    method: Method,
    objective: Objective,
    theta: Tensor,
    lead: Mapping[str, Tensor],
    parts: Sequence[_Part],
    active: int,
    config: Config,
    scale: float | None,
) -> Tensor:
    """The losses of a step in the states theta, summed over each client's tokens: float64 (active,).

    They are backpropagated, times `scale`, unless it is None.
    """
    summed = torch.zeros(active, dtype=torch.float64, device=base.device)
    for part in parts:
        with (
            autocast(base, config.runtime.precision),
            method.attach(method.trainable.views(theta), lead, part.rows, part.row_keys) as attached,
        ):
            if scale is None:
                losses = objective.losses(base, attached, part.batch)
            else:
                losses = objective.backward(base, attached, part.batch, part.row_weights, scale)
        summed.index_add_(0, part.rows.index_select(0, part.batch.row), losses.double())
    return summed


def _micro_batches(
    base: Base, objective: Objective, examples: Examples, picked: Sequence[np.ndarray]
) -> list[tuple[Batch, np.ndarray, np.ndarray]]:
    """The rows of a step, sorted by length and cut where that saves padding.

    With each row's client, and its place among the rows of that client.
    """
    rows = np.concatenate(picked)
    owner = np.repeat(np.arange(len(picked)), [len(p) for p in picked])
    lengths = examples.lengths_of(rows)
    order = np.argsort(lengths, kind="stable")
    place = np.concatenate([np.arange(len(p)) for p in picked])
    rows, owner, place = rows[order], owner[order], place[order]
    cost = _FORWARD_COST_TOKENS[base.device.type]
    cuts = [0, len(rows)] if objective.needs_full_steps else cut_by_length(lengths[order], cost)
    parts = [(objective.batch(base, examples, rows[a:b], owner[a:b]), slice(a, b)) for a, b in pairwise(cuts)]
    return [(batch, batch.per_row(owner[part]), batch.per_row(place[part])) for batch, part in parts]


def cut_by_length(lengths: np.ndarray, forward_cost: int) -> list[int]:
    """Where to cut ascending `lengths` (B,) into forwards so that padded tokens plus forward_cost each are fewest.

    Returns the bounds, 0 and B included. Dynamic programming over the last cut.
    """
    # Between rows of one length there is never a cut.
    different, starts = np.unique(lengths, return_index=True)
    bounds = np.append(starts, len(lengths))
    best = np.zeros(len(bounds))
    came_from = np.zeros(len(bounds), dtype=np.int64)
    for end in range(1, len(bounds)):
        costs = best[:end] + (bounds[end] - bounds[:end]) * different[end - 1] + forward_cost
        came_from[end] = int(np.argmin(costs))
        best[end] = costs[came_from[end]]
    cuts = [len(bounds) - 1]
    while cuts[-1] > 0:
        cuts.append(int(came_from[cuts[-1]]))
    return bounds[cuts[::-1]].tolist()
