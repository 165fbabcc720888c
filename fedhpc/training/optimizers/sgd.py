"""Stochastic gradient descent with momentum, as torch.optim.SGD (dampening 0), along the client axis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pydantic import Field

from fedhpc.lazy import Tensor
from fedhpc.registry import Section
from fedhpc.training.optimizers.base import ClientOptimizer


class SGD(ClientOptimizer):
    """Steps along the gradient, with momentum if asked for."""

    class Options(Section):
        momentum: float = Field(0.0, ge=0, lt=1, description="share of the last step that is kept")
        nesterov: bool = Field(False, description="look ahead along the momentum")

    sums_gradients = True

    @property
    def follows_gradients(self) -> bool:
        return not self.options.momentum

    @property
    def buffers(self) -> tuple[str, ...]:
        return ("momentum",) if self.options.momentum else ()

    def step(self, theta: Tensor, gradient: Tensor, buffers: Mapping[str, Tensor], count: Tensor, lr: Tensor) -> None:
        options = self.options
        if options.weight_decay:
            gradient = gradient + options.weight_decay * theta
        if options.momentum:
            # torch starts the buffer with the first gradient, which is what a zero buffer gives as well.
            buffer = buffers["momentum"].mul_(options.momentum).add_(gradient)
            gradient = gradient + options.momentum * buffer if options.nesterov else buffer
        theta.addcmul_(gradient, lr, value=-1.0)

    def movement(self, rates: Sequence[float]) -> float:
        """|a| as in the base class, with momentum and the pull of client.proximal (Wang et al. 2020, section 3.1).

        That is the sum of a, and its norm as long as no weight is negative (lr * mu at most 1).
        """
        options = self.options
        moved = buffer = 0.0
        for lr in rates:
            step = 1.0 - options.proximal * moved
            buffer = options.momentum * buffer + step
            if options.momentum:
                step = step + options.momentum * buffer if options.nesterov else buffer
            moved += lr * step
        return moved
