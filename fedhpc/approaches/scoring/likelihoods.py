"""Computes how likely a decoder-only model finds answers after many prompts, and shares what prompts have in common.

The prompt has three parts, and every part is computed once. A candidate is the prefix of all rows that it is scored
on, which share its keys and values. A row's own text comes before each of its answers: where there are several answers
(one per label), they share the row's keys and values. So B rows of T tokens after a prefix of n tokens, with L answers
of A tokens, cost n + B (T + L A) tokens in place of B L (n + T + A). Rows of several prefixes go through the model
together.

Prefixes and rows are padded on the left, answers on the right. A mask hides the padding, and every token has the
position that it would have without padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.lazy import lazy
from fedhpc.models.causal_lm import CausalLM
from fedhpc.training.forwards import cut_by_length

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

# What one more forward pass costs, as a number of padded tokens, and the most rows of one pass.
_FORWARD_COST_TOKENS = {"cpu": 512, "cuda": 8192}
_ROWS_AT_ONCE = {"cpu": 256, "cuda": 2048}


@dataclass(frozen=True)
class Prefixes:
    """The keys and values of M texts or soft prompts, padded on the left to n positions."""

    past: tuple[tuple[Tensor, Tensor], ...]  # per layer, each (M, kv_heads, n, head_dim); empty where n is 0
    lengths: Int64  # (M,): positions of each that are not padding

    @property
    def width(self) -> int:
        """n, the length of the longest prefix."""
        return int(self.lengths.max(initial=0))


@dataclass
class TokenCount:
    """Counts the tokens that went through the model, and those that it would have been without sharing."""

    tokens: int = 0  # padding included
    padded: int = 0  # only the padding
    unshared: int = 0  # without padding: if every row had its own prefix and every answer its own row

    def add(self, other: TokenCount) -> None:
        """Add the tokens of another count to this one."""
        self.tokens += other.tokens
        self.padded += other.padded
        self.unshared += other.unshared


def of_texts(base: CausalLM, texts: Sequence[Int32], spent: TokenCount) -> Prefixes:
    """Compute the prefixes of M token arrays, which may be empty. Call it without gradients."""
    lengths = np.array([len(text) for text in texts], np.int64)
    width = int(lengths.max(initial=0))
    if width == 0:
        return Prefixes((), lengths)
    ids, mask, positions = _left_padded(base, texts, np.zeros(len(texts), np.int64))
    cache = _cache(())
    base.hidden(ids, cache=cache, mask=mask, positions=positions)
    spent.add(TokenCount(int(ids.numel()), int(ids.numel() - lengths.sum())))
    return Prefixes(_layers(cache), lengths)


def of_embeddings(base: CausalLM, embeddings: Tensor, spent: TokenCount) -> Prefixes:
    """Compute the prefixes of M soft prompts (M, n, D). Call it without gradients."""
    cache = _cache(())
    count, width = embeddings.shape[:2]
    base.hidden(torch.zeros(count, 0, dtype=torch.int64, device=base.device), embeddings, cache)
    spent.add(TokenCount(count * width))
    return Prefixes(_layers(cache), np.full(count, width, np.int64))


def log_likelihoods(
    base: CausalLM,
    prefixes: Prefixes,
    which: Int64,
    rows: Sequence[Int32],
    answers: Sequence[Sequence[Int32]],
    spent: TokenCount,
) -> Float64:
    """The log-likelihood of each of a row's L answers after its prefix and the row, summed over tokens: (B, L).

    which: the index of each row's prefix, (B,). rows: B token arrays, none empty. answers: for each row, L token
    arrays, none empty. Call it without gradients.
    """
    num_answers = len(answers[0])
    result = np.zeros((len(rows), num_answers))
    # With a single answer there is nothing to share: row and answer go through the model together.
    size = np.array(
        [len(row) + (len(texts[0]) - 1 if num_answers == 1 else 0) for row, texts in zip(rows, answers, strict=True)]
    )
    order = np.argsort(size, kind="stable")
    device = base.device.type
    cuts = cut_by_length(size[order], _FORWARD_COST_TOKENS[device])
    parts = [order[a:b] for a, b in pairwise(cuts)]
    for part in (p for cut in parts for p in np.array_split(cut, -(-len(cut) // _ROWS_AT_ONCE[device]))):
        score = _one_answer if num_answers == 1 else _several_answers
        args = (which[part], [rows[b] for b in part], [answers[b] for b in part])
        result[part] = score(base, prefixes, *args, spent)
        for b in part:
            before = int(prefixes.lengths[which[b]]) + len(rows[b])
            spent.unshared += sum(before + len(answer) - 1 for answer in answers[b])
    return result


def _one_answer(
    base: CausalLM,
    prefixes: Prefixes,
    which: Int64,
    rows: Sequence[Int32],
    answers: Sequence[Sequence[Int32]],
    spent: TokenCount,
) -> Float64:
    only_answers = [texts[0] for texts in answers]
    longest = max(len(answer) for answer in only_answers)
    inputs = [np.concatenate([row, answer[:-1]]) for row, answer in zip(rows, only_answers, strict=True)]
    hidden, _, _ = _after_prefixes(base, prefixes, which, inputs, spent)
    targets, real = _padded(base, only_answers, "left")
    scores = _token_scores(base, hidden[:, hidden.shape[1] - longest :], targets)
    return (scores * real).sum(dim=1, keepdim=True).cpu().numpy()


def _several_answers(
    base: CausalLM,
    prefixes: Prefixes,
    which: Int64,
    rows: Sequence[Int32],
    answers: Sequence[Sequence[Int32]],
    spent: TokenCount,
) -> Float64:
    count = len(answers[0])
    hidden, cache, mask = _after_prefixes(base, prefixes, which, rows, spent)
    targets, real = _padded(base, [answer for texts in answers for answer in texts], "right")  # (B * L, A)
    last = hidden[:, -1:].repeat_interleave(count, dim=0)
    states = [last]
    if targets.shape[1] > 1:
        cache.batch_repeat_interleave(count)
        before = np.array([len(row) for row in rows]) + prefixes.lengths[which]
        start = torch.from_numpy(before).to(base.device).repeat_interleave(count)
        steps = torch.arange(targets.shape[1] - 1, device=base.device)
        inputs = targets[:, :-1]
        states.append(
            base.hidden(
                inputs,
                cache=cache,
                mask=torch.cat([mask.repeat_interleave(count, dim=0), torch.ones_like(inputs)], dim=1),
                positions=start.unsqueeze(1) + steps,
            )
        )
        spent.add(TokenCount(int(inputs.numel()), int(inputs.numel() - real[:, 1:].sum())))
    scores = _token_scores(base, torch.cat(states, dim=1), targets)
    return (scores * real).sum(dim=1).reshape(len(rows), count).cpu().numpy()


def _after_prefixes(
    base: CausalLM, prefixes: Prefixes, which: Int64, rows: Sequence[Int32], spent: TokenCount
) -> tuple[Tensor, Any, Tensor]:
    """Compute rows after their prefixes: last hidden states (B, T, D), the cache, and the mask of both (B, n + T)."""
    index = torch.from_numpy(which).to(base.device)
    before = prefixes.lengths[which]
    ids, row_mask, positions = _left_padded(base, rows, before)
    prefix_mask = np.arange(prefixes.width) >= prefixes.width - before[:, None]
    mask = torch.cat([torch.from_numpy(prefix_mask.astype(np.int64)).to(base.device), row_mask], dim=1)
    cache = _cache([(keys.index_select(0, index), values.index_select(0, index)) for keys, values in prefixes.past])
    hidden = base.hidden(ids, cache=cache, mask=mask, positions=positions)
    spent.add(TokenCount(int(ids.numel()), int(ids.numel() - row_mask.sum())))
    return hidden, cache, mask


def _token_scores(base: CausalLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """The log-likelihood of every target token: hidden (R, A, D), targets (R, A) -> float64 (R, A)."""
    logits = base.base_logits(hidden).float() if hidden.dtype != torch.float64 else base.base_logits(hidden)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -losses.double().view(targets.shape)


def _left_padded(base: CausalLM, texts: Sequence[Int32], before: Int64) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions (B, T) of texts padded on the left; `before` says how many tokens precede each text."""
    lengths = np.array([len(text) for text in texts], np.int64)
    width = int(lengths.max())
    ids = np.full((len(texts), width), base.pad_id, np.int64)
    for b, text in enumerate(texts):
        ids[b, width - len(text) :] = text
    index = np.arange(width) - (width - lengths)[:, None]  # in the text; negative in the padding
    arrays = (ids, (index >= 0).astype(np.int64), before[:, None] + index.clip(min=0))
    ids_, mask, positions = (torch.from_numpy(array).to(base.device) for array in arrays)
    return ids_, mask, positions


def _padded(base: CausalLM, texts: Sequence[Int32], side: str) -> tuple[Tensor, Tensor]:
    """Ids (R, A) of texts, padded on the `side` "left" or "right", and a mask that is 1.0 where there is text."""
    lengths = np.array([len(text) for text in texts])
    width = int(lengths.max())
    ids, real = np.full((len(texts), width), base.pad_id, np.int64), np.zeros((len(texts), width))
    for b, text in enumerate(texts):
        columns = slice(width - len(text), None) if side == "left" else slice(0, len(text))
        ids[b, columns], real[b, columns] = text, 1.0
    return torch.from_numpy(ids).to(base.device), torch.from_numpy(real).to(base.device)


def _cache(past: Sequence[tuple[Tensor, Tensor]]) -> Any:
    from transformers import DynamicCache

    return DynamicCache(list(past)) if past else DynamicCache()


def _layers(cache: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((layer.keys, layer.values) for layer in cache.layers)
