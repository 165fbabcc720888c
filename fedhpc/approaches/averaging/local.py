"""What a block of clients does in a round: train the payload from what the server sent, and keep what is theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedhpc import registry
from fedhpc.approaches.averaging.personal import PersonalPart
from fedhpc.approaches.base import BlockResult
from fedhpc.config import Config
from fedhpc.data import Data
from fedhpc.errors import UserError
from fedhpc.methods.base import Method
from fedhpc.models.base import Base
from fedhpc.objectives.base import Objective
from fedhpc.training import client_state
from fedhpc.training.block import Memory, Trained, Work, train_block
from fedhpc.training.optimizers.base import ClientOptimizer
from fedhpc.training.rules import scaffold
from fedhpc.updates.pipeline import Pipeline


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
        rounds: int,
    ) -> None:
        self.config, self.base, self.method, self.objective, self.data = config, base, method, objective, data
        self.personal, self.split, self.rounds = personal, personal.split, rounds
        self.optimizer: ClientOptimizer = registry.choice("client_optimizers", config.client.optimizer)(config.client)
        transforms = [registry.choice("transforms", section.name)(section) for section in config.transforms]
        #: What is done to the updates before they are sent, and to their aggregate on the server.
        self.pipeline = Pipeline(transforms, config.run.seed, self.split.shared.size)

    def raw_bytes(self, clients: Sequence[int]) -> np.ndarray:
        """Bytes of each client's update as it is before the transforms: int64 (K,)."""
        numbers = [self.method.numbers_sent(client) - self.split.personal.size for client in clients]
        return self.personal.dtype.itemsize * np.array(numbers, dtype=np.int64)

    def train(self, round_: int, clients: Sequence[int], down: Download) -> BlockResult[Upload]:
        """Train `clients` together and write what they keep. UserError where a client on its own diverged."""
        config = self.config
        works = [Work(c, self.data.population.indices(c)) for c in clients]
        found = client_state.load_all(config.run_dir, clients, down.versions)
        change: Tensor | None = None
        if config.mode == "federated":
            trained, change, kept = self._train_federated(round_, works, found, down)
        else:
            trained, kept = self._train_alone(round_, works, found, down.theta)
        updates, personal = self.split.apart(trained.updates)
        finite: np.ndarray = (torch.isfinite(updates).all(dim=1) & torch.isfinite(personal).all(dim=1)).numpy()
        sent = self.pipeline.on_clients(updates, round_, clients, found, self.raw_bytes(clients))
        if sent.updates is not updates:
            updates = sent.updates
            finite &= torch.isfinite(updates).all(dim=1).numpy()
        if change is not None:
            finite &= torch.isfinite(change).all(dim=1).numpy()
        kept = [{**tensors, **own} for tensors, own in zip(kept, sent.kept, strict=True)]
        for client, state, ok in zip(clients, kept, finite, strict=True):
            if not ok and config.mode != "federated":
                raise UserError(
                    f"client {client}: training diverged in round {round_} (its parameters are not finite): "
                    "lower client.lr"
                )
            if ok and state:
                client_state.save(config.run_dir, client, round_, state)
        # Control variates go beside the updates, as they are.
        bytes_up = sent.bytes_up + self.raw_bytes(clients) if change is not None else sent.bytes_up
        return BlockResult(
            clients=tuple(clients),
            upload=Upload(updates, change),
            reason=np.where(finite, 0, 1),
            tokens=trained.tokens,
            steps=trained.steps,
            loss_sum=trained.loss_sum,
            loss_first=trained.loss_first,
            loss_last=trained.loss_last,
            norms=torch.linalg.vector_norm(updates.double(), dim=1).numpy(),
            bytes_up=bytes_up if config.mode == "federated" else np.zeros_like(bytes_up),
            padded_tokens=trained.padded_tokens,
        )

    def _train_federated(
        self, round_: int, works: Sequence[Work], found: Sequence[Mapping[str, Tensor]], down: Download
    ) -> tuple[Trained, Tensor | None, list[dict[str, Tensor]]]:
        """From theta_t, with fresh optimizers; also the changes of c_i, and what each client keeps."""
        assert down.theta is not None
        own = self.personal.of_clients(found)
        start = self.split.join(down.theta.unsqueeze(0), own)
        about = (works, self.data.train, self.config, round_, self.rounds)
        if down.control is None:
            trained = train_block(self.base, self.method, self.objective, start, *about)
            if not self.split.personal.shapes:
                return trained, None, [{} for _ in works]
            return trained, None, [{"personal": part} for part in own - self.split.apart(trained.updates)[1]]
        zero = torch.zeros_like(down.control)
        controls = torch.stack([state.get("control", zero) for state in found])
        trained = train_block(
            self.base, self.method, self.objective, start, *about, corrections=down.control - controls
        )
        change = scaffold.change(down.control, trained.updates, trained.distance)
        return trained, change, [{"control": control} for control in controls + change]

    def _train_alone(
        self, round_: int, works: Sequence[Work], found: Sequence[Mapping[str, Tensor]], theta: Tensor | None
    ) -> tuple[Trained, list[dict[str, Tensor]]]:
        """Going on with each client's optimizer, from theta or, in local mode, from its own payload."""
        names = self.optimizer.buffers
        memories = [
            client_state.unpack(state)
            if state
            else Memory.fresh(names, self.method.trainable.size, self.personal.dtype)
            for state in found
        ]
        if theta is not None:
            start = theta.unsqueeze(0)
        else:
            start = torch.stack([state["theta"] if state else self.personal.initial_payload() for state in found])
        about = (works, self.data.train, self.config, round_, self.rounds)
        trained = train_block(self.base, self.method, self.objective, start, *about, memories)
        kept = [client_state.pack(memory) for memory in trained.memories]
        if theta is None:
            kept = [{"theta": own, **state} for own, state in zip(start - trained.updates, kept, strict=True)]
        return trained, kept
