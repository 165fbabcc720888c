"""Stochastic gradient descent with momentum, as torch.optim.SGD (dampening 0), along the client axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedhpc.registry import Section

if TYPE_CHECKING:
    from torch import Tensor


class Options(Section):
    momentum: float = Field(0.0, ge=0, lt=1, description="share of the last step that is kept")
    nesterov: bool = Field(False, description="look ahead along the momentum")


def state_names(options: Any) -> list[str]:
    """The buffers of shape (K, T) that `step` needs, zero before the first step."""
    return ["momentum"] if options.momentum else []


def step(theta: Tensor, grad: Tensor, state: dict[str, Tensor], count: Tensor, lr: Tensor, options: Any) -> None:
    """One step in place. theta, grad (K, T); count (K, 1): steps taken, this one included; lr (K, 1)."""
    if options.weight_decay:
        grad = grad + options.weight_decay * theta
    if options.momentum:
        # torch starts the buffer with the first gradient, which is what a zero buffer gives as well.
        buffer = state["momentum"].mul_(options.momentum).add_(grad)
        grad = grad + options.momentum * buffer if options.nesterov else buffer
    theta.addcmul_(grad, lr, value=-1.0)
