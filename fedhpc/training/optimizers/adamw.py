"""AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101, algorithm 2), as torch.optim.AdamW, along the client axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedhpc.registry import Section

if TYPE_CHECKING:
    from torch import Tensor


class Options(Section):
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean of the gradient")
    beta2: float = Field(0.999, ge=0, lt=1, description="decay of the mean of its square")
    eps: float = Field(1e-8, gt=0, description="added to the root of the mean square")


def state_names(options: Any) -> list[str]:
    """The buffers of shape (K, T) that `step` needs, zero before the first step."""
    return ["mean", "square"]


def step(theta: Tensor, grad: Tensor, state: dict[str, Tensor], count: Tensor, lr: Tensor, options: Any) -> None:
    """One step in place. theta, grad (K, T); count (K, 1): steps taken, this one included; lr (K, 1)."""
    mean = state["mean"].lerp_(grad, 1 - options.beta1)
    square = state["square"].mul_(options.beta2).addcmul_(grad, grad, value=1 - options.beta2)
    if options.weight_decay:
        theta.mul_(1 - lr * options.weight_decay)
    root = (square.sqrt() / (1 - options.beta2**count).sqrt()).add_(options.eps)
    theta.sub_(mean / root * (lr / (1 - options.beta1**count)))
