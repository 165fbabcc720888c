"""FedYogi (Reddi et al. 2021, arXiv 2003.00295, algorithm 2)."""

from __future__ import annotations

from fedhpc.lazy import Tensor
from fedhpc.server.optimizers.base import Decaying


class Yogi(Decaying):
    """FedYogi: v = v - (1 - beta2) g^2 sign(v - g^2)."""

    def accumulate(self, square: Tensor, gradient: Tensor) -> None:
        g2 = gradient.square()
        square.sub_((1 - self.options.beta2) * g2 * (square - g2).sign())
