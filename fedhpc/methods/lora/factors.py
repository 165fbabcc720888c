"""The two factors of every adapted layer: A (r, in) and B (out, r), whose product is added to the layer's weight.

The weights of routed experts have one of each for every expert: A (E, r, in) and B (E, out, r).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.methods._linear import expression, some
from fedhpc.rng import torch_seed
from fedhpc.updates.layout import Layout

_A = "lora_A.weight"
_Value = TypeVar("_Value", int, float)


def name_a(path: str) -> str:
    """The name of A of the layer at `path`, as in PEFT."""
    return f"{path}.{_A}"


def name_b(path: str) -> str:
    """The name of B of the layer at `path`, as in PEFT."""
    return f"{path}.lora_B.weight"


def name_r(path: str) -> str:
    """The name of R, which is between A and B of the layer at `path`."""
    return f"{path}.lora_R.weight"


def is_a(name: str) -> bool:
    """Whether a tensor of this name is the A of a layer."""
    return name.endswith(_A)


def layer_of(name: str) -> str:
    """The path of the layer whose A has this name."""
    return name.removesuffix(f".{_A}")


def name_magnitude(path: str) -> str:
    """The name of the magnitudes of the layer at `path`, as in PEFT."""
    return f"{path}.lora_magnitude_vector"


def name_sum(path: str) -> str:
    """The name of D, all that the weight of the layer at `path` has gained."""
    return f"{path}.lora_delta.weight"


def by_pattern(paths: Collection[str], default: _Value, patterns: Mapping[str, _Value], key: str) -> dict[str, _Value]:
    """Path -> the value of the first pattern that matches the end of the path, cut at a dot, as PEFT takes them.

    UserError for what is no regular expression, and where one matches none of the paths.
    """
    matchers = {pattern: re.compile(rf"(.*\.)?({expression(pattern, key).pattern})$").match for pattern in patterns}
    for pattern, matches in matchers.items():
        if not any(map(matches, paths)):
            raise UserError(
                f"{key}: '{pattern}' matches no adapted layer; they are: {some(paths)}",
                key=key, remedy="name the end of a layer's path, such as v_proj or layers.0.self_attn.v_proj",
            )  # fmt: skip
    return {
        path: next((patterns[pattern] for pattern, matches in matchers.items() if matches(path)), default)
        for path in paths
    }


def leading(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (out, r), S (r,) and V^T (r, in) of the r = `rank` largest singular values of a weight (out, in).

    U S V^T is its best approximation of that rank. A weight that has fewer singular values gets zeros for the others.
    """
    u, s, vt = torch.linalg.svd(weight, full_matrices=False)
    missing, pad = max(0, rank - len(s)), torch.nn.functional.pad
    return pad(u[:, :rank], (0, missing)), pad(s[:rank], (0, missing)), pad(vt[:rank], (0, 0, 0, missing))


def leading_of_sum(weight: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """What `leading` finds, in float64, for less where the weight is a sum of few products and so of low rank itself.

    Products with random vectors span its columns (Halko et al. 2011, arXiv 0909.4061, algorithm 4.2). They are doubled
    until what they miss is rounding of the weight's own type.
    """
    exact, drawing = weight.double(), torch.Generator().manual_seed(torch_seed(0, "span of a weight"))
    most = 64 * torch.finfo(weight.dtype).eps * torch.linalg.matrix_norm(exact)
    vectors = 2 * rank
    while 2 * vectors < min(weight.shape):
        drawn = torch.randn(weight.shape[1], vectors, dtype=exact.dtype, generator=drawing)
        q = torch.linalg.qr(exact @ drawn).Q
        inside = q.T @ exact
        if torch.linalg.matrix_norm(exact - q @ inside) <= most:
            u, s, vt = leading(inside, rank)
            return q @ u, s, vt
        vectors *= 2
    return leading(exact, rank)


@dataclass(frozen=True)
class Factors:
    """Shapes and first values of the factors."""

    widths: Mapping[str, tuple[int, int]]  # path of each adapted layer, in the model's order -> (in, out)
    ranks: Mapping[str, int]  # r of each layer; the largest where clients have ranks of their own
    scales: Mapping[str, float]  # s of each layer, by which the product is multiplied
    seed: int
    experts: Mapping[str, int] = field(default_factory=dict)  # E of the weights of experts among these paths
    #: Makes A and B before the first round, where they do not begin with a drawn A and B = 0.
    start: Callable[[], dict[str, Tensor]] | None = field(default=None, compare=False)
    #: Whether the weights lose the product that A and B begin with.
    taken: bool = False

    @cached_property
    def layout(self) -> Layout:
        """A and B of every layer."""
        shapes: dict[str, tuple[int, ...]] = {}
        for path, (inside, outside) in self.widths.items():
            each = (self.experts[path],) if path in self.experts else ()
            shapes[name_a(path)] = (*each, self.ranks[path], inside)
            shapes[name_b(path)] = (*each, outside, self.ranks[path])
        return Layout(shapes)

    @cached_property
    def first(self) -> dict[str, Tensor]:
        """A and B before the first round."""
        return self.drawn() if self.start is None else self.start()

    def drawn(self, *keys: int) -> dict[str, Tensor]:
        """A at random and B = 0, before the first round or in that of `keys`: a round and a client."""
        drawing = torch.Generator().manual_seed(torch_seed(self.seed, "lora", *keys))
        # The uniform bound that torch.nn.Linear and PEFT use for A.
        drawn = {}
        for name, shape in self.layout.shapes.items():
            uniform = torch.rand(shape, generator=drawing) * 2 - 1 if is_a(name) else torch.zeros(shape)
            drawn[name] = uniform / shape[-1] ** 0.5
        return drawn

    def product(self, path: str, values: Mapping[str, Tensor]) -> Tensor:
        """s B A of a layer: (..., out, in)."""
        return self.scales[path] * values[name_b(path)] @ values[name_a(path)]
