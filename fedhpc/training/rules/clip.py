"""Clipping by norm: a client's gradient is scaled down where it is longer than client.clip_norm.

As torch.nn.utils.clip_grad_norm_ (Pascanu et al. 2013, arXiv 1211.5063, algorithm 1), along the client axis.
"""

from __future__ import annotations

from collections.abc import Callable

from fedhpc.lazy import Tensor, torch
from fedhpc.methods.base import Method
from fedhpc.training.local import LocalTraining
from fedhpc.training.rules.base import Rule

_EPSILON = 1e-6  # as in clip_grad_norm_


class Clip(Rule):
    """Limits the L2 norm of each client's gradient (client.clip_norm)."""

    def __init__(self, norm: float, total: Callable[[Tensor], Tensor] | None = None) -> None:
        """total: adds up the squared norms of the parts of a gradient; None: it is whole."""
        self.norm, self._total = norm, total

    @classmethod
    def of(cls, local: LocalTraining, start: Tensor, corrections: Tensor | None, method: Method) -> Rule | None:
        return None if local.clip_norm is None else cls(local.clip_norm, local.total)

    def change(self, gradient: Tensor, parameters: Tensor) -> None:
        norms = torch.linalg.vector_norm(gradient, dim=1, keepdim=True)
        if self._total is not None:
            norms = self._total(norms.square_()).sqrt_()
        gradient.mul_((self.norm / (norms + _EPSILON)).clamp(max=1.0))
