"""A prefix as transformers' cache: given to every layer, never grown.

transformers' own DynamicCache stores what each layer adds to it. That is needed for generation only; in training it
would copy every prefix once more, and a layer that is computed again (gradient checkpointing) would add its keys twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import Cache, DynamicLayer, EncoderDecoderCache

if TYPE_CHECKING:
    from torch import Tensor


class _FixedLayer(DynamicLayer):  # type: ignore[misc]  # transformers is untyped here
    """The prefix of one layer: keys and values, each (B, kv_heads, n, head_dim)."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.keys, self.values = keys, values
        self.dtype, self.device = keys.dtype, keys.device
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """The prefix and what the layer made behind it."""
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


class _PassingLayer(DynamicLayer):  # type: ignore[misc]
    """Keeps nothing: keys and values come back as they are."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        return key_states, value_states


def prefix_cache(past: Sequence[tuple[Tensor, Tensor]], num_layers: int = 0) -> Cache:
    """A cache that holds `past`, per layer (key, value), and nothing else whatever the model does.

    num_layers: of the model, where `past` may be empty. Without any cache transformers reads the positions back, to see
    whether a row holds several texts, and a GPU would have to be waited for.
    """
    return Cache(layers=[_FixedLayer(*pair) for pair in past] or [_PassingLayer() for _ in range(num_layers)])


class _Forgetful(dict[int, bool]):
    """Which layers have cross-attention keys already: none ever, so each computes its own, also when it runs again."""

    def __setitem__(self, layer: int, updated: bool) -> None:
        pass


def decoder_cache(past: Sequence[tuple[Tensor, Tensor]]) -> EncoderDecoderCache:
    """`prefix_cache` for the self-attention of a decoder that also attends to an encoder."""
    cache = EncoderDecoderCache(prefix_cache(past), Cache(layers=[_PassingLayer() for _ in past]))
    cache.is_updated = _Forgetful()
    return cache
