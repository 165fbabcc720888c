"""A block of a run's clients: what each keeps comes from its file, they train together, what they keep goes back.

What a client keeps from round to round depends on the run: its own payload and its optimizer's memory in modes
centralized and local, its control variate with client.scaffold, its own part of the payload with
personalization.parts. The rest of the program sees uploads.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedhpc import clientstate, registry
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import client_evaluation
from fedhpc.task import Task
from fedhpc.training import scaffold
from fedhpc.training.block import Memory, Trained, Work, train_block
from fedhpc.transport.base import LoopbackTransport, Transport


@dataclass(frozen=True)
class Download:
    """What clients know of the server when a round begins, on the CPU."""

    theta: Tensor | None  # (S,): theta_t; None in local mode, where nothing is exchanged
    control: Tensor | None  # (S,): c, with client.scaffold
    versions: Mapping[int, int]  # client -> the round whose file holds its state, 0: none yet; empty where none is kept


@dataclass(frozen=True)
class Returned:
    """What a block of clients sends back; row i belongs to clients[i] as given."""

    trained: Trained
    updates: Tensor  # (K, S) on the CPU, of the shared part, after the transforms
    changes: Tensor | None  # (K, S) on the CPU: of the control variates, with client.scaffold
    finite: np.ndarray  # bool (K,): the client can be accepted


def train(task: Task, round_: int, clients: Sequence[int], down: Download) -> Returned:
    """Train `clients` together and write what they keep. UserError where a client on its own diverged."""
    config = task.config
    works = [Work(c, task.data.population.indices(c)) for c in clients]
    found = [_state(task, client, down.versions) for client in clients]
    change: Tensor | None = None
    if config.mode == "federated":
        trained, change, kept = _train_federated(task, round_, works, found, down)
    else:
        trained, kept = _train_alone(task, round_, works, found, down.theta)
    updates, personal = task.split.apart(trained.updates)
    for transform in config.transforms:
        updates = registry.load("transforms", transform.name).on_client(updates, transform)
    finite: np.ndarray = (torch.isfinite(updates).all(dim=1) & torch.isfinite(personal).all(dim=1)).numpy()
    if change is not None:
        finite &= torch.isfinite(change).all(dim=1).numpy()
    for client, state, ok in zip(clients, kept, finite, strict=True):
        if not ok and config.mode != "federated":
            raise UserError(
                f"client {client}: training diverged in round {round_} (its parameters are not finite): lower client.lr"
            )
        if ok and state:
            clientstate.save(config.run_dir, client, round_, state)
    return Returned(trained, updates, change, finite)


def evaluate_clients(
    task: Task, payloads: Tensor, clients: Sequence[int], transport: Transport
) -> dict[str, np.ndarray] | None:
    """`client_evaluation` of `payloads` (1 or M, P) on the clients' held-out examples. Collective."""
    options = task.config.evaluation
    return client_evaluation(
        task.base,
        task.method,
        payloads.to(task.base.device),
        task.data.train,
        clients,
        [task.data.population.held_out(c) for c in clients],
        options,
        task.config.runtime.precision,
        transport,
        label_targets=task.label_targets if "accuracy" in options.metrics_of_test else None,
    )


def evaluate_personal(
    task: Task, shared: Tensor, clients: Sequence[int], versions: Mapping[int, int]
) -> dict[str, np.ndarray]:
    """`evaluate_clients` of a block, on this rank alone: the shared part (S,) with each client's own, fine-tuned."""
    own = personal_parts(task, [_state(task, c, versions) for c in clients])
    start = task.split.join(shared.unsqueeze(0), own).expand(len(clients), -1)
    columns = evaluate_clients(task, fine_tuned(task, start, clients), clients, LoopbackTransport())
    assert columns is not None
    return columns


def fine_tuned(task: Task, payloads: Tensor, clients: Sequence[int]) -> Tensor:
    """(K, P) after personalization.finetune_steps local steps of each client from its row of `payloads` (K, P).

    The optimizer is fresh and the learning rate constant. A client without training examples stays where it is.
    """
    config, steps = task.config, task.config.personalization.finetune_steps
    works = [Work(c, task.data.population.indices(c)) for c in clients]
    rows = [i for i, work in enumerate(works) if len(work.indices)]
    if not steps or not rows:
        return payloads
    constant = {"steps": steps, "epochs": None, "schedule": "constant", "warmup": 0.0}
    config = config.model_copy(update={"client": config.client.model_copy(update=constant)})
    after = task.rounds + 1  # of draws that no round has made
    about = ([works[i] for i in rows], task.data.train, config, after, after)
    tuned = payloads.clone()
    tuned[rows] -= train_block(task.base, task.method, payloads[rows], *about).updates
    return tuned


def _state(task: Task, client: int, versions: Mapping[int, int]) -> dict[str, Tensor]:
    version = versions.get(client, 0)
    return clientstate.load(task.config.run_dir, client, version) if version else {}


def personal_parts(task: Task, found: Sequence[Mapping[str, Tensor]]) -> Tensor:
    """Each client's own part of the payload (K, P - S), from what it has kept."""
    return torch.stack([state.get("personal", task.initial_personal) for state in found])


def _train_federated(
    task: Task, round_: int, works: Sequence[Work], found: Sequence[Mapping[str, Tensor]], down: Download
) -> tuple[Trained, Tensor | None, list[dict[str, Tensor]]]:
    """From theta_t, with fresh optimizers; also the changes of c_i, and what each client keeps."""
    assert down.theta is not None
    own = personal_parts(task, found)
    start = task.split.join(down.theta.unsqueeze(0), own)
    about = (works, task.data.train, task.config, round_, task.rounds)
    if down.control is None:
        trained = train_block(task.base, task.method, start, *about)
        if not task.split.personal.shapes:
            return trained, None, [{} for _ in works]
        return trained, None, [{"personal": part} for part in own - task.split.apart(trained.updates)[1]]
    zero = torch.zeros_like(down.control)
    controls = torch.stack([state.get("control", zero) for state in found])
    trained = train_block(task.base, task.method, start, *about, corrections=down.control - controls)
    change = scaffold.change(down.control, trained.updates, trained.distance)
    return trained, change, [{"control": control} for control in controls + change]


def _train_alone(
    task: Task, round_: int, works: Sequence[Work], found: Sequence[Mapping[str, Tensor]], theta: Tensor | None
) -> tuple[Trained, list[dict[str, Tensor]]]:
    """Going on with each client's optimizer, from theta or, in local mode, from its own payload."""
    rule: Any = importlib.import_module(f"fedhpc.client_optimizers.{task.config.client.optimizer}")
    names = rule.state_names(task.config.client)
    memories = [
        clientstate.unpack(state) if state else Memory.fresh(names, task.method.state.size, task.payload_dtype)
        for state in found
    ]
    if theta is not None:
        start = theta.unsqueeze(0)
    else:
        start = torch.stack([state["theta"] if state else task.initial_payload() for state in found])
    about = (works, task.data.train, task.config, round_, task.rounds)
    trained = train_block(task.base, task.method, start, *about, memories)
    kept = [clientstate.pack(memory) for memory in trained.memories]
    if theta is None:
        kept = [{"theta": own, **state} for own, state in zip(start - trained.updates, kept, strict=True)]
    return trained, kept
