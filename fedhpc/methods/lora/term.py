"""The low-rank term in a layer's forward pass, of each row's own client, with dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.rng import bits


@dataclass(frozen=True)
class Dropout:
    """Which inputs of the term are left out."""

    keys: Tensor  # int64 (B,): of the draws of each row, or of each token
    share: float  # of the inputs that are dropped

    def keeps(self, length: int, width: int) -> Tensor:
        """Which inputs of a layer stay: bool (B, length, width).

        Position t of a row has the same draws whatever the length, so padding changes nothing.
        """
        drawn = bits(self.keys.unsqueeze(1), torch.arange(length * width, device=self.keys.device))
        # int64 is uniform over [-2^63, 2^63): the lowest share is dropped.
        return (drawn >= round(self.share * 2**64) - 2**63).view(-1, length, width)


def adds_term(
    a: Tensor, b: Tensor, scale: float, gained: Tensor | None, rows: Tensor, dropout: Dropout | None
) -> Callable[[Tensor, Tensor], Tensor]:
    """What adds `scale` B A x, of the client of each row, to the outputs (B, T, out) of a linear layer.

    a (1 or K, r, in), b (1 or K, out, r), rows int64 (B,). gained: (1 or K, out, in) to be added to the weight.
    """
    shared = len(a) == len(b) == 1  # one A and one B for all rows

    def of_rows(factor: Tensor, dtype: torch.dtype) -> Tensor:
        factor = factor.to(dtype)
        return factor if shared else kernels.of_rows(factor.expand(max(len(a), len(b)), -1, -1), rows)

    def with_term(x: Tensor, output: Tensor) -> Tensor:
        # What the layer computes in: under autocast its inputs are not in it yet.
        x, y, dtype = x.to(output.dtype), output, output.dtype
        if gained is not None:
            more = gained.to(dtype)
            y = y + x @ (more if len(gained) == 1 else kernels.of_rows(more, rows)).mT
        if dropout is not None:
            x = x * dropout.keeps(x.shape[:2].numel() // len(dropout.keys), x.shape[2]).view_as(x) / (1 - dropout.share)
        if shared:
            x, y = x.flatten(0, 1).unsqueeze(0), y.flatten(0, 1).unsqueeze(0)
        return kernels.add_low_rank(y, x, of_rows(a, dtype), of_rows(b, dtype), scale).view_as(output)

    return with_term
