"""Going on with texts token by token: B rows behind what is attached, each as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from transformers import DynamicCache

from fedhpc import kernels
from fedhpc.models.base import Attached, padded

if TYPE_CHECKING:
    from torch import Tensor


class Reader(Protocol):
    """A model that reads from left to right, as CausalLM does."""

    @property
    def device(self) -> torch.device: ...
    @property
    def pad_id(self) -> int: ...
    @property
    def max_positions(self) -> int | None: ...
    def hidden(
        self,
        ids: Tensor,
        embeddings: Tensor | None = None,
        cache: Any = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor: ...
    def read(self, attached: Attached, ids: Tensor) -> Tensor: ...


class Cached:
    """Computes each new token behind the keys and values of those before it.

    The texts are right-padded at first, as in training. Then the keys and values of every row are moved to the right,
    so that all rows go on in the same column: padding stands before the virtual positions, where no window over columns
    can take it for text.
    """

    def __init__(self, base: Reader, attached: Attached, prompts: Sequence[np.ndarray]) -> None:
        self.base = base
        ids_, _ = padded(prompts, base.pad_id)
        lengths_ = np.array([len(prompt) for prompt in prompts])
        ids, lengths = (kernels.on_device(array, base.device) for array in (ids_, lengths_))
        self._cache = DynamicCache(list(attached.past)) if attached.past else DynamicCache()
        states = base.hidden(ids, attached.embeddings, self._cache)
        n = attached.virtual_length
        width = n + ids.shape[1]
        #: The last hidden states (B, D).
        self.states = states[torch.arange(len(ids), device=base.device), lengths - 1 + states.shape[1] - ids.shape[1]]
        self._next = (n + lengths).unsqueeze(1)  # the position of the next token (B, 1)
        self._mask: Tensor | None = None
        padding = (ids.shape[1] - lengths).unsqueeze(1)
        if (lengths_ < ids.shape[1]).any():
            columns = torch.arange(width, device=base.device) - padding  # (B, width): where it comes from
            self._mask = (columns >= 0).long()
            for layer in self._cache.layers:
                layer.keys, layer.values = (_moved(t, columns % width) for t in (layer.keys, layer.values))

    def add(self, tokens: Tensor) -> None:
        """Put one token (B,) behind each row. A row that has reached the model's last position stays there."""
        limit = self.base.max_positions
        positions = self._next if limit is None else self._next.clamp(max=limit - 1)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(len(tokens), 1)], dim=1)
        states = self.base.hidden(tokens.unsqueeze(1), None, self._cache, self._mask, positions)
        self.states, self._next = states[:, -1], self._next + 1


class Anew:
    """Computes the whole text again for each new token, for models that keep more than keys and values."""

    def __init__(self, base: Reader, attached: Attached, prompts: Sequence[np.ndarray]) -> None:
        self.base, self.attached = base, attached
        ids, _ = padded(prompts, base.pad_id)
        lengths = np.array([len(prompt) for prompt in prompts])
        self._ids, self._lengths = (kernels.on_device(array, base.device) for array in (ids, lengths))
        self._compute()

    def add(self, tokens: Tensor) -> None:
        """Put one token (B,) behind each row. A row that has reached the model's last position stays there."""
        self._ids = torch.nn.functional.pad(self._ids, (0, 1), value=self.base.pad_id)
        self._ids.scatter_(1, self._lengths.unsqueeze(1), tokens.unsqueeze(1))
        self._lengths = self._lengths + 1
        if (limit := self.base.max_positions) is not None:
            room = limit - self.attached.virtual_length
            self._ids, self._lengths = self._ids[:, :room], self._lengths.clamp(max=room)
        self._compute()

    def _compute(self) -> None:
        states = self.base.read(self.attached, self._ids)
        rows = torch.arange(len(self._ids), device=self.base.device)
        self.states = states[rows, self._lengths - 1 + states.shape[1] - self._ids.shape[1]]


def _moved(values: Tensor, columns: Tensor) -> Tensor:
    """values (B, H, W, d) whose column c of row b is what was in column columns[b, c]; columns (B, W)."""
    index = columns[:, None, :, None].expand(-1, values.shape[1], -1, values.shape[3])
    return values.gather(2, index)
