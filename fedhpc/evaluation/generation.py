"""Batched greedy decoding with a method attached.

Prompts are left-padded, so that all rows go on in the same column; the attention mask hides the padding, and the first
real token of a row has position n, behind its n virtual ones, as in training. So a row's text does not depend on the
other rows of its batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedhpc.lazy import lazy
from fedhpc.methods.base import Attached
from fedhpc.models import Base, max_positions
from fedhpc.training.forward import pad_id

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")


def greedy(base: Base, attached: Attached, prompts: Sequence[np.ndarray], max_new_tokens: int) -> Tensor:
    """The most likely next token, again and again: int64 (B, max_new_tokens) on the base's device, -1 after the end.

    prompts: B non-empty arrays of token ids. A row ends at eos, which is left out, or when the model has no positions
    left. Call it without gradients and with the method attached.
    """
    from transformers import DynamicCache

    n, device = attached.virtual_length, base.device
    lengths = np.array([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    padding = width - lengths
    ids_, mask_ = np.full((len(prompts), width), pad_id(base), np.int64), np.ones((len(prompts), n + width), np.int64)
    for b, prompt in enumerate(prompts):
        ids_[b, padding[b] :] = prompt
        mask_[b, n : n + padding[b]] = 0
    positions_ = n + (np.arange(width) - padding[:, None]).clip(min=0)
    ids, mask, positions = (torch.from_numpy(array).to(device) for array in (ids_, mask_, positions_))

    limit = max_positions(base)
    cache = DynamicCache(list(attached.past)) if attached.past else DynamicCache()
    generated = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.int64, device=device)
    ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    embed = base.model.get_input_embeddings()
    for step in range(max_new_tokens):
        inputs = embed(ids)
        if step == 0 and attached.embeddings is not None:
            inputs = torch.cat([attached.embeddings, inputs], dim=1)
            positions = torch.cat([torch.arange(n, device=device).expand(len(prompts), -1), positions], dim=1)
        hidden = base.model.base_model(
            inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        chosen = base.logits(hidden).argmax(dim=-1)
        ended |= chosen == base.tokenizer.eos_token_id
        generated[:, step] = torch.where(ended, -1, chosen)
        positions = positions[:, -1:] + 1
        if limit is not None:
            ended |= positions[:, 0] >= limit
            positions = positions.clamp(max=limit - 1)  # ended rows go along until the last one ends
        if bool(ended.all()):
            break
        ids = chosen.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    return generated
