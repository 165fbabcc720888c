"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2), as torch.optim.AdamW, along the client axis."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from fedhpc.lazy import Tensor
from fedhpc.registry import Section
from fedhpc.training.optimizers.base import ClientOptimizer


class AdamW(ClientOptimizer):
    """Steps along the mean gradient over the root of its mean square; weight decay is apart from the gradient."""

    class Options(Section):
        beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of the gradient")
        beta2: float = Field(0.999, ge=0, lt=1, description="decay of the mean of its square")
        eps: float = Field(1e-8, gt=0, description="added to the root of the mean square")

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("mean", "square")

    @property
    def moments(self) -> Mapping[str, float]:
        return {"mean": self.options.beta1, "square": self.options.beta2}

    def step(self, theta: Tensor, gradient: Tensor, buffers: Mapping[str, Tensor], count: Tensor, lr: Tensor) -> None:
        options = self.options
        mean = buffers["mean"].lerp_(gradient, 1 - options.beta1)
        square = buffers["square"].mul_(options.beta2).addcmul_(gradient, gradient, value=1 - options.beta2)
        if options.weight_decay:
            theta.mul_(1 - lr * options.weight_decay)
        of_mean, of_square = (self.steps_in(name, count) for name in ("mean", "square"))
        root = (square.sqrt() / (1 - options.beta2**of_square).sqrt()).add_(options.eps)
        theta.sub_(mean / root * (lr / (1 - options.beta1**of_mean)))
