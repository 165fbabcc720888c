"""FedAdam (Reddi et al. 2021, arXiv 2003.00295, algorithm 2)."""

from __future__ import annotations

from fedhpc.lazy import Tensor
from fedhpc.server.optimizers.base import Decaying


class Adam(Decaying):
    """FedAdam: v = beta2 v + (1 - beta2) g^2."""

    def accumulate(self, square: Tensor, gradient: Tensor) -> None:
        square.mul_(self.options.beta2).addcmul_(gradient, gradient, value=1 - self.options.beta2)
