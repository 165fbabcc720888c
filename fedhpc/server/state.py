"""The server's state: what moves from round to round, and which versions of the clients' own states count.

A checkpoint holds all of it. `ParameterState` is that of parameter averaging: the global payload theta_t, the buffers
of the server optimizer, what it keeps for the clients, such as SCAFFOLD's c, and what transforms keep.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from fedhpc.server.optimizers.base import ServerOptimizer
from fedhpc.server.selection import Average, Selection


class ServerState:
    """What a checkpoint holds of the server; an approach adds its own."""

    def __init__(self) -> None:
        #: client -> the round whose file holds its state (fedhpc.training.client_state); absent: it has none.
        self.versions: dict[int, int] = {}
        #: Clients named since the last checkpoint, which may have older files.
        self.renewed: set[int] = set()

    def keep_versions(self, clients: Sequence[int], round_: int) -> None:
        """From now on the files of `round_` are what these clients have kept."""
        self.versions.update(dict.fromkeys(clients, round_))
        self.renewed.update(clients)

    def tensors(self) -> dict[str, np.ndarray]:
        """What a checkpoint keeps."""
        return {"versions": np.array(sorted(self.versions.items()), dtype=np.int64).reshape(-1, 2)}

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """The inverse of `tensors`."""
        self.versions = {int(client): int(round_) for client, round_ in tensors["versions"]}
        self.renewed = set(self.versions)  # a run that was killed after its checkpoint may have left older files


class ParameterState(ServerState):
    """theta_t and the step that turns an aggregated pseudo-gradient into theta_{t+1}."""

    def __init__(
        self,
        theta: Tensor,
        optimizer: ServerOptimizer | None = None,
        auxiliary: Mapping[str, Tensor] | None = None,
        transforms: Mapping[str, Tensor] | None = None,
        memory: Mapping[str, Tensor] | None = None,
        privacy: Mapping[str, Tensor] | None = None,
        average: Average | None = None,
    ) -> None:
        """theta: (P,) float32 or float64, on the CPU.

        optimizer: None to take the clients' mean over as it is. auxiliary: what is kept for the clients, by name.
        transforms: what they keep here, as `Pipeline.server_tensors` has it. memory: what the aggregator keeps.
        privacy: what has been spent of a budget, as `Privacy.initial` has it. average: of the states, where the run is
        evaluated by one.
        """
        super().__init__()
        self.theta, self._optimizer = theta, optimizer
        self._buffers = optimizer.buffers(theta.numel()) if optimizer else {}
        #: What goes down beside theta (fedhpc.training.auxiliary), flat, by name, such as c of client.scaffold.
        self.auxiliary = dict(auxiliary or {})
        #: What transforms keep from round to round (fedhpc.updates.pipeline), by name.
        self.transforms = dict(transforms or {})
        #: What the aggregator keeps from round to round (`Cohort.memory`), float64 (P,) by name.
        self.memory = dict(memory or {})
        #: What has been spent of a privacy budget (fedhpc.privacy), by name.
        self.privacy = dict(privacy or {})
        #: theta (P,) of earlier versions from which clients still train, by version.
        self.past: dict[int, Tensor] = {}
        #: Of the states so far; None where the last one is evaluated.
        self.average = average
        #: Which of the evaluated states was best, and what was evaluated then (P,), where it is wanted at the end.
        self.selection = Selection()
        self.best: Tensor | None = None

    @property
    def evaluated(self) -> Tensor:
        """What is evaluated now (P,): theta, or the average of the states so far."""
        mean = None if self.average is None else self.average.value
        return self.theta if mean is None else mean.to(self.theta.dtype)

    @property
    def chosen(self) -> Tensor:
        """What the run ends with (P,): of what was evaluated the last, or the best."""
        return self.evaluated if self.best is None else self.best

    def keep_past(self, version: int, needed_later: Sequence[int]) -> None:
        """Keep theta as `version`, and the earlier ones, as far as later rounds need them."""
        versions = self.past | {version: self.theta}
        self.past = {v: versions[v] for v in needed_later}

    def step(self, gradient: Tensor) -> float:
        """Move by the aggregated pseudo-gradient (P,) float64; returns the L2 norm of the move."""
        before = self.theta.double()
        after = self._optimizer.step(before, gradient, self._buffers) if self._optimizer else before - gradient
        self.theta = after.to(self.theta.dtype)
        return float(torch.linalg.vector_norm(self.theta.double() - before))

    def tensors(self) -> dict[str, np.ndarray]:
        """theta of now and earlier, the buffers, what others keep here (see `__init__`), and the versions."""
        tensors = {f"server.{name}": buffer.numpy() for name, buffer in self._buffers.items()}
        for named in (self.auxiliary, self.transforms):
            tensors |= {name: tensor.numpy() for name, tensor in named.items()}
        tensors |= {f"aggregator.{name}": tensor.numpy() for name, tensor in self.memory.items()}
        tensors |= {f"privacy.{name}": tensor.numpy() for name, tensor in self.privacy.items()}
        tensors |= {f"past.{version}": theta.numpy() for version, theta in self.past.items()}
        if self.best is not None:
            tensors["best"] = self.best.numpy()
        tensors |= self.selection.tensors()
        tensors |= {} if self.average is None else self.average.tensors()
        return {"theta": self.theta.numpy(), **tensors, **super().tensors()}

    def load(self, tensors: Mapping[str, np.ndarray]) -> None:
        """The inverse of `tensors`."""
        super().load(tensors)
        self.theta = torch.from_numpy(tensors["theta"].copy())
        self._buffers = {name: torch.from_numpy(tensors[f"server.{name}"].copy()) for name in self._buffers}
        self.transforms = {name: torch.from_numpy(tensors[name].copy()) for name in self.transforms}
        self.memory = {name: torch.from_numpy(tensors[f"aggregator.{name}"].copy()) for name in self.memory}
        self.privacy = {name: torch.from_numpy(tensors[f"privacy.{name}"].copy()) for name in self.privacy}
        self.auxiliary = {name: torch.from_numpy(tensors[name].copy()) for name in self.auxiliary}
        past = [name for name in tensors if name.startswith("past.")]
        self.past = {int(name.removeprefix("past.")): torch.from_numpy(tensors[name].copy()) for name in past}
        self.best = torch.from_numpy(tensors["best"].copy()) if "best" in tensors else None
        self.selection.load(tensors)
        if self.average is not None:
            self.average.load(tensors)
