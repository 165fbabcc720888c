"""`aggregation: svd`: B alone is trained, as with ffa, and the server makes A and B anew from their product.

FedSVD (Lee et al. 2025, arXiv 2505.12805). With the mean of the B_i the server takes the singular values of B A =
U S V^T and sends A = V^T and B = U S. So A has orthonormal rows that follow what was learnt, and the product stays as
it is. In the first round A is as it was drawn.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedhpc.lazy import Tensor
from fedhpc.methods.base import Tensors
from fedhpc.methods.lora.average import Average, needs_last_state, needs_plain_mean
from fedhpc.methods.lora.factors import Factors, leading_of_sum, name_a, name_b
from fedhpc.methods.lora.part import Part

if TYPE_CHECKING:
    from fedhpc.models.base import Base


class Refactored(Part):
    """B is trained; A and B go down."""

    def __init__(self, factors: Factors, options: Any, base: Base) -> None:
        super().__init__(Average(factors, options, base), [name_b(path) for path in factors.widths])

    def on_server(self, values: Tensors) -> Tensors:
        made: dict[str, Tensor] = {}
        for path in self.factors.widths:
            a, b = values[name_a(path)], values[name_b(path)]
            if b.any():  # else nothing was learnt, and A stays as it was drawn
                u, s, vt = leading_of_sum(b.double() @ a.double(), len(a))
                a, b = vt.to(a.dtype), (u * s).to(b.dtype)
            made |= {name_a(path): a, name_b(path): b}
        return made

    @classmethod
    def conflict(cls, options: Any, config: Any) -> str | None:
        return needs_plain_mean(options, config) or needs_last_state(options, config)
