"""What a server optimizer is, and what FedAdam, FedYogi and FedAdagrad have in common.

The family is that of Reddi et al. 2021 (arXiv 2003.00295, algorithm 2), whose Delta_t is minus our pseudo-gradient.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from pydantic import Field

from fedhpc.lazy import Tensor, torch
from fedhpc.registry import Open, Section


class ServerOptimizer(ABC):
    """Turns the aggregated pseudo-gradient into the next global parameters (server.optimizer)."""

    #: The keys it adds to the section `server`.
    Options: ClassVar[type[Section]] = Section

    def __init__(self, options: Open) -> None:
        """options: the section `server` of the configuration; server.lr is options.lr."""
        self.options = options

    def buffers(self, size: int) -> dict[str, Tensor]:
        """The float64 vectors (P,) that `step` keeps from round to round, as they are before the first."""
        return {}

    @abstractmethod
    def step(self, theta: Tensor, gradient: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        """The next global parameters. theta and gradient, the aggregated pseudo-gradient, are float64 (P,).

        The buffers change in place; `gradient` is left as it is.
        """


class Adaptive(ServerOptimizer):
    """m = beta1 m + (1 - beta1) g and theta - lr m / (sqrt(v) + tau); how v follows g is the subclass's own."""

    class Options(Section):
        beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean")
        beta2: float = Field(0.99, ge=0, lt=1, description="decay of the mean square")
        tau: float = Field(1e-3, gt=0, description="adaptivity: added to the root; v starts at tau^2")

    def buffers(self, size: int) -> dict[str, Tensor]:
        zeros = torch.zeros(size, dtype=torch.float64)
        return {"mean": zeros, "square": torch.full_like(zeros, self.options.tau**2)}

    def step(self, theta: Tensor, gradient: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        options = self.options
        mean = buffers["mean"].mul_(options.beta1).add_(gradient, alpha=1 - options.beta1)
        self.accumulate(buffers["square"], gradient)
        return theta - options.lr * mean / (buffers["square"].sqrt() + options.tau)

    @abstractmethod
    def accumulate(self, square: Tensor, gradient: Tensor) -> None:
        """Bring v, `square` (P,), up to date with the pseudo-gradient, in place."""
