"""Clip each client's update to a largest L2 norm: g min(1, norm / |g|) (McMahan et al. 2018, arXiv 1710.06963)."""

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
    norm: float = Field(1.0, gt=0, description="largest L2 norm of an update")


def on_client(updates: Tensor, options: Any) -> Tensor:
    """updates (K, P), one row per client -> what the clients upload (K, P)."""
    norms = torch.linalg.vector_norm(updates.double(), dim=1, keepdim=True)
    return updates * (options.norm / norms).clamp(max=1.0).to(updates.dtype)
