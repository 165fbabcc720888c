"""FedProx: a pull towards the state with which the round began (Li et al. 2020, arXiv 1812.06127, equation 2).

The local objective is F_i(theta) + mu/2 |theta - theta_t|^2, whose second term has the gradient mu (theta - theta_t).
With the relative metric the square of a block b of theta is over the mean square of that block of theta_t:

    mu/2 sum_b |theta_b - theta_t,b|^2 / m_b,   m_b = |theta_t,b|^2 / size of b

so that blocks of different scale, as keys and values of a prefix have, may go the same way for their length. A block of
zeros has no scale to measure a way by, so nothing pulls it in that round.
"""

from __future__ import annotations

from fedhpc.lazy import Tensor, torch
from fedhpc.methods.base import Method
from fedhpc.training.local import LocalTraining
from fedhpc.training.rules.base import Rule


class Proximal(Rule):
    """Adds mu times the way that a client has come from its start (client.proximal)."""

    def __init__(self, mu: float, start: Tensor, weights: Tensor | None = None) -> None:
        """weights (K, T): by which the ways from `start` (K, T) are multiplied; None: 1."""
        self.mu, self.start, self.weights = mu, start.detach().clone(), weights

    @classmethod
    def of(cls, local: LocalTraining, start: Tensor, corrections: Tensor | None, method: Method) -> Rule | None:
        if not local.proximal:
            return None
        relative = local.proximal_metric == "relative"
        return cls(local.proximal, start, _weights(start.detach(), method) if relative else None)

    def change(self, gradient: Tensor, parameters: Tensor) -> None:
        way = parameters - self.start[: len(gradient)]
        if self.weights is not None:
            way.mul_(self.weights[: len(gradient)])
        gradient.add_(way, alpha=self.mu)


def _weights(start: Tensor, method: Method) -> Tensor:
    """1 / m_b for each number of a block b of `start` (K, T), 0 where 1 / m_b is no finite number: (K, T)."""
    trainable = method.trainable
    means = trainable.block_means(start.square(), {name: method.blocks(name) for name in trainable.shapes})
    smallest = torch.finfo(start.dtype).tiny
    return trainable.of_blocks({name: torch.where(m > smallest, 1 / m, 0.0) for name, m in means.items()})
