"""`aggregation: average`: A and B are averaged apart from each other.

As in FedIT (Zhang et al. 2023, arXiv 2305.05644). The product of the means is not the mean of the products.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from fedhpc.lazy import Tensor
from fedhpc.methods.base import PerClient, Tensors
from fedhpc.methods.lora.factors import Factors, name_a, name_b
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base


class Average:
    """A and B are trained and exchanged; the other rules derive from this one and say where they differ.

    Its members mean what those of `Method` mean.
    """

    def __init__(self, factors: Factors, options: Any, base: Base) -> None:
        self.factors, self.options, self.base = factors, options, base

    @property
    def trainable(self) -> Layout:
        """Names and shapes of what a client's optimizer trains."""
        return self.factors.layout

    @property
    def payload(self) -> Layout:
        """Names and shapes of what server and clients exchange."""
        return self.trainable

    def initial(self) -> Tensors:
        """The payload before the first round."""
        drawn = self.factors.drawn()
        return {name: drawn[name] for name in self.trainable.shapes}

    def start(self, received: PerClient, round_: int, clients: Sequence[int]) -> PerClient:
        """The factors with which local training starts."""
        return {name: received[name] for name in self.trainable.shapes}

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        """The payload after local training."""
        return trained

    def numbers_sent(self, client: int) -> int:
        """How many numbers a client has to send back: its own factors."""
        return self.trainable.size

    def term(self, path: str, trained: PerClient) -> tuple[Tensor, Tensor]:
        """A (1 or K, r, in) and B (1 or K, out, r) of a layer."""
        return trained[name_a(path)], trained[name_b(path)]

    def gained(self, path: str, received: PerClient) -> Tensor | None:
        """What a layer's weight has gained beside the trained term: (1 or K, out, in), or None."""
        return None

    #: Whether training can go on from an adapter of another rank or scale.
    takes_any_rank: ClassVar[bool] = False

    def imported(self, factors: Factors, values: Tensors) -> Tensors:
        """The payload that stands for the A and B of an adapter, `values`, whose shapes and scale `factors` has."""
        return values

    def exported(self, values: Tensors) -> tuple[Tensors, float]:
        """A and B of every layer as PEFT takes them, and alpha."""
        return values, self.options.alpha
