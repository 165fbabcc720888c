"""The low-rank term in a layer's forward pass, of each row's own client, with dropout and magnitudes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods._experts import Routed
from fedhpc.methods._linear import Layer
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


@dataclass(frozen=True)
class Magnitudes:
    """What makes the rows of a layer's weight as long as was trained (DoRA), for `adds_term`."""

    trained: Tensor  # m (1 or K, out)
    squares: Tensor  # (out,): of the lengths of the rows of W
    layer: Layer

    def over_lengths(self, a: Tensor, b: Tensor, scale: float, lost: tuple[Tensor, Tensor] | None) -> Tensor:
        """m over the lengths of the rows of W + s B A, less what it has lost: (1 or K, out).

        The lengths are constants for the gradient (Liu et al. 2024, arXiv 2402.09353, section 4.3). W + s B A is not
        formed: the square of a row is w.w + 2 s (W A^T)_o.b_o + s^2 b_o.(A A^T) b_o.
        """
        with torch.no_grad(), torch.autocast(a.device.type, enabled=False):
            if lost is not None:
                a = torch.cat([a, lost[0].expand(len(a), -1, -1)], 1)
                b = torch.cat([b, -lost[1].expand(len(b), -1, -1)], 2)
            across = (a @ self.layer.weight.to(a.dtype).mT).mT  # W A^T: (1 or K, out, r)
            lengths = (self.squares + scale * ((2 * across + scale * (b @ (a @ a.mT))) * b).sum(-1)).sqrt()
        return self.trained / lengths


def adds_term(
    a: Tensor,
    b: Tensor,
    scale: float,
    gained: Tensor | None,
    rows: Tensor,
    dropout: Dropout | None,
    lost: tuple[Tensor, Tensor] | None = None,
    magnitudes: Magnitudes | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """What adds `scale` B A x, of the client of each row, to the outputs (B, T, out) of a linear layer.

    a (1 or K, r, in), b (1 or K, out, r), rows int64 (B,). gained: (1 or K, out, in) to be added to the weight. lost: A
    (1, r, in) and B (1, out, r) whose scaled product is taken from it. magnitudes: the lengths that the rows of the
    resulting weight have (DoRA).
    """
    shared = len(a) == len(b) == 1  # one A and one B for all rows

    def of_rows(factor: Tensor, dtype: torch.dtype) -> Tensor:
        factor = factor.to(dtype)
        return factor if shared else kernels.of_rows(factor.expand(max(len(a), len(b)), -1, -1), rows)

    def without_lost(x: Tensor, y: Tensor) -> Tensor:
        if lost is None:
            return y
        flat_x, flat_y = x.flatten(0, 1).unsqueeze(0), y.flatten(0, 1).unsqueeze(0)
        return kernels.add_low_rank(flat_y, flat_x, lost[0].to(y.dtype), lost[1].to(y.dtype), -scale).view_as(y)

    def with_term(x: Tensor, output: Tensor) -> Tensor:
        # What the layer computes in: under autocast its inputs are not in it yet.
        x, y, dtype = x.to(output.dtype), output, output.dtype
        if gained is not None:
            more = gained.to(dtype)
            y = y + x @ (more if len(gained) == 1 else kernels.of_rows(more, rows)).mT
        y = without_lost(x, y)
        if dropout is not None:
            x = x * dropout.keeps(x.shape[:2].numel() // len(dropout.keys), x.shape[2]).view_as(x) / (1 - dropout.share)
        if magnitudes is None:
            return add(x, y, dtype).view_as(output)
        # As in PEFT, W x is rescaled as the term is, and so of the inputs that are not dropped.
        module = magnitudes.layer.module
        if dropout is None:
            rest = 0.0 if module.bias is None else module.bias
            directed = y - rest
        else:
            directed = without_lost(x, torch.nn.functional.linear(x, magnitudes.layer.weight.to(dtype)))
            rest = y - directed
        rescaled = kernels.of_rows(magnitudes.over_lengths(a, b, scale, lost), rows).unsqueeze(1).to(dtype)
        return rest + rescaled * add(x, directed, dtype).view_as(output)

    def add(x: Tensor, y: Tensor, dtype: torch.dtype) -> Tensor:
        if shared:
            x, y = x.flatten(0, 1).unsqueeze(0), y.flatten(0, 1).unsqueeze(0)
        return kernels.add_low_rank(y, x, of_rows(a, dtype), of_rows(b, dtype), scale)

    return with_term


def adds_term_of_experts(a: Tensor, b: Tensor, scale: float) -> Callable[[Tensor, Tensor, Routed], Tensor]:
    """What adds `scale` B A x to the outputs (S, out) of routed experts, with the factors of token's client and expert.

    a (1 or K, E, r, in), b (1 or K, E, out, r).
    """

    def with_term(x: Tensor, output: Tensor, routed: Routed) -> Tensor:
        inner = routed.product(x.to(output.dtype), a.to(output.dtype).mT)
        return output + scale * routed.product(inner, b.to(output.dtype).mT)

    return with_term
