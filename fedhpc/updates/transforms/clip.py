"""Clip each client's update to a largest L2 norm: g min(1, norm / |g|) (McMahan et al. 2018, arXiv 1710.06963)."""

from __future__ import annotations

from pydantic import Field

from fedhpc.lazy import Tensor, torch
from fedhpc.registry import Section
from fedhpc.updates.transforms.base import Transform, TransformContext


class Clip(Transform):
    """Shortens each update that is longer than `norm` to that length."""

    class Options(Section):
        norm: float = Field(1.0, gt=0, description="largest L2 norm of an update")

    def on_client(self, updates: Tensor, context: TransformContext) -> Tensor:
        norms = torch.linalg.vector_norm(updates.double(), dim=1, keepdim=True)
        return updates * (self.options.norm / norms).clamp(max=1.0).to(updates.dtype)
