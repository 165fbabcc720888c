"""Encoder-decoders (T5, BART families): the prompt goes to the encoder, the loss is on the target in the decoder.

The prompt stands between the tokenizer's own special tokens and loses its end where it is too long; so does the target
stand, and it ends with eos. The decoder starts with the model's `decoder_start_token_id` and sees the target shifted by
one. Both are limited to data.max_length, each for itself. A label is scored by the likelihood of its target.

What a method puts in front: embeddings before the encoder's text (prompt, p_tuning); keys and values before those of
the decoder's self-attention (prefix). PEFT, too, leaves the cross-attention without: it makes a prefix for it and then
empties that cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhpc.data.tokens import Examples, Join
from fedhpc.errors import UserError
from fedhpc.kinds._tokens import TokenBatch, TokenKind, at, joined, require_eos
from fedhpc.kinds.base import Attached, Int64, Loaded, Sizes, in_mapping, pad_id, padded, soft_targets, special_ids
from fedhpc.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedhpc import kernels
else:
    torch, kernels = lazy("torch"), lazy("fedhpc.kernels")


@dataclass(frozen=True)
class PairBatch(TokenBatch):
    """Rows of an encoder-decoder: `ids` are the decoder's inputs."""

    source: Tensor  # int64 (B, U)
    mask: Tensor  # int64 (B, U): 0 on the padding of the source


