"""The coordinate-wise median of the updates, unweighted (Yin et al. 2018, arXiv 1803.01498, definition 1)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedhpc.lazy import lazy
from fedhpc.registry import Section

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

LINEAR = False


class Options(Section):
    pass


def combine(updates: Tensor, weights: Tensor, options: Any) -> Tensor:
    """updates (C, chunk) float64, weights (C,) -> (chunk,). Of an even number the mean of the middle two."""
    ordered = updates.sort(dim=0).values
    count = len(updates)
    return (ordered[(count - 1) // 2] + ordered[count // 2]) / 2
