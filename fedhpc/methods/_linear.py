"""The linear layers of a base by name."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch

if TYPE_CHECKING:
    from fedhpc.models.base import Base


def find_layers(base: Base, names: list[str], key: str) -> dict[str, Any]:
    """Path -> linear layer whose path ends with one of `names`, in the model's order, as PEFT matches them.

    The head, which is trained as it is, does not count. UserError with the names that there are where one matches
    nothing.
    """
    linear = {path: module for path, module in base.model.named_modules() if features(module) and path not in base.head}
    for name in names:
        if not any(ends_with(path, name) for path in linear):
            there = sorted({path.rsplit(".", 1)[-1] for path in linear})
            raise UserError(f"{key}: the model has no linear layer named {name}; it has: {', '.join(there)}")
    return {path: module for path, module in linear.items() if any(ends_with(path, name) for name in names)}


def is_conv1d(module: Any) -> bool:
    """GPT-2's linear layer, whose weight is (in, out)."""
    return type(module).__name__ == "Conv1D"


def features(module: Any) -> tuple[int, int] | None:
    """(in, out) of a linear layer, None for anything else."""
    if isinstance(module, torch.nn.Linear):
        return module.in_features, module.out_features
    if is_conv1d(module):
        return int(module.weight.shape[0]), int(module.weight.shape[1])
    return None


def widths(layer: Any) -> tuple[int, int]:
    """(in, out) of a linear layer."""
    both = features(layer)
    assert both is not None, f"{type(layer).__name__} is no linear layer"
    return both


def by_row(x: Tensor, rows: Tensor) -> Tensor:
    """(B, T, width) of what goes into or comes out of a layer: OPT's feed-forward sees (B * T, width)."""
    return x.reshape(len(rows), -1, x.shape[-1])


def ends_with(path: str, name: str) -> bool:
    """Whether `name` is the end of a path, cut at a dot."""
    return path == name or path.endswith(f".{name}")
