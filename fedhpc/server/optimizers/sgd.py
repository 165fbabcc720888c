"""theta - lr * g: FedAvg with lr 1 (McMahan et al. 2017, arXiv 1602.05629); with momentum FedAvgM (Hsu et al. 2019,
arXiv 1909.06335, section 4.2): v = beta v + g, theta - lr * v; with nesterov theta - lr * (g + beta v), DiLoCo's outer
step (Douillard et al. 2023, arXiv 2311.08105, algorithm 1) in the form of torch.optim.SGD."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from fedhpc.lazy import Tensor, torch
from fedhpc.registry import Section
from fedhpc.server.optimizers.base import ServerOptimizer


class SGD(ServerOptimizer):
    """Steps along the pseudo-gradient, with momentum if asked for; with lr 1 and none it is FedAvg."""

    class Options(Section):
        momentum: float = Field(0.0, ge=0, lt=1, description="beta of FedAvgM")
        nesterov: bool = Field(False, description="look ahead along the momentum, as DiLoCo's outer steps do")

        def conflict(self, config: Any) -> str | None:
            if self.nesterov and not self.momentum:
                return "nesterov looks ahead along the momentum, and server.momentum is 0: give both or neither"
            return super().conflict(config)

    def buffers(self, size: int) -> dict[str, Tensor]:
        return {"momentum": torch.zeros(size, dtype=torch.float64)} if self.options.momentum else {}

    def step(self, theta: Tensor, gradient: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        options = self.options
        if options.momentum:
            velocity = buffers["momentum"].mul_(options.momentum).add_(gradient)
            gradient = gradient + options.momentum * velocity if options.nesterov else velocity
        return theta - options.lr * gradient
