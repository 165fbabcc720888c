"""Masks of attention in the form that transformers takes as it is.

It reads a plain padding mask back, to leave it out where nothing is padded, and a GPU would have to be waited for. On a
CPU, where reading is free and leaving it out is faster, masks stay plain.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

_READ_FOR_NOTHING = ("cpu",)
# Families whose masks all come from transformers' own function; others may cut windows out of a plain mask.
_FAMILIES = frozenset(f"transformers.models.{name}.modeling_{name}" for name in ("bert", "roberta", "t5", "bart"))


def padding(network: Any, mask: Tensor) -> Tensor:
    """For a mask (B, T) that is 0 on padding: (B, 1, 1, T), True where attention may look, or `mask` itself."""
    return mask.bool()[:, None, None, :] if _taken_as_it_is(network, mask.device) else mask


def causal(network: Any, length: int, device: torch.device) -> Tensor | None:
    """For rows of `length` without a cache: (1, 1, length, length), or None, from which the model makes its own."""
    if not _taken_as_it_is(network, device):
        return None
    return torch.ones(length, length, dtype=torch.bool, device=device).tril_()[None, None]


def _taken_as_it_is(network: Any, device: torch.device) -> bool:
    module = sys.modules[type(network).__module__]
    made = module.__name__ in _FAMILIES and hasattr(module, "create_bidirectional_mask")
    return made and network.config._attn_implementation == "sdpa" and device.type not in _READ_FOR_NOTHING
