"""Operations, with their gradients, that torch and its BLAS leave slow at the sizes that clients have; and copies."""

from __future__ import annotations

from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_NARROW = 12  # columns


def clip_margin(dtype: torch.dtype) -> float:
    """The share of a norm that is more than what a row clipped to it gains by rounding to this type."""
    return 8 * torch.finfo(dtype).eps


def row_norms(rows: Tensor) -> Tensor:
    """L2 norm of each row, float64 (n, 1); row by row, so that no bit depends on the others, and for less memory."""
    norms = [torch.linalg.vector_norm(row, dtype=torch.float64) for row in rows]
    return torch.stack(norms).unsqueeze(1) if norms else torch.empty(0, 1, dtype=torch.float64, device=rows.device)


def on_device(array: np.ndarray[Any, Any], device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """The array as a tensor on `device`: on a CPU in its own memory, unless `dtype` is another.

    A copy from pageable memory to a GPU waits for all that the GPU still has to do; one from pinned memory does not,
    and torch keeps that memory until the copy is done.
    """
    tensor = torch.from_numpy(array).to(dtype)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def product(a: Tensor, b: Tensor) -> Tensor:
    """a (N, M, K) @ b (N, K, d).

    With 8 columns MKL (2024.2, on an EPYC with AVX-512) needs two to five times as long as for the same numbers as
    rows, from 16 on no longer. So on a CPU a narrow result is computed, and lies in memory, as its transpose.
    """
    if b.shape[-1] >= _NARROW or a.device.type != "cpu":
        return torch.bmm(a, b)
    return torch.bmm(b.mT, a.mT).mT


def add_low_rank(output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """output + scale x a^T b^T: output (N, M, out), x (N, M, in), a (N, r, in), b (N, out, r), of one dtype."""
    added: Tensor = _AddLowRank.apply(output, x, a, b, scale)
    return added


class _AddLowRank(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, output: Tensor, x: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
        inner = product(x, a.mT)
        ctx.save_for_backward(x, a, b, inner)
        ctx.scale = scale
        return torch.baddbmm(output, inner, b.mT, alpha=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, a, b, inner = ctx.saved_tensors
        of_inner = product(grad, b * ctx.scale)
        of_x = torch.bmm(of_inner, a) if ctx.needs_input_grad[1] else None
        of_a = torch.bmm(of_inner.mT, x) if ctx.needs_input_grad[2] else None
        of_b = torch.bmm(inner.mT * ctx.scale, grad).mT if ctx.needs_input_grad[3] else None
        return grad, of_x, of_a, of_b, None


class Groups:
    """Which of S rows are whose: those of the first group first."""

    def __init__(self, ends: Tensor) -> None:
        """ends: int32 (G,), how many rows there are up to the end of each group; on the device of the rows."""
        self.ends = ends

    @cached_property
    def slices(self) -> list[tuple[int, slice]]:
        """The groups that have rows, and which these are. Reads from the device, once."""
        ends = self.ends.cpu().tolist()
        return [(group, slice(begin, end)) for group, (begin, end) in enumerate(pairwise([0, *ends])) if end > begin]


def grouped_product(x: Tensor, weights: Tensor, groups: Groups) -> Tensor:
    """x (S, in) by weights (G, in, out), each group of rows by its own: (S, out)."""
    way = GroupsAtOnce if groups_at_once(x, weights) else GroupsInTurn
    result: Tensor = way.apply(x, weights, groups)
    return result


def groups_at_once(x: Tensor, weights: Tensor) -> bool:
    """Whether torch's own grouped product computes x (S, in) by weights (G, in, out): in bfloat16 on a Hopper GPU.

    It is in torch from 2.10 on. Elsewhere it is a loop too (CPU, older GPUs), or gives groups without rows gradients
    that are not zero (B200: pytorch issue 172439); and its rows are of 16, 32, ... bytes alone. Nothing is timed here:
    the bits of a run depend on the GPU's model and torch's version, as with all other products, and on nothing else.
    """
    return (
        x.device.type == "cuda"
        and x.dtype == weights.dtype == torch.bfloat16
        and weights.shape[1] % 8 == weights.shape[2] % 8 == 0
        and hasattr(torch.nn.functional, "grouped_mm")
        and torch.cuda.get_device_capability(x.device)[0] == 9
    )


class GroupsAtOnce(torch.autograd.Function):
    """The products of all groups, in one of torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x, weights, groups.ends)
        return torch.nn.functional.grouped_mm(x, weights, offs=groups.ends)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights, ends = ctx.saved_tensors
        grad, grouped = grad.contiguous(), torch.nn.functional.grouped_mm  # which takes no expanded one
        of_x = grouped(grad, weights.mT, offs=ends) if ctx.needs_input_grad[0] else None
        of_weights = grouped(x.mT, grad, offs=ends) if ctx.needs_input_grad[1] else None
        return of_x, of_weights, None


class GroupsInTurn(torch.autograd.Function):
    """The products of all groups, one after another."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, groups: Groups) -> Tensor:
        ctx.save_for_backward(x, weights)
        ctx.groups = groups
        result = x.new_empty(len(x), weights.shape[2])
        for group, rows in groups.slices:
            torch.mm(x[rows], weights[group], out=result[rows])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weights = ctx.saved_tensors
        of_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        of_weights = torch.zeros_like(weights) if ctx.needs_input_grad[1] else None
        for group, rows in ctx.groups.slices:
            if of_x is not None:
                torch.mm(grad[rows], weights[group].mT, out=of_x[rows])
            if of_weights is not None:
                torch.mm(x[rows].mT, grad[rows], out=of_weights[group])
        return of_x, of_weights, None


def of_rows(x: Tensor, rows: Tensor) -> Tensor:
    """x (K, ...) of the client of each row, rows (B,), or x (1, ...), which all share: (B, ...)."""
    selected: Tensor = x.expand(len(rows), *x.shape[1:]) if len(x) == 1 else _OfRows.apply(x, rows)
    return selected


class _OfRows(torch.autograd.Function):
    """index_select, whose own gradient is scattered number by number: up to ten times as long as row by row.

    Gradients of 16 bits are added up in 32, as where all rows share x: a GPU would add them one by one in 16.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.clients = len(x)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        flat = grad.flatten(1)
        exact = flat.float() if flat.dtype.itemsize == 2 else flat
        return exact.new_zeros(ctx.clients, flat.shape[1]).index_add_(0, rows, exact).view(-1, *grad.shape[1:]), None
