"""What the server keeps for the clients beside theta: it goes down with theta, and what they make of some comes up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

import numpy as np

from fedhpc.lazy import Tensor, torch
from fedhpc.updates.layout import Layout


class Auxiliary(ABC):
    """One flat vector (A,) that every client is sent beside theta, as it is."""

    #: The name of the vector in checkpoints.
    name: ClassVar[str]

    #: What is sent, in messages, after their number.
    contents: ClassVar[str]

    def __init__(self, layout: Layout, dtype: torch.dtype) -> None:
        """layout: of the vector, as exact sums need it, A numbers in all."""
        self.layout, self.dtype = layout, dtype

    @property
    def size(self) -> int:
        """A, the length of the vector."""
        return self.layout.size

    def initial_vector(self) -> Tensor:
        """The vector (A,) before the first round."""
        return torch.zeros(self.size, dtype=self.dtype)


class Exchanged(Auxiliary):
    """One of which every client sends another beside its update, as it is: transforms are of the updates alone."""

    @abstractmethod
    def weights(self, shares: np.ndarray, population: int) -> np.ndarray:
        """With which weights, float64 (C,), the server adds up what C clients have sent.

        shares: float64 (C,), of each in the weight of the planned cohort. population: number of all clients.
        """

    @abstractmethod
    def after(self, current: Tensor, total: Tensor) -> Tensor:
        """The server's next vector (A,), float64. current: float64 (A,); total: the weighted sum, float64 (A,)."""
