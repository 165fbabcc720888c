"""The two factors of every adapted layer: A (r, in) and B (out, r), whose product is added to the layer's weight."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from fedhpc.lazy import Tensor, torch
from fedhpc.rng import torch_seed
from fedhpc.updates.layout import Layout

_A = "lora_A.weight"


def name_a(path: str) -> str:
    """The name of A of the layer at `path`, as in PEFT."""
    return f"{path}.{_A}"


def name_b(path: str) -> str:
    """The name of B of the layer at `path`, as in PEFT."""
    return f"{path}.lora_B.weight"


def is_a(name: str) -> bool:
    """Whether a tensor of this name is the A of a layer."""
    return name.endswith(_A)


def name_sum(path: str) -> str:
    """The name of D, all that the weight of the layer at `path` has gained."""
    return f"{path}.lora_delta.weight"


@dataclass(frozen=True)
class Factors:
    """Shapes and first values of the factors."""

    widths: Mapping[str, tuple[int, int]]  # path of each adapted layer, in the model's order -> (in, out)
    rank: int  # r; the largest where clients have ranks of their own
    scale: float  # s, by which the product is multiplied
    seed: int

    @cached_property
    def layout(self) -> Layout:
        """A and B of every layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path, (inside, outside) in self.widths.items():
            shapes[name_a(path)] = (self.rank, inside)
            shapes[name_b(path)] = (outside, self.rank)
        return Layout(shapes)

    def drawn(self, *keys: int) -> dict[str, Tensor]:
        """A and B before the first round, or those of `keys`: a round and a client."""
        drawing = torch.Generator().manual_seed(torch_seed(self.seed, "lora", *keys))
        # The uniform bound that torch.nn.Linear and PEFT use for A.
        return {
            name: (torch.rand(shape, generator=drawing) * 2 - 1) / shape[1] ** 0.5 if is_a(name) else torch.zeros(shape)
            for name, shape in self.layout.shapes.items()
        }

    def product(self, path: str, values: Mapping[str, Tensor]) -> Tensor:
        """s B A of a layer: (..., out, in)."""
        return self.scale * values[name_b(path)] @ values[name_a(path)]
