"""How likely a decoder-only model finds answers behind many prompts, with what they share computed once.

A candidate stands in front of every row that it is scored on: its keys and values are computed once and shared by its
rows. A row's own text stands in front of every answer: where there are several answers (one per label), its keys and
values are shared by them. So B rows of T tokens behind a prefix of n, with L answers of A tokens, cost n + B (T + L A)
tokens in place of B L (n + T + A). Rows of several prefixes go through the model together.

Prefixes and rows are padded at the left, answers at the right; a mask hides the padding and every token has the
position that it would have alone.
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
from fedhpc.training.block import cut_by_length

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]
Float64 = NDArray[np.float64]

# What one more forward costs, in padded tokens, and the most rows of one.
_FORWARD_COST_TOKENS = {"cpu": 512, "cuda": 8192}
_ROWS_AT_ONCE = {"cpu": 256, "cuda": 2048}


@dataclass(frozen=True)
class Prefixes:
    """Keys and values of M texts or soft prompts, padded at the left to n positions."""

    past: tuple[tuple[Tensor, Tensor], ...]  # per layer, each (M, kv_heads, n, head_dim); empty where n is 0
    lengths: Int64  # (M,): positions of each that are not padding

    @property
    def width(self) -> int:
        """n."""
        return int(self.lengths.max(initial=0))


@dataclass
class Spent:
    """Tokens that went through the model, and what it would have been without sharing."""

    tokens: int = 0  # padding included
    padded: int = 0
    unshared: int = 0  # without padding: every row with its own prefix, every answer with its own row

    def add(self, other: Spent) -> None:
        """Add those of `other`."""
        self.tokens += other.tokens
        self.padded += other.padded
        self.unshared += other.unshared


def of_texts(base: CausalLM, texts: Sequence[Int32], spent: Spent) -> Prefixes:
    """The prefixes of M token arrays; those may be empty. Call it without gradients."""
    lengths = np.array([len(text) for text in texts], np.int64)
    width = int(lengths.max(initial=0))
    if width == 0:
        return Prefixes((), lengths)
    ids, mask, positions = _left_padded(base, texts, np.zeros(len(texts), np.int64))
    cache = _cache(())
    base.model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    spent.add(Spent(int(ids.numel()), int(ids.numel() - lengths.sum())))
    return Prefixes(_layers(cache), lengths)


def of_embeddings(base: CausalLM, embeddings: Tensor, spent: Spent) -> Prefixes:
    """The prefixes of M soft prompts (M, n, D). Call it without gradients."""
    cache = _cache(())
    base.model.base_model(inputs_embeds=embeddings, past_key_values=cache, use_cache=True)
    count, width = embeddings.shape[:2]
    spent.add(Spent(count * width))
    return Prefixes(_layers(cache), np.full(count, width, np.int64))


def log_likelihoods(
    base: CausalLM,
    prefixes: Prefixes,
    which: Int64,
    rows: Sequence[Int32],
    answers: Sequence[Sequence[Int32]],
    spent: Spent,
) -> Float64:
    """Of each of a row's L answers behind its prefix and the row: (B, L), summed over the answer's tokens.

    which (B,): the prefix of each row. rows: B token arrays, none empty. answers: for each row, L token arrays, none
    empty. Call it without gradients.
    """
    count = len(answers[0])
    found = np.zeros((len(rows), count))
    # A single answer shares its row with nobody: it goes through the model with it.
    size = np.array([len(row) + (len(own[0]) - 1 if count == 1 else 0) for row, own in zip(rows, answers, strict=True)])
    order = np.argsort(size, kind="stable")
    device = base.device.type
    cuts = cut_by_length(size[order], _FORWARD_COST_TOKENS[device])
    parts = [order[a:b] for a, b in pairwise(cuts)]
    for part in (p for whole in parts for p in np.array_split(whole, -(-len(whole) // _ROWS_AT_ONCE[device]))):
        own = [answers[b] for b in part]
        together = _one_answer if count == 1 else _several_answers
        found[part] = together(base, prefixes, which[part], [rows[b] for b in part], own, spent)
        for b in part:
            before = int(prefixes.lengths[which[b]]) + len(rows[b])
            spent.unshared += sum(before + len(answer) - 1 for answer in answers[b])
    return found


def _one_answer(
    base: CausalLM,
    prefixes: Prefixes,
    which: Int64,
    rows: Sequence[Int32],
    answers: Sequence[Sequence[Int32]],
    spent: Spent,
) -> Float64:
    lengths = np.array([len(own[0]) for own in answers])
    whole = [np.concatenate([row, own[0][:-1]]) for row, own in zip(rows, answers, strict=True)]
    hidden, _, _ = _behind(base, prefixes, which, whole, spent)
    longest = int(lengths.max())
    targets, real = _padded(base, [own[0] for own in answers], "left")
    scores = _token_scores(base, hidden[:, hidden.shape[1] - longest :], targets)
    return (scores * real).sum(dim=1, keepdim=True).cpu().numpy()


def _several_answers(
    base: CausalLM,
    prefixes: Prefixes,
    which: Int64,
    rows: Sequence[Int32],
    answers: Sequence[Sequence[Int32]],
    spent: Spent,
) -> Float64:
    count = len(answers[0])
    hidden, cache, mask = _behind(base, prefixes, which, rows, spent)
    targets, real = _padded(base, [answer for own in answers for answer in own], "right")  # (B * L, A)
    last = hidden[:, -1:].repeat_interleave(count, dim=0)
    states = [last]
    if targets.shape[1] > 1:
        cache.batch_repeat_interleave(count)
        before = np.array([len(row) for row in rows]) + prefixes.lengths[which]
        start = torch.from_numpy(before).to(base.device).repeat_interleave(count)
        steps = torch.arange(targets.shape[1] - 1, device=base.device)
        inputs = targets[:, :-1]
        states.append(
            base.model.base_model(
                input_ids=inputs,
                attention_mask=torch.cat([mask.repeat_interleave(count, dim=0), torch.ones_like(inputs)], dim=1),
                position_ids=start.unsqueeze(1) + steps,
                past_key_values=cache,
                use_cache=True,
            ).last_hidden_state
        )
        spent.add(Spent(int(inputs.numel()), int(inputs.numel() - real[:, 1:].sum())))
    scores = _token_scores(base, torch.cat(states, dim=1), targets)
    return (scores * real).sum(dim=1).reshape(len(rows), count).cpu().numpy()


def _behind(
    base: CausalLM, prefixes: Prefixes, which: Int64, rows: Sequence[Int32], spent: Spent
) -> tuple[Tensor, Any, Tensor]:
    """The rows behind their prefixes: last hidden states (B, T, D), the cache, and the mask of all of it (B, n + T)."""
    index = torch.from_numpy(which).to(base.device)
    before = prefixes.lengths[which]
    ids, own, positions = _left_padded(base, rows, before)
    places = np.arange(prefixes.width) >= prefixes.width - before[:, None]
    mask = torch.cat([torch.from_numpy(places.astype(np.int64)).to(base.device), own], dim=1)
    cache = _cache([(keys.index_select(0, index), values.index_select(0, index)) for keys, values in prefixes.past])
    hidden: Tensor = base.model.base_model(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    ).last_hidden_state
    spent.add(Spent(int(ids.numel()), int(ids.numel() - own.sum())))
    return hidden, cache, mask


def _token_scores(base: CausalLM, hidden: Tensor, targets: Tensor) -> Tensor:
    """Log-likelihood of every target token: hidden (R, A, D), targets (R, A) -> float64 (R, A)."""
    logits = base.logits(hidden).float() if hidden.dtype != torch.float64 else base.logits(hidden)
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return -losses.double().view(targets.shape)


def _left_padded(base: CausalLM, texts: Sequence[Int32], before: Int64) -> tuple[Tensor, Tensor, Tensor]:
    """Ids, mask and positions (B, T) of texts that have so many tokens in front of them."""
    lengths = np.array([len(text) for text in texts], np.int64)
    width = int(lengths.max())
    ids = np.full((len(texts), width), base.pad_id, np.int64)
    for b, text in enumerate(texts):
        ids[b, width - len(text) :] = text
    places = np.arange(width) - (width - lengths)[:, None]
    arrays = (ids, (places >= 0).astype(np.int64), before[:, None] + places.clip(min=0))
    ids_, mask, positions = (torch.from_numpy(array).to(base.device) for array in arrays)
    return ids_, mask, positions


def _padded(base: CausalLM, texts: Sequence[Int32], side: str) -> tuple[Tensor, Tensor]:
    """Ids (R, A) of texts, padded at their `side`, and which of them are real."""
    lengths = np.array([len(text) for text in texts])
    width = int(lengths.max())
    ids, real = np.full((len(texts), width), base.pad_id, np.int64), np.zeros((len(texts), width))
    for b, text in enumerate(texts):
        place = slice(width - len(text), None) if side == "left" else slice(0, len(text))
        ids[b, place], real[b, place] = text, 1.0
    return torch.from_numpy(ids).to(base.device), torch.from_numpy(real).to(base.device)


def _cache(past: Sequence[tuple[Tensor, Tensor]]) -> Any:
    from transformers import DynamicCache

    return DynamicCache(list(past)) if past else DynamicCache()


def _layers(cache: Any) -> tuple[tuple[Tensor, Tensor], ...]:
    return tuple((layer.keys, layer.values) for layer in cache.layers)
