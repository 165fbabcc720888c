"""FedYogi (Reddi et al. 2021, arXiv 2003.00295, algorithm 2): m = beta1 m + (1 - beta1) g,
v = v - (1 - beta2) g^2 sign(v - g^2), theta - lr m / (sqrt(v) + tau)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from fedhpc.lazy import lazy
from fedhpc.registry import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


class Options(Section):
    beta1: float = Field(0.9, ge=0, lt=1, description="decay of the mean")
    beta2: float = Field(0.99, ge=0, lt=1, description="decay of the mean square")
    tau: float = Field(1e-3, gt=0, description="adaptivity: added to the root; v starts at tau^2")


def initial_state(size: int, options: Any) -> dict[str, Tensor]:
    """The float64 vectors (P,) that `step` keeps from round to round."""
    zeros = torch.zeros(size, dtype=torch.float64)
    return {"mean": zeros, "square": torch.full_like(zeros, options.tau**2)}


def step(theta: Tensor, gradient: Tensor, state: dict[str, Tensor], options: Any) -> Tensor:
    """The next global state (P,). gradient: the aggregated pseudo-gradient (P,)."""
    mean = state["mean"].mul_(options.beta1).add_(gradient, alpha=1 - options.beta1)
    g2 = gradient.square()
    square = state["square"]
    square.sub_((1 - options.beta2) * g2 * (square - g2).sign())
    return theta - options.lr * mean / (square.sqrt() + options.tau)
