"""Batches of text and the forward pass of the base with a method attached.

Rows are right-padded. A causal model never looks to the right, so training needs no padding mask at all; the last
token of a row is a target only, so it is not an input. Logits are computed at supervised positions only.

Shapes: B rows, T positions, S supervised tokens of the batch, D hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from fedhpc.data.tokens import Examples
from fedhpc.lazy import lazy
from fedhpc.methods.base import Attached
from fedhpc.models import Base

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

# Logits of more supervised tokens than fit in so many elements are computed and differentiated piece by piece.
_LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class Batch:
    """Rows of one forward, on the device of the base."""

    ids: Tensor  # int64 (B, T)
    positions: Tensor  # int64 (S,): b * T + t of the hidden state that predicts each supervised token
    targets: Tensor  # int64 (S,)
    row: Tensor  # int64 (S,): b of each supervised token
    supervised: np.ndarray  # int64 (B,): supervised tokens per row
    tokens: int  # B * T, padding included
    real_tokens: int  # input tokens without padding


def make_batch(examples: Examples, indices: np.ndarray, pad_id: int, device: torch.device) -> Batch:
    """The batch of `indices` (B,) of `examples`, in that order."""
    starts, ends = examples.offsets[indices], examples.offsets[indices + 1]
    lengths = (ends - starts).astype(np.int64)
    # Nothing stands in front of the first token, so it cannot be predicted even if there is no prompt.
    first = np.maximum(examples.prompt_lengths[indices].astype(np.int64), 1)
    width = max(int(lengths.max()) - 1, 1)
    ids = np.full((len(indices), width), pad_id, dtype=np.int64)
    positions, targets, supervised = [], [], lengths - first
    for b in range(len(indices)):
        tokens = examples.ids[starts[b] : ends[b]]
        ids[b, : lengths[b] - 1] = tokens[:-1]
        positions.append(np.arange(first[b] - 1, lengths[b] - 1) + b * width)
        targets.append(tokens[first[b] :])
    row = np.repeat(np.arange(len(indices)), supervised)
    return Batch(
        ids=torch.from_numpy(ids).to(device, non_blocking=True),
        positions=torch.from_numpy(np.concatenate(positions)).to(device, non_blocking=True),
        targets=torch.from_numpy(np.concatenate(targets).astype(np.int64)).to(device, non_blocking=True),
        row=torch.from_numpy(row).to(device, non_blocking=True),
        supervised=supervised,
        tokens=int(ids.size),
        real_tokens=int((lengths - 1).sum()),
    )


def pad_id(base: Base) -> int:
    """The id that fills rows; any would do, since nothing looks at it."""
    tokenizer = base.tokenizer
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id)


def autocast(base: Base, precision: str) -> AbstractContextManager[object]:
    """The autocast of `runtime.precision` on the base's device."""
    if precision == "float32":
        return nullcontext()
    return torch.autocast(base.device.type, dtype=getattr(torch, precision))


def hidden_states(base: Base, attached: Attached, ids: Tensor) -> Tensor:
    """Last hidden states (B, T, D) of ids (B, T), each row behind its own virtual positions."""
    from transformers import DynamicCache

    if attached.embeddings is not None:
        inputs = torch.cat([attached.embeddings, base.model.get_input_embeddings()(ids)], dim=1)
        whole: Tensor = base.model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        return whole[:, attached.virtual_length :]
    cache = DynamicCache(list(attached.past)) if attached.past else None
    hidden: Tensor = base.model.base_model(
        input_ids=ids, past_key_values=cache, use_cache=cache is not None
    ).last_hidden_state
    return hidden


def token_losses(base: Base, hidden: Tensor, batch: Batch) -> Tensor:
    """Cross-entropy of every supervised token (S,), in at least float32, without gradients."""
    with torch.no_grad():
        selected = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.positions)
        pieces = [
            _cross_entropy(base, part, target)
            for part, target in zip(*_pieces(base, selected, batch.targets), strict=True)
        ]
    return torch.cat(pieces)


def backward(base: Base, hidden: Tensor, batch: Batch, row_weights: Tensor, scale: float = 1.0) -> Tensor:
    """Backpropagate sum_s row_weights[row_s] * loss_s; returns the unweighted losses (S,), detached.

    row_weights (B,). The logits exist for a piece of the tokens at a time. Gradients are multiplied by `scale`.
    """
    selected = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.positions)
    weights = row_weights.index_select(0, batch.row) * scale
    if len(_pieces(base, selected, batch.targets)[0]) == 1:
        losses = _cross_entropy(base, selected, batch.targets)
        (losses * weights).sum().backward()
        return losses.detach()
    leaf = selected.detach().requires_grad_()
    pieces, done = [], 0
    for part, target in zip(*_pieces(base, leaf, batch.targets), strict=True):
        losses = _cross_entropy(base, part, target)
        (losses * weights[done : done + len(target)]).sum().backward()
        pieces.append(losses.detach())
        done += len(target)
    selected.backward(leaf.grad)
    return torch.cat(pieces)


def _pieces(base: Base, selected: Tensor, targets: Tensor) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    vocabulary = base.model.get_output_embeddings().weight.shape[0]
    size = max(1, _LOGITS_AT_ONCE // vocabulary)
    return selected.split(size), targets.split(size)


def _cross_entropy(base: Base, hidden: Tensor, targets: Tensor) -> Tensor:
    logits = base.logits(hidden)
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")
