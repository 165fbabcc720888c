"""What a method has to say: its payload, how the payload enters the frozen base, and what it exports to.

A method never sees a rank, a round, an optimizer or a file other than its export. All tensors of a block carry
the client axis K in front; `rows` maps each row of a batch (B) to its client, so one forward serves K clients.

Two layouts: the *payload* is what is exchanged; the *state* is what a client's optimizer trains. They are the same
unless a method reparametrises (prefix with `exchange: materialised`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedhpc.kinds.base import Attached as Attached
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from torch import Tensor

    from fedhpc.models import Base

    Tensors = Mapping[str, Tensor]


class Method(ABC):
    """One way to customize a base model."""

    #: Clients of a block can share one forward; False: clients train in turn.
    shares_base = True

    def __init__(self, options: Any, base: Base, seed: int) -> None:
        self.options, self.base, self.seed = options, base, seed

    @property
    @abstractmethod
    def payload(self) -> Layout:
        """What is exchanged."""

    @property
    def state(self) -> Layout:
        """What a client trains."""
        return self.payload

    @property
    def probe(self) -> float | None:
        """eps of the central differences from which local training takes its gradients; None: by backpropagation."""
        return None

    def trains(self, parameter: str) -> bool:
        """Whether this parameter of the base is itself among what is trained."""
        return parameter in self.payload.shapes

    @abstractmethod
    def initial(self) -> dict[str, Tensor]:
        """The payload before the first round, on the CPU."""

    def start(self, payload: Tensors, round_: int = 0, clients: Sequence[int] = ()) -> Tensors:
        """The state in which local training starts, from a payload (1 or K, ...).

        clients: the K that train in this round, none in an evaluation. The state may have one row for all.
        """
        return payload

    def finish(self, state: Tensors, payload: Tensors) -> Tensors:
        """The payload (K, ...) after local training; `payload` is the one it started from."""
        return state

    def sent_up(self, client: int) -> int:
        """How many numbers a client has to send back: those of the payload that do not follow from the others."""
        return self.payload.size

    @abstractmethod
    def attach(
        self, state: Tensors, payload: Tensors, rows: Tensor, noise: Tensor | None = None
    ) -> AbstractContextManager[Attached]:
        """Make the base compute row b of a batch with the state of client rows[b].

        state and payload: name -> (K, ...); rows: int64 (B,). noise: int64 (B,), the key of each row's random draws
        in training (`fedhpc.rng.bits`), such as dropout; None in an evaluation, which draws nothing.
        """

    @abstractmethod
    def export(self, payload: Tensors, path: Path) -> None:
        """Write the payload to the folder `path` in the format of its own library (PEFT, transformers)."""
