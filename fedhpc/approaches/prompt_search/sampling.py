"""Draws continuations of texts from a decoder-only model, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedhpc.approaches.scoring.likelihoods import Float64, Int32
from fedhpc.lazy import lazy
from fedhpc.models.causal_lm import CausalLM

if TYPE_CHECKING:
    import torch
else:
    torch = lazy("torch")


def continuations(base: CausalLM, prompts: Sequence[Int32], uniform: Float64, temperature: float) -> list[Int32]:
    """Draw what follows each of B non-empty token arrays, up to eos.

    uniform: random numbers in [0, 1), (B, T); uniform[b, t] decides token t of row b, so at most T tokens are drawn.
    Call it without gradients.
    """
    from transformers import DynamicCache

    lengths = np.array([len(prompt) for prompt in prompts])
    width = int(lengths.max())
    ids_ = np.full((len(prompts), width), base.pad_id, np.int64)
    for b, prompt in enumerate(prompts):
        ids_[b, width - len(prompt) :] = prompt
    index = np.arange(width) - (width - lengths)[:, None]  # in the text; negative in the padding
    arrays = (ids_, (index >= 0).astype(np.int64), index.clip(min=0))
    ids, mask, positions = (torch.from_numpy(array).to(base.device) for array in arrays)
    draws = torch.from_numpy(uniform).to(base.device)
    cache, chosen = DynamicCache(), []
    for step in range(uniform.shape[1]):
        hidden = base.model.base_model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
        ).last_hidden_state[:, -1]
        shares = (base.logits(hidden).double() / temperature).softmax(dim=-1).cumsum(dim=-1)
        # The clamp is needed because the last sum may round to less than 1.
        token = torch.searchsorted(shares, draws[:, step : step + 1].contiguous()).clamp(max=shares.shape[1] - 1)
        chosen.append(token)
        ids, positions = token, positions[:, -1:] + 1
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
    drawn = torch.cat(chosen, dim=1).cpu().numpy().astype(np.int32)
    eos = base.tokenizer.eos_token_id
    return [row[: int(np.argmax(row == eos))] if (row == eos).any() else row for row in drawn]
