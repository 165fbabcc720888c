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
        """The float64 tensors that `step` keeps from round to round, as they are before the first; size: P."""
        return {}

    @abstractmethod
    def step(self, theta: Tensor, gradient: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        """The next global parameters. theta and gradient, the aggregated pseudo-gradient, are float64 (P,).

        The buffers change in place; `gradient` is left as it is.
        """


class Adaptive(ServerOptimizer):
    """m = beta1 m + (1 - beta1) g and theta - lr m / (sqrt(v) + tau); how v follows g is the subclass's own."""

    def buffers(self, size: int) -> dict[str, Tensor]:
        zeros = torch.zeros(size, dtype=torch.float64)
        return {"mean": zeros, "square": torch.full_like(zeros, self.options.tau**2)}

    def step(self, theta: Tensor, gradient: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        options = self.options
        buffers["mean"].mul_(options.beta1).add_(gradient, alpha=1 - options.beta1)
        self.accumulate(buffers["square"], gradient)
        mean, square = self.moments(buffers)
        return theta - options.lr * mean / (square.sqrt() + options.tau)

    def moments(self, buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """m and v (P,) as they enter the step."""
        return buffers["mean"], buffers["square"]

    @abstractmethod
    def accumulate(self, square: Tensor, gradient: Tensor) -> None:
        """Bring v, `square` (P,), up to date with the pseudo-gradient, in place."""


class Decaying(Adaptive):
    """An adaptive optimizer whose v forgets too, with beta2.

    With bias_correction step t = 1, 2, ... is along m / (1 - beta1^t) over the root of v / (1 - beta2^t), as in Adam
    (Kingma and Ba 2015, arXiv 1412.6980, algorithm 1), with tau for its epsilon. v then starts at 0, not at tau^2:
    divided by 1 - beta2^t, a start would count beta2^t / (1 - beta2^t) times, 99 times in the first step of beta2 0.99.
    """

    class Options(Section):
        beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean")
        beta2: float = Field(0.99, ge=0, lt=1, description="decay of the mean square")
        tau: float = Field(1e-3, gt=0, description="adaptivity: added to the root; v starts at tau^2")
        bias_correction: bool = Field(False, description="divide m and v by the weight of what is in them, as Adam")

    def buffers(self, size: int) -> dict[str, Tensor]:
        buffers = super().buffers(size)
        if self.options.bias_correction:
            buffers["square"].zero_()
            buffers["steps"] = torch.zeros(1, dtype=torch.float64)
        return buffers

    def step(self, theta: Tensor, gradient: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        if self.options.bias_correction:
            buffers["steps"].add_(1)
        return super().step(theta, gradient, buffers)

    def moments(self, buffers: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        mean, square = super().moments(buffers)
        if self.options.bias_correction:
            steps = float(buffers["steps"])
            mean, square = mean / (1 - self.options.beta1**steps), square / (1 - self.options.beta2**steps)
        return mean, square
