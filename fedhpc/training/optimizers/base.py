"""What a client optimizer is: the local step of all clients of a block at once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from copy import copy
from typing import ClassVar

from fedhpc.lazy import Tensor
from fedhpc.registry import Open, Section


class ClientOptimizer(ABC):
    """Moves the parameters of K clients by their gradients, a row each (client.optimizer)."""

    #: The keys it adds to the section `client`.
    Options: ClassVar[type[Section]] = Section

    #: Whether a client's update is a weighted sum of its gradients, so that `movement` says how much of one.
    sums_gradients: ClassVar[bool] = False

    def __init__(self, options: Open) -> None:
        """options: the section `client` of the configuration."""
        self.options = options
        #: Steps of earlier rounds that buffers hold when a round begins, by name; 0 where it is not named.
        self.earlier: Mapping[str, float] = {}

    def going_on(self, earlier: Mapping[str, float]) -> ClientOptimizer:
        """The same optimizer for a round in which some of its `moments` begin with `earlier` steps in them."""
        other = copy(self)
        other.earlier = earlier
        return other

    @property
    def moments(self) -> Mapping[str, float]:
        """The buffers v <- b v + (1 - b) x that are means of powers x of the gradient, and their b; the first is first.

        With client.moments they go on from round to round: `step` corrects them by 1 - b^n with n as of `steps_in`.
        """
        return {}

    def steps_in(self, moment: str, count: Tensor) -> Tensor:
        """How many steps a moment holds after the steps `count` (K, 1) of the round: (K, 1)."""
        return count + self.earlier[moment] if moment in self.earlier else count

    @property
    def follows_gradients(self) -> bool:
        """Whether a client's update is the sum of learning rates times gradients, with the weight decay in them."""
        return False

    @property
    def buffers(self) -> tuple[str, ...]:
        """Names of the tensors (K, T) that `step` keeps from step to step, zero before the first."""
        return ()

    @abstractmethod
    def step(self, theta: Tensor, gradient: Tensor, buffers: Mapping[str, Tensor], count: Tensor, lr: Tensor) -> None:
        """Take one step in place.

        theta and gradient are (K, T), as is each buffer; count (K, 1): steps taken, this one included; lr (K, 1), or
        (K, T) where the method has several learning rates.
        """

    def movement(self, rates: Sequence[float]) -> float:
        """|a|: how far the steps with these learning rates go under a constant gradient of 1.

        For the aggregators that normalise by it (FedNova); of those with `sums_gradients`.
        """
        raise NotImplementedError(f"the updates of {type(self).__name__} are no sums of gradients")
