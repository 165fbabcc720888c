"""`aggregation: ffa`: A stays as it was at first, and B alone is trained and exchanged.

FFA-LoRA (Sun et al. 2024, arXiv 2403.12313, section 4). The mean of the B_i A is then the mean of the B_i times A, and
the payload is half as large.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

from fedhpc.lazy import Tensor
from fedhpc.methods.base import PerClient, Tensors
from fedhpc.methods.lora.average import Average
from fedhpc.methods.lora.factors import Factors, is_a, name_a, name_b
from fedhpc.updates.layout import Layout


class FrozenA(Average):
    """B is trained and exchanged."""

    @cached_property
    def trainable(self) -> Layout:
        shapes = self.factors.layout.shapes
        return Layout({name_b(path): shapes[name_b(path)] for path in self.factors.widths})

    @cached_property
    def _frozen(self) -> PerClient:
        """A of every layer (1, r, in), on the device."""
        first = self.factors.first
        device, dtype = self.base.device, self.base.payload_dtype
        return {
            name_a(path): first[name_a(path)].to(device, dtype).unsqueeze(0)
            for path in self.factors.widths
        }  # fmt: skip

    def term(self, path: str, trained: PerClient, received: PerClient) -> tuple[Tensor, Tensor]:
        return self._frozen[name_a(path)], trained[name_b(path)]

    def imported(self, factors: Factors, values: Tensors) -> Tensors:
        """B; A stays from here on as the adapter has it."""
        device, dtype = self.base.device, self.base.payload_dtype
        self._frozen = {n: t.to(device, dtype).unsqueeze(0) for n, t in values.items() if is_a(n)}
        return {name: values[name] for name in self.trainable.shapes}

    def exported(self, values: Tensors) -> tuple[Tensors, dict[str, Any]]:
        return super().exported({**{name: a[0] for name, a in self._frozen.items()}, **values})