class Seq2Seq(TokenKind):
    """See the module."""

    name = "seq2seq"
    needs = "an encoder-decoder (T5, BART families)"
    auto_class = "AutoModelForSeq2SeqLM"
    task_type = "SEQ_2_SEQ_LM"

    def fits(self, config: Any) -> bool:
        """Whether it says so of itself."""
        return bool(getattr(config, "is_encoder_decoder", False)) and in_mapping(self.auto_class, config)

    # ---- data

    def join(self, tokenizer: Any, max_length: int) -> Join:
        """The prompt, cut at its end, and the whole target, each with what the tokenizer puts around a text."""
        before, after = special_ids(tokenizer)
        room = max_length - len(before) - len(after)

        def join(prompt: list[int], target: list[int], place: str) -> tuple[list[int], list[int]]:
            answer = self.answer_ids(tokenizer, target)
            if len(answer) > max_length:
                raise UserError(
                    f"{place}: the target has {len(target)} tokens and does not fit in data.max_length {max_length}; "
                    f"use at least {len(answer)}, or leave the row out"
                )
            if not prompt and not before and not after:
                raise UserError(f"{place}: the prompt is empty; leave the row out with data.where_not")
            return [*before, *prompt[:room], *after], answer

        return join

    def answer_ids(self, tokenizer: Any, ids: Sequence[int]) -> list[int]:
        """The target between the tokenizer's special tokens, eos at the end."""
        eos = require_eos(tokenizer)
        before, after = special_ids(tokenizer)
        return [*before, *ids, *(after if eos in after else [*after, eos])]

    def supervised(self, examples: Examples, indices: Int64) -> Int64:
        """The whole target: the decoder's start is in front of its first token."""
        return examples.lengths_of(indices) - examples.prompt_lengths[indices]

    def batch(self, base: Loaded, examples: Examples, indices: Int64) -> PairBatch:
        """See the base class."""
        prompts = [examples.prompt(int(i)) for i in indices]
        targets = [examples.tokens(int(i))[len(p) :] for i, p in zip(indices, prompts, strict=True)]
        source, mask = padded(prompts, pad_id(base))
        start = [np.array([_start_id(base)], np.int32)]
        ids, seen = padded([np.concatenate([*start, t[:-1]]) for t in targets], pad_id(base))
        supervised = np.array([len(t) for t in targets], np.int64)
        arrays = {
            "ids": ids,
            "source": source,
            "mask": mask,
            "positions": np.flatnonzero(seen),
            "targets": np.concatenate(targets).astype(np.int64),
            "row": np.repeat(np.arange(len(indices)), supervised),
        }
        return PairBatch(
            **{name: kernels.on_device(a, base.device) for name, a in arrays.items()},
            supervised=supervised,
            tokens=int(ids.size + source.size),
            real_tokens=int(seen.sum() + mask.sum()),
            soft=soft_targets(base, examples, indices),
        )

    def with_answers(
        self, base: Loaded, attached: Attached, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]
    ) -> Examples:
        """A label never shortens the prompt: it has the decoder to itself."""
        return joined(prompts, answers)

    # ---- the model

    def sizes(self, config: Any) -> Sizes:
        """Of the decoder."""
        heads = getattr(config, "decoder_attention_heads", None) or config.num_attention_heads
        layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
        return Sizes(
            num_layers=layers or config.num_hidden_layers,
            num_kv_heads=heads,
            head_dim=getattr(config, "d_kv", None) or config.d_model // heads,
            hidden_size=config.d_model,
        )

    def max_positions(self, base: Loaded) -> int | None:
        """Of the encoder and of the decoder; None for T5, whose positions are relative."""
        limit = getattr(base.model.config, "max_position_embeddings", None)
        return int(limit) if limit else None

    def logits(self, base: Loaded, hidden: Tensor) -> Tensor:
        """See the base class. T5 scales what goes into tied embeddings; BART adds a bias to what comes out."""
        config = base.model.config
        if hasattr(config, "d_kv") and getattr(config, "scale_decoder_outputs", config.tie_word_embeddings):
            hidden = hidden * config.d_model**-0.5
        logits: Tensor = base.model.get_output_embeddings()(hidden)
        bias = getattr(base.model, "final_logits_bias", None)
        return logits if bias is None else logits + bias.to(logits)

    def check_model(self, base: Loaded) -> None:
        """See the base class."""
        ids = torch.tensor([[3, 4, 5]], device=base.device) % base.model.config.vocab_size
        with torch.inference_mode():
            own = base.model(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
            states = base.model.get_encoder()(input_ids=ids).last_hidden_state
            ours = self.logits(base, self._decode(base, ids, states, torch.ones_like(ids), None))
        self.require_same_logits(base, own, ours)

    def activations(self, base: Loaded, ids: Sequence[int]) -> list[Tensor]:
        """Of the decoder's self-attention, with the same text in the encoder."""
        cache, text = _cache(Attached()), torch.tensor([ids], device=base.device)
        with torch.no_grad():
            states = base.model.get_encoder()(input_ids=text).last_hidden_state
            self._decode(base, text, states, torch.ones_like(text), cache)
        return [t for layer in cache.self_attention_cache.layers for t in (layer.keys[0], layer.values[0])]

    def peft_prefix(self, prefix: Tensor, num_layers: int) -> tuple[Tensor, dict[str, int]]:
        """See the base class. PEFT gives layer i of the decoder pair 2 i of keys and values, counted round and round.

        So with twice the layers every layer has a pair of its own, and the pairs between, which are dropped, are zeros.
        With PEFT's own count, two layers would share each pair.
        """
        pairs = prefix.unflatten(-1, (num_layers, -1))  # (n, layers, 2 * kv_heads * head_dim)
        spread = torch.stack([pairs, torch.zeros_like(pairs)], dim=2).flatten(1)
        return spread, {"num_layers": 2 * num_layers, "num_transformer_submodules": 2}

    def hidden(self, base: Loaded, attached: Attached, batch: PairBatch) -> Tensor:
        """See the base class."""
        from fedhpc.kinds._cache import decoder_cache
        from fedhpc.kinds._masks import causal

        states, mask = self._encode(base, attached, batch.source, batch.mask)
        cache = decoder_cache(attached.past) if attached.past else None
        own = None if cache else causal(base.model, batch.ids.shape[1], base.device)
        return at(self._decode(base, batch.ids, states, mask, cache, own), batch.positions)

    def _encode(self, base: Loaded, attached: Attached, source: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's states (B, n + U, D) and their mask; n is 0 for a prefix, which is the decoder's."""
        from fedhpc.kinds._masks import padding

        encoder = base.model.get_encoder()
        if attached.embeddings is None:
            mask = padding(base.model, mask)
            return encoder(input_ids=source, attention_mask=mask).last_hidden_state, mask
        inputs = torch.cat([attached.embeddings, base.model.get_input_embeddings()(source)], dim=1)
        mask = padding(base.model, torch.cat([mask.new_ones(len(mask), attached.virtual_length), mask], dim=1))
        return encoder(inputs_embeds=inputs, attention_mask=mask).last_hidden_state, mask

    def _decode(
        self, base: Loaded, ids: Tensor, states: Tensor, mask: Tensor, cache: Any, own: Tensor | None = None
    ) -> Tensor:
        """The decoder's states (B, T, D). mask: of the encoder's; own: of its self-attention, where it is given one."""
        hidden: Tensor = base.model.get_decoder()(
            input_ids=ids,
            attention_mask=own,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        return hidden

    # ---- answers

    def generate(self, base: Loaded, attached: Attached, prompts: Sequence[np.ndarray], max_new_tokens: int) -> Tensor:
        """See the base class. All rows start in the same column of the decoder, so only the encoder needs a mask."""
        device = base.device
        source, mask = (kernels.on_device(array, device) for array in padded(prompts, pad_id(base)))
        states, mask = self._encode(base, attached, source, mask)
        cache, limit = _cache(attached), self.max_positions(base)
        taken = attached.virtual_length if attached.past else 0
        steps = max_new_tokens if limit is None else min(max_new_tokens, limit - taken)
        generated = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.int64, device=device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        ids = torch.full((len(prompts), 1), _start_id(base), dtype=torch.int64, device=device)
        for step in range(steps):
            hidden = self._decode(base, ids, states, mask, cache)[:, -1]
            chosen = self.logits(base, hidden).argmax(dim=-1)
            ended |= chosen == base.tokenizer.eos_token_id
            generated[:, step] = torch.where(ended, -1, chosen)
            if bool(ended.all()):
                break
            ids = chosen.unsqueeze(1)
        return generated


def _start_id(base: Loaded) -> int:
    """The id that the decoder starts with. UserError where the model's configuration does not say."""
    start = getattr(base.model.config, "decoder_start_token_id", None)
    if start is None:
        raise UserError(f"model.name: the config.json of '{base.name}' has no decoder_start_token_id; add it")
    return int(start)


def _cache(attached: Attached) -> Any:
    """A cache of the decoder whose self-attention begins with what is attached."""
    from transformers import DynamicCache, EncoderDecoderCache

    own = DynamicCache(list(attached.past)) if attached.past else DynamicCache()
    return EncoderDecoderCache(own, DynamicCache())


KIND = Seq2Seq()
