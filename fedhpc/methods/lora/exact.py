"""`aggregation: exact`: the sum D of all products that the base's weight has gained is exchanged beside A and B.

Client i returns D_i = D + s B_i A_i - s B A, so that the mean of the D_i is exactly the mean of the products; what D
has more than the product of the means is the residual that FedEx-LoRA folds into the frozen weight (Singhal et al.
2024, arXiv 2410.09432).

The layer computes (W + D - s B A) x + s B_i A_i x, and W, which may be quantised, is not touched. A client need not
send D_i, which follows from A_i and B_i; it is formed where the client trains and rides the same exact sum as every
payload.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from fedhpc.lazy import Tensor, torch
from fedhpc.methods.base import PerClient, Tensors
from fedhpc.methods.lora.average import Average
from fedhpc.methods.lora.factors import Factors, name_a, name_b, name_sum
from fedhpc.updates.layout import Layout


class Summed(Average):
    """A and B are trained; they and D are exchanged."""

    @cached_property
    def sums(self) -> Layout:
        """D of every layer: (out, in)."""
        return Layout({name_sum(path): (outside, inside) for path, (inside, outside) in self.factors.widths.items()})

    @cached_property
    def payload(self) -> Layout:
        return Layout({**self.trainable.shapes, **self.sums.shapes})

    def initial(self) -> Tensors:
        return {**{name: self.factors.first[name] for name in self.trainable.shapes}, **self.zeros()}

    def zeros(self) -> Tensors:
        """D before the first round."""
        return {name: torch.zeros(shape) for name, shape in self.sums.shapes.items()}

    def rank(self, client: int, path: str) -> int:
        """The rank of a client's factors at a layer."""
        ranks: Sequence[int] | None = self.options.ranks
        return ranks[client % len(ranks)] if ranks else self.factors.ranks[path]

    def numbers_sent(self, client: int, round_: int) -> int:
        return sum(self.rank(client, path) * sum(widths) for path, widths in self.factors.widths.items())

    takes_any_rank = True

    def imported(self, factors: Factors, values: Tensors) -> Tensors:
        """What the adapter adds to the weights is D; A and B begin afresh."""
        sums = {name_sum(path): factors.product(path, values) for path in factors.widths}
        if factors.taken:
            sums = {name_sum(p): sums[name_sum(p)] - factors.product(p, factors.first) for p in factors.widths}
        return {**self.initial(), **sums}


class Exact(Summed):
    """What D has more than the product of A and B is added to the layer's weight."""

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        sums = {
            name_sum(path): self.gained(path, received) + self.factors.product(path, trained)
            for path in self.factors.widths
        }
        return {**trained, **sums}

    def gained(self, path: str, received: PerClient) -> Tensor:
        return received[name_sum(path)] - self.factors.product(path, received)

    def lost(self, path: str) -> None:
        """None: D counts from the weight as it is, and what training begins with is the first s B A."""

    exported_rank = None

    def exported(self, values: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """A and B of D, which is a LoRA of higher rank."""
        tensors = factorised({path: values[name_sum(path)] for path in self.factors.widths})
        rank = next(iter(tensors.values())).shape[0]
        return tensors, {"r": rank, "lora_alpha": float(rank)}  # so that s is 1


def factorised(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A (r, in) and B (out, r) of every weight (out, in), by the path of its layer.

    They are the singular vectors, scaled by the roots of the singular values. Those below 16 eps of the largest (eps
    of the weight's dtype) are rounding and left out; r is the largest rank that is left, the others get zeros.
    """
    parts = {}
    for path, weight in weights.items():
        u, s, vt = torch.linalg.svd(weight.double(), full_matrices=False)
        count = int((s > 16 * torch.finfo(weight.dtype).eps * s[0]).sum())
        root = s[:count].sqrt()
        parts[path] = (root.unsqueeze(1) * vt[:count], u[:, :count] * root)
    rank = max(1, *(len(a) for a, _ in parts.values()))
    tensors = {}
    for path, (a, b) in parts.items():
        missing = rank - len(a)
        tensors[name_a(path)] = torch.nn.functional.pad(a, (0, 0, 0, missing)).to(weights[path].dtype)
        tensors[name_b(path)] = torch.nn.functional.pad(b, (0, missing)).to(weights[path].dtype)
    return tensors
