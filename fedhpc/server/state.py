"""The server's state: what moves from round to round, and which versions of the clients' own states count.

A checkpoint holds all of it. `Server` is that of parameter averaging: the global payload theta_t, the server optimizer
and SCAFFOLD's c.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedhpc import registry
from fedhpc.config import Config


class State:
    """What a checkpoint holds of the server; an approach adds its own."""

    def __init__(self) -> None:
        #: client -> the round whose file holds its state (fedhpc.training.client_state); absent: it has none.
        self.versions: dict[int, int] = {}
        #: Clients named since the last checkpoint, which may have older files.
        self.renewed: set[int] = set()

    def name(self, client: int, round_: int) -> None:
        """From now on the file of `round_` is the client's state."""
        self.versions[client] = round_
        self.renewed.add(client)

    def tensors(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        return {"versions": np.array(sorted(self.versions.items()), dtype=np.int64).reshape(-1, 2)}

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """The inverse of `tensors`."""
        self.versions = {int(client): int(round_) for client, round_ in tensors["versions"]}
        self.renewed = set(self.versions)  # a run that was killed after its checkpoint may have left older files


class Server(State):
    """theta_t and the step that turns an aggregated pseudo-gradient into theta_{t+1}."""

    def __init__(self, config: Config, theta: Tensor) -> None:
        """theta: (P,) float32 or float64, on the CPU."""
        super().__init__()
        self.theta = theta
        # A single client's training (centralized) is taken over as it is: server sgd with lr 1.
        federated = config.mode == "federated"
        self._options: Any = config.server
        self._rule: Any = registry.load("server_optimizers", config.server.optimizer if federated else "sgd")
        if not federated:
            self._options = SimpleNamespace(lr=1.0, momentum=0.0)
        self._state: dict[str, Tensor] = self._rule.initial_state(theta.numel(), self._options)
        #: c of client.scaffold (P,); None without it.
        self.control = torch.zeros_like(theta) if config.corrects_drift else None

    def step(self, gradient: Tensor) -> float:
        """Move by the aggregated pseudo-gradient (P,) float64; returns the L2 norm of the move."""
        before = self.theta.double()
        after = self._rule.step(before, gradient, self._state, self._options)
        self.theta = after.to(self.theta.dtype)
        return float(torch.linalg.vector_norm(self.theta.double() - before))

    def with_control(self) -> Tensor:
        """What goes down with client.scaffold: theta_t and c as one vector (2P,)."""
        assert self.control is not None
        return torch.cat([self.theta, self.control])

    def correct(self, change: Tensor) -> None:
        """Add 1/N sum of the clients' changes of c_i, float64 (P,), to c."""
        assert self.control is not None
        self.control = (self.control.double() + change).to(self.control.dtype)

    def tensors(self) -> dict[str, np.ndarray]:
        """See the base class."""
        state = {f"server.{name}": tensor.numpy() for name, tensor in self._state.items()}
        if self.control is not None:
            state["control"] = self.control.numpy()
        return {"theta": self.theta.numpy(), **state, **super().tensors()}

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """See the base class."""
        super().load(tensors)
        self.theta = torch.from_numpy(tensors["theta"].copy())
        self._state = {name: torch.from_numpy(tensors[f"server.{name}"].copy()) for name in self._state}
        if self.control is not None:
            self.control = torch.from_numpy(tensors["control"].copy())
