"""theta - lr * g: FedAvg with lr 1 (McMahan et al. 2017, arXiv 1602.05629); with momentum FedAvgM (Hsu et al. 2019,
arXiv 1909.06335, section 4.2): v = beta v + g, theta - lr * v."""

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
    momentum: float = Field(0.0, ge=0, lt=1, description="beta of FedAvgM")


def initial_state(size: int, options: Any) -> dict[str, Tensor]:
    """The float64 vectors (P,) that `step` keeps from round to round."""
    return {"momentum": torch.zeros(size, dtype=torch.float64)} if options.momentum else {}


def step(theta: Tensor, gradient: Tensor, state: dict[str, Tensor], options: Any) -> Tensor:
    """The next global state (P,). gradient: the aggregated pseudo-gradient (P,)."""
    if options.momentum:
        gradient = state["momentum"].mul_(options.momentum).add_(gradient)
    return theta - options.lr * gradient
