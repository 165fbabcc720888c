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
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from fedhpc.data.tokens import Examples, Join, OverlongError, Row
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.models.base import (
    Attached,
    Int64,
    Sizes,
    bare,
    in_mapping,
    most_positions,
    padded,
    sizes_of,
    special_ids,
    text_of,
)
from fedhpc.models.call import with_cache
from fedhpc.models.generative import Generative, TokenBatch, at, joined, require_eos
from fedhpc.models.trial import succeeds


@dataclass(frozen=True)
class PairBatch(TokenBatch):
    """Rows of an encoder-decoder: `ids` are the decoder's inputs."""

    source: Tensor  # int64 (B, U)
    mask: Tensor  # int64 (B, U): 0 on the padding of the source


@dataclass(frozen=True, eq=False)
class Seq2Seq(Generative):
    """An encoder-decoder: the encoder reads the prompt, the decoder writes the target."""

    #: What the decoder's states are multiplied with in front of the output layer; `of` finds it.
    output_scale: float = 1.0

    task = "seq2seq"
    objective = "language_modelling"
    needs = "an encoder-decoder (T5, BART families)"
    auto_class = "AutoModelForSeq2SeqLM"
    task_type = "SEQ_2_SEQ_LM"

    @classmethod
    def fits(cls, config: Any) -> bool:
        """Whether it says so of itself."""
        return bool(getattr(config, "is_encoder_decoder", False)) and in_mapping(cls.auto_class, config)

    @classmethod
    def of(
        cls, network: Any, tokenizer: Any, device: torch.device, name: str, fingerprint: str, new: Sequence[str] = ()
    ) -> Seq2Seq:
        """T5's kind scales what goes into tied embeddings; which of them do differs by class and by version."""
        base = super().of(network, tokenizer, device, name, fingerprint, new)
        assert isinstance(base, Seq2Seq)
        ids = base.some_ids(1, 3) % _decoder_config(network.config).vocab_size
        with torch.inference_mode():
            theirs = network(input_ids=ids, decoder_input_ids=ids, use_cache=False).logits
            states = network.get_encoder()(input_ids=ids).last_hidden_state
            states = base._decode(ids, states, torch.ones_like(ids), None)
        scaled = [replace(base, output_scale=scale) for scale in (1.0, base.hidden_size**-0.5)]
        with torch.inference_mode():
            errors = [float((one.base_logits(states) - theirs).float().abs().max()) for one in scaled]
            base = scaled[errors.index(min(errors))]
            base.require_same_logits(theirs, base.base_logits(states))
        return base

    # ---- data

    @classmethod
    def join(cls, tokenizer: Any, max_length: int, room: int = 0, truncate: bool = False) -> Join:
        """The prompt, cut at its end, and the target, each with what the tokenizer puts around a text.

        With `truncate` a target that does not fit loses its end, and the eos with it.
        """
        text = text_of(tokenizer, max_length)

        def join(prompt: list[int], target: list[int], where: str) -> Row:
            answer = cls.answer_ids(tokenizer, target)
            if len(answer) > max_length and (not truncate or room):
                raise OverlongError.target(where, len(target), max_length, len(answer), is_label=room > 0)
            source = text(prompt)
            if not source.front:
                raise UserError(f"{where}: the prompt is empty; leave the row out with data.where_not")
            cut = max(len(answer) - max_length, 0)
            return Row(source.front, answer[:max_length], source.lost, max(source.needed, len(answer)), cut)

        return join

    @classmethod
    def answer_ids(cls, tokenizer: Any, ids: Sequence[int]) -> list[int]:
        """The target between the tokenizer's special tokens, eos at the end."""
        eos = require_eos(tokenizer)
        before, after = special_ids(tokenizer)
        after = after if eos in after else (*after, eos)
        return [*before, *bare([*ids], before, after), *after]

    def batch(self, examples: Examples, indices: Int64) -> PairBatch:
        """What is in front of the first span goes to the encoder, the rest to the decoder."""
        source, mask = padded([examples.prompt(int(i)) for i in indices], self.pad_id)
        start = [np.array([_start_id(self)], np.int32)]
        inputs = [np.concatenate([*start, examples.target(int(i))[:-1]]) for i in indices]
        ids, seen = padded(inputs, self.pad_id)
        row, position = examples.supervised(indices)
        # The decoder starts with one token more, so a state predicts the token at its own position.
        positions = row * ids.shape[1] + position - examples.prompt_lengths[indices[row]]
        targets = examples.ids[examples.offsets[indices[row]] + position].astype(np.int64)
        return PairBatch(
            ids=kernels.on_device(ids, self.device),
            source=kernels.on_device(source, self.device),
            mask=kernels.on_device(mask, self.device),
            positions=kernels.on_device(positions, self.device),
            targets=kernels.on_device(targets, self.device),
            row=kernels.on_device(row, self.device),
            supervised=np.bincount(row, minlength=len(indices)),
            tokens=int(ids.size + source.size),
            real_tokens=int(seen.sum() + mask.sum()),
        )

    def with_answers(
        self, attached: Attached, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]
    ) -> Examples:
        """A label never shortens the prompt: it has the decoder to itself."""
        return joined(prompts, answers)

    # ---- the model

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        """The sizes of the decoder."""
        config = _decoder_config(config)
        layers = getattr(config, "num_decoder_layers", None) or getattr(config, "decoder_layers", None)
        return sizes_of(config, layers or config.num_hidden_layers)

    @property
    def max_positions(self) -> int | None:
        """The positions of the encoder and of the decoder; None for T5, whose positions are relative."""
        return most_positions(self.model.config)

    def base_logits(self, states: Tensor) -> Tensor:
        """BART adds a bias to what comes out of the output layer, Gemma caps it."""
        logits: Tensor = self.model.get_output_embeddings()(states * self.output_scale)
        bias = getattr(self.model, "final_logits_bias", None)
        logits = logits if bias is None else logits + bias.to(logits)
        cap = getattr(_decoder_config(self.model.config), "final_logit_softcapping", None)
        return logits if cap is None else (logits / cap).tanh() * cap

    def check(self) -> None:
        """A row must be the same alone as beside others, behind which its source and its target are padded."""
        lengths = [5, 6, 7, 9, min(40, self.max_positions or 40)]
        ids = self.some_ids(len(lengths), lengths[-1]) % _decoder_config(self.model.config).vocab_size
        rows = ids.cpu().numpy().astype(np.int32)
        sources = [row[:n] for row, n in zip(rows, lengths, strict=True)]
        targets = [row[:n] for row, n in zip(rows, reversed(lengths), strict=True)]  # the longest with the shortest
        examples = joined(sources, targets)
        with torch.no_grad():
            beside = self.states(Attached(), self.batch(examples, np.arange(len(rows))))
            alone = [self.states(Attached(), self.batch(examples, np.array([i]))) for i in range(len(rows))]
        self.require_same_rows(alone, beside.split([len(target) for target in targets]))

    def check_past(self) -> None:
        def fills_a_cache() -> bool:
            layers, shape = self.activations([3, 4]), (self.num_kv_heads, 2, self.head_dim)
            return len(layers) == 2 * self.num_layers and all(tuple(t.shape) == shape for t in layers)

        if not succeeds(fills_a_cache):
            raise UserError(
                f"a prefix cannot be put in front of '{self.model.config.model_type}' models",
                key="method.name", remedy="use prompt, p_tuning, lora or ia3",
            )  # fmt: skip

    def activations(self, ids: Sequence[int]) -> list[Tensor]:
        """The activations of the decoder's self-attention, with the same text in the encoder."""
        cache, text = _cache(Attached()), torch.tensor([ids], device=self.device)
        with torch.no_grad():
            states = self.model.get_encoder()(input_ids=text).last_hidden_state
            self._decode(text, states, torch.ones_like(text), cache)
        return [t for layer in cache.self_attention_cache.layers for t in (layer.keys[0], layer.values[0])]

    def peft_prefix(self, prefix: Tensor) -> tuple[Tensor, dict[str, int]]:
        """PEFT gives layer i of the decoder pair 2 i of keys and values, counted round and round.

        So with twice the layers every layer has a pair of its own, and the pairs between, which are dropped, are zeros.
        With PEFT's own count, two layers would share each pair.
        """
        pairs = prefix.unflatten(-1, (self.num_layers, -1))  # (n, layers, 2 * kv_heads * head_dim)
        spread = torch.stack([pairs, torch.zeros_like(pairs)], dim=2).flatten(1)
        return spread, {"num_layers": 2 * self.num_layers, "num_transformer_submodules": 2}

    def from_peft_prefix(self, prefix: Tensor) -> Tensor:
        """The pairs of keys and values that belong to a layer, without those between them."""
        return prefix.unflatten(-1, (2 * self.num_layers, -1))[:, ::2].flatten(1)

    def states(self, attached: Attached, batch: PairBatch) -> Tensor:
        from fedhpc.models.masks import causal
        from fedhpc.models.prefix_cache import decoder_cache

        states, mask = self._encode(attached, batch.source, batch.mask)
        cache = decoder_cache(attached.past) if attached.past else None
        of_decoder = None if cache else causal(self.model, batch.ids.shape[1], self.device)
        return at(self._decode(batch.ids, states, mask, cache, of_decoder), batch.positions)

    def _encode(self, attached: Attached, source: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The encoder's states (B, n + U, D) and their mask; n is 0 for a prefix, which is the decoder's."""
        from fedhpc.models.masks import padding

        encoder = self.model.get_encoder()
        if attached.embeddings is None:
            mask = padding(self.model, mask)
            return encoder(input_ids=source, attention_mask=mask).last_hidden_state, mask
        inputs = torch.cat([attached.embeddings, self.model.get_input_embeddings()(source)], dim=1)
        mask = padding(self.model, torch.cat([mask.new_ones(len(mask), attached.virtual_length), mask], dim=1))
        return encoder(inputs_embeds=inputs, attention_mask=mask).last_hidden_state, mask

    def _decode(
        self, ids: Tensor, states: Tensor, mask: Tensor, cache: Any, causal_mask: Tensor | None = None
    ) -> Tensor:
        """The decoder's states (B, T, D). mask: of the encoder's; causal_mask: of its self-attention, or None."""
        decoder = self.model.get_decoder()
        hidden: Tensor = decoder(
            input_ids=ids,
            attention_mask=causal_mask,
            encoder_hidden_states=states,
            encoder_attention_mask=mask,
            **with_cache(decoder, cache),
        ).last_hidden_state
        return hidden

    # ---- answers

    def generate(
        self, attached: Attached, prompts: Sequence[np.ndarray], max_new_tokens: int, ends: Sequence[int] = ()
    ) -> Tensor:
        """The most likely next token, again and again (see Generative).

        All rows start in the same column of the decoder, so only the encoder needs a mask.
        """
        device = self.device
        source, mask = (kernels.on_device(array, device) for array in padded(prompts, self.pad_id))
        states, mask = self._encode(attached, source, mask)
        cache, limit = _cache(attached), self.max_positions
        taken = attached.virtual_length if attached.past else 0
        steps = max_new_tokens if limit is None else min(max_new_tokens, limit - taken)
        generated = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.int64, device=device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        ids = torch.full((len(prompts), 1), _start_id(self), dtype=torch.int64, device=device)
        rows = torch.arange(len(prompts), device=device)
        for step in range(steps):
            hidden = self._decode(ids, states, mask, cache)[:, -1]
            chosen = self.logits(attached, hidden, rows).argmax(dim=-1)
            for end in {self.tokenizer.eos_token_id, *ends}:
                ended |= chosen == end
            generated[:, step] = torch.where(ended, -1, chosen)
            if bool(ended.all()):
                break
            ids = chosen.unsqueeze(1)
        return generated


def _decoder_config(config: Any) -> Any:
    """The configuration of the decoder, which some classes keep apart from the encoder's."""
    return getattr(config, "decoder", None) or config


def _start_id(base: Seq2Seq) -> int:
    """The id that the decoder starts with. UserError where the model's configuration does not say."""
    says = (base.model.config, base.model.generation_config)
    start = next((i for c in says if (i := getattr(c, "decoder_start_token_id", None)) is not None), None)
    if start is None:
        raise UserError(f"the config.json of '{base.name}' has no decoder_start_token_id; add it", key="model.name")
    return int(start)


def _cache(attached: Attached) -> Any:
    """A cache of the decoder whose self-attention begins with what is attached."""
    from transformers import DynamicCache, EncoderDecoderCache

    of_itself = DynamicCache(list(attached.past)) if attached.past else DynamicCache()
    return EncoderDecoderCache(of_itself, DynamicCache())
