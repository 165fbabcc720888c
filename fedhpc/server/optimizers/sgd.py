"""theta - lr * g: FedAvg with lr 1 (McMahan et al. 2017, arXiv 1602.05629); with momentum FedAvgM (Hsu et al. 2019,
arXiv 1909.06335, section 4.2): v = beta v + g, theta - lr * v."""

from __future__ import annotations

from pydantic import Field

from fedhpc.lazy import Tensor, torch
from fedhpc.registry import Section
from fedhpc.server.optimizers.base import ServerOptimizer


class SGD(ServerOptimizer):
    """Steps along the pseudo-gradient, with momentum if asked for; with lr 1 and none it is FedAvg."""

    class Options(Section):
        momentum: float = Field(0.0, ge=0, lt=1, description="beta of FedAvgM")

    def buffers(self, size: int) -> dict[str, Tensor]:
        return {"momentum": torch.zeros(size, dtype=torch.float64)} if self.options.momentum else {}

    def step(self, theta: Tensor, gradient: Tensor, buffers: dict[str, Tensor]) -> Tensor:
        if self.options.momentum:
            gradient = buffers["momentum"].mul_(self.options.momentum).add_(gradient)
        return theta - self.options.lr * gradient
