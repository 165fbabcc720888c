"""`aggregation: sb`: A and B stay as they are, and R (r, r) between them alone is trained and exchanged.

Fed-SB (Singhal et al. 2025, arXiv 2502.15436): h = W x + s B R A x, and the mean of the B R_i A is exactly B times the
mean of the R_i times A. r numbers for each of r: the traffic does not depend on how wide a layer is.

A and B have orthonormal rows and columns, as in LoRA-SB (Ponkshe et al. 2024, arXiv 2411.19557): the first r singular
vectors of a weight (out, in), here the frozen one (as in LoRA-XS, Balazy et al. 2024, arXiv 2405.17604, where they are
scaled by the singular values), with R = 0. LoRA-SB takes those of a first step of full fine-tuning, and R its singular
values. That is what `method.from` does with an adapter: A, B and R are of its product.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from fedhpc.lazy import Tensor, torch
from fedhpc.methods._linear import weight_of
from fedhpc.methods.base import PerClient, Tensors
from fedhpc.methods.lora.average import Average
from fedhpc.methods.lora.factors import Factors, leading, leading_of_sum, name_a, name_b, name_r
from fedhpc.updates.layout import Layout


class Between(Average):
    """R is trained and exchanged."""

    takes_any_rank = True

    @cached_property
    def trainable(self) -> Layout:
        return Layout({name_r(path): (rank, rank) for path, rank in self.factors.ranks.items()})

    def initial(self) -> Tensors:
        return {name: torch.zeros(shape) for name, shape in self.trainable.shapes.items()}

    @cached_property
    def _frozen(self) -> dict[str, Tensor]:
        """A (1, r, in) and B (1, out, r) of every layer, on the device: singular vectors of its weight."""
        frozen: dict[str, Tensor] = {}
        for path, rank in self.factors.ranks.items():
            weight = weight_of(self.base.model.get_submodule(path))
            # In half precision there is no such decomposition.
            u, _, vt = leading(weight if weight.dtype == torch.float64 else weight.float(), rank)
            frozen |= self._on_device(path, u, vt)
        return frozen

    def _on_device(self, path: str, u: Tensor, vt: Tensor) -> dict[str, Tensor]:
        device, dtype = self.base.device, self.base.payload_dtype
        return {name_a(path): vt.to(device, dtype).unsqueeze(0), name_b(path): u.to(device, dtype).unsqueeze(0)}

    def term(self, path: str, trained: PerClient, received: PerClient) -> tuple[Tensor, Tensor]:
        return self._frozen[name_a(path)], self._frozen[name_b(path)] @ trained[name_r(path)]

    @classmethod
    def conflict(cls, options: Any, config: Any) -> str | None:
        if config.method.goes_on_from is not None or config.model.quantize == "none":
            return None
        return (
            "method.aggregation sb begins with the singular vectors of the weights, which model.quantize "
            f"{config.model.quantize} has packed: give an adapter with method.from, or use quantize none"
        )

    def imported(self, factors: Factors, values: Tensors) -> Tensors:
        """R; A and B stay from here on as the adapter's product has them."""
        self._frozen, payload = {}, {}
        for path, rank in self.factors.ranks.items():
            product = factors.product(path, values)
            u, s, vt = leading_of_sum(product / self.factors.scales[path], rank)
            self._frozen |= self._on_device(path, u, vt)
            payload[name_r(path)] = s.diag().to(product.dtype)
        return payload

    def exported(self, values: Tensors) -> tuple[Tensors, dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for path in self.factors.widths:
            b = self._frozen[name_b(path)][0].cpu() @ values[name_r(path)].cpu()
            tensors |= {name_a(path): self._frozen[name_a(path)][0], name_b(path): b}
        return super().exported(tensors)
