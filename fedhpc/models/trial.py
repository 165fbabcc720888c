"""What a few tokens say of a model while it is loaded: whether it computes what its class here believes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fedhpc.lazy import Tensor, torch
from fedhpc.ranks.failed_collective import TransportError


def agree(one: Tensor, other: Tensor, tolerance: float = 1e-4) -> bool:
    """Whether two results are the same but for rounding. tolerance: in 32 bits, relative to the norm of all of it."""
    exact = other.dtype in (torch.float32, torch.float64)
    one, other = one.double(), other.double()
    return float((one - other).norm()) <= (tolerance if exact else 2500 * tolerance) * float(other.norm())


def same_rows(alone: Sequence[Tensor], beside: Sequence[Tensor]) -> bool:
    """Whether rows, each (T, ...) by itself, are the same beside others: (T or more, ...), padded behind its end."""
    return all(agree(row, padded[: len(row)]) for row, padded in zip(alone, beside, strict=True))


def succeeds(look: Callable[[], bool]) -> bool:
    """Whether `look` says so; models that cannot do what it asks raise in ways of their own.

    Want of memory and the death of another rank are passed on: they say nothing of the model.
    """
    try:
        return look()
    except (torch.OutOfMemoryError, TransportError):
        raise
    except Exception:
        return False
