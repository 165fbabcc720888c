"""FedProx: a pull towards the state with which the round began (Li et al. 2020, arXiv 1812.06127, equation 2).

The local objective is F_i(theta) + mu/2 |theta - theta_t|^2, whose second term has the gradient mu (theta - theta_t).
"""

from __future__ import annotations

from fedhpc.lazy import Tensor
from fedhpc.training.local import LocalTraining
from fedhpc.training.rules.base import Rule


class Proximal(Rule):
    """Adds mu times the way that a client has come from its start (client.proximal)."""

    def __init__(self, mu: float, start: Tensor) -> None:
        self.mu, self.start = mu, start.detach().clone()

    @classmethod
    def of(cls, local: LocalTraining, start: Tensor, corrections: Tensor | None) -> Rule | None:
        return cls(local.proximal, start) if local.proximal else None

    def change(self, gradient: Tensor, parameters: Tensor) -> None:
        gradient.add_(parameters - self.start[: len(gradient)], alpha=self.mu)
