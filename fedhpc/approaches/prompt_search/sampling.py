"""Draws continuations of texts from a decoder-only model, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fedhpc.approaches.scoring.likelihoods import Float64, Int32
from fedhpc.lazy import lazy
from fedhpc.models.base import Attached
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
    draws = torch.from_numpy(uniform).to(base.device)
    chosen: list[torch.Tensor] = []
    written = base.continuation(Attached(), prompts)
    for step in range(uniform.shape[1]):
        if chosen:
            written.add(chosen[-1])
        shares = (base.base_logits(written.states).double() / temperature).softmax(dim=-1).cumsum(dim=-1)
        # The clamp is needed because the last sum may round to less than 1.
        token = torch.searchsorted(shares, draws[:, step : step + 1].contiguous()).clamp(max=shares.shape[1] - 1)
        chosen.append(token[:, 0])
    drawn = torch.stack(chosen, dim=1).cpu().numpy().astype(np.int32)
    eos = base.tokenizer.eos_token_id
    return [row[: int(np.argmax(row == eos))] if (row == eos).any() else row for row in drawn]
