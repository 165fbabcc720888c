"""Operations, with their gradients, that torch and its BLAS leave slow at the sizes that clients have; and copies."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_NARROW = 12  # columns


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
