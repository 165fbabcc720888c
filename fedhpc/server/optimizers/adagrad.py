"""FedAdagrad (Reddi et al. 2021, arXiv 2003.00295, algorithm 2)."""

from __future__ import annotations

from pydantic import Field

from fedhpc.lazy import Tensor
from fedhpc.registry import Section
from fedhpc.server.optimizers.base import Adaptive


class Adagrad(Adaptive):
    """FedAdagrad: v = v + g^2."""

    class Options(Section):
        beta1: float = Field(0.0, ge=0, lt=1, description="decay of the mean")
        tau: float = Field(1e-3, gt=0, description="adaptivity: added to the root; v starts at tau^2")

    def accumulate(self, square: Tensor, gradient: Tensor) -> None:
        square.addcmul_(gradient, gradient)
