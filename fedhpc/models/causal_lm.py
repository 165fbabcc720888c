"""Decoder-only language models: `[bos] prompt target [eos]` in one row, the loss on the target only.

Rows are right-padded. A causal model never looks to the right, so training needs no padding mask at all; the last
token of a row is a target only, so it is not an input. A label is scored by the likelihood of its target.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedhpc.data.tokens import Examples, Join
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.models.base import Attached, Int64, Sizes, in_mapping
from fedhpc.models.generative import Generative, TokenBatch, at, joined, require_eos

# Keys of a model's configuration that change its logits behind the output layer.
_AFTER_THE_HEAD = ("logit_scale", "logits_scaling", "final_logit_softcapping")


class CausalLM(Generative):
    """A decoder-only language model, which predicts each token of a row from those before it.

    Any Hugging Face model whose logits are `output_embeddings(last_hidden_state)`, with an optional soft cap or
    scale (checked when it is loaded).
    """

    task = "causal_lm"
    objective = "language_modelling"
    needs = "a decoder-only language model"
    auto_class = "AutoModelForCausalLM"
    task_type = "CAUSAL_LM"

    @classmethod
    def fits(cls, config: Any) -> bool:
        """Whether it is a decoder and nothing else: BERT's class for language modelling is one only if it says so."""
        encoder = in_mapping("AutoModelForMaskedLM", config) and not getattr(config, "is_decoder", False)
        return in_mapping(cls.auto_class, config) and not encoder and not getattr(config, "is_encoder_decoder", False)

    # ---- data

    @classmethod
    def join(cls, tokenizer: Any, max_length: int) -> Join:
        """`[bos] prompt target [eos]`; an over-long example loses the front of its prompt, never of its target."""
        eos = require_eos(tokenizer)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

        def join(prompt: list[int], target: list[int], where: str) -> tuple[list[int], list[int]]:
            room = max_length - len(bos) - len(target) - 1
            if room < 0 or (room == 0 and not bos):
                raise UserError(
                    f"{where}: the target has {len(target)} tokens and does not fit in "
                    f"data.max_length {max_length}; use at least {max_length - room + (not bos)}, "
                    "or leave the row out"
                )
            prompt = prompt[max(len(prompt) - room, 0) :]
            if not bos and not prompt:
                raise UserError(
                    f"{where}: the prompt is empty and the tokenizer has no start token (bos): give "
                    "data.prompt a text, so that something comes before the target"
                )
            return bos + prompt, [*target, eos]

        return join

    @classmethod
    def answer_ids(cls, tokenizer: Any, ids: Sequence[int]) -> list[int]:
        """The target and eos."""
        return [*ids, require_eos(tokenizer)]

    def batch(self, examples: Examples, indices: Int64) -> TokenBatch:
        starts, lengths, device = examples.offsets[indices], examples.lengths_of(indices), self.device
        columns = np.arange(max(int(lengths.max()) - 1, 1))
        inside = columns < (lengths - 1)[:, None]
        ids = np.where(inside, examples.ids[np.where(inside, starts[:, None] + columns, 0)], self.pad_id)
        row, position = examples.supervised(indices)
        return TokenBatch(
            ids=kernels.on_device(ids.astype(np.int64), device),
            positions=kernels.on_device(row * len(columns) + position - 1, device),
            targets=kernels.on_device(examples.ids[starts[row] + position].astype(np.int64), device),
            row=kernels.on_device(row, device),
            supervised=np.bincount(row, minlength=len(indices)),
            tokens=int(ids.size),
            real_tokens=int((lengths - 1).sum()),
        )

    def with_answers(
        self, attached: Attached, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]
    ) -> Examples:
        """A row that is longer than the model's positions loses the front of its prompt, but for the bos."""
        limit, bos = self.max_positions, self.tokenizer.bos_token_id
        cut = []
        for prompt, answer in zip(prompts, answers, strict=True):
            excess = 0 if limit is None else len(prompt) + len(answer) - (limit - attached.virtual_length)
            first = 1 if excess > 0 and prompt[0] == bos else 0
            cut.append(np.concatenate([prompt[:first], prompt[first + max(excess, 0) :]]))
        return joined(cut, answers)

    # ---- the model

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        return Sizes(
            num_layers=text.num_hidden_layers,
            num_kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            hidden_size=text.hidden_size,
        )

    @property
    def max_positions(self) -> int | None:
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        return int(limit) if limit else None

    def logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.model.get_output_embeddings()(states)
        config = self.model.config
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (scaling := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / scaling
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = (logits / cap).tanh() * cap
        return logits

    def frozen_head(self) -> Tensor | None:
        layer, config = self.model.get_output_embeddings(), self.model.config
        changed = any(getattr(config, key, None) is not None for key in _AFTER_THE_HEAD)
        attached = layer._forward_hooks or layer._forward_pre_hooks
        if type(layer) is not torch.nn.Linear or layer.bias is not None or changed or attached:
            return None
        exact = layer.weight.dtype in (torch.float32, torch.float64)
        frozen = exact and not layer.weight.requires_grad and not torch.is_autocast_enabled(self.device.type)
        return layer.weight if frozen else None

    def check(self) -> None:
        ids = torch.tensor([[1, 2, 3]], device=self.device) % self.model.config.get_text_config().vocab_size
        with torch.inference_mode():
            theirs = self.model(input_ids=ids, use_cache=False).logits
            ours = self.logits(self.model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        self.require_same_logits(theirs, ours)

    def activations(self, ids: Sequence[int]) -> list[Tensor]:
        with torch.no_grad():
            cache = self.model.base_model(
                input_ids=torch.tensor([ids], device=self.device), use_cache=True
            ).past_key_values
        return [t for layer in cache.layers for t in (layer.keys[0], layer.values[0])]

    def states(self, attached: Attached, batch: TokenBatch) -> Tensor:
        from fedhpc.models.llama import hidden_at, written_out
        from fedhpc.models.prefix_cache import prefix_cache

        inputs = self.model.get_input_embeddings()(batch.ids)
        if attached.embeddings is not None:
            inputs = torch.cat([attached.embeddings, inputs], dim=1)
        # Positions of a row of inputs: behind virtual embeddings.
        rows, length = batch.row, batch.ids.shape[1]
        positions = batch.positions - rows * length + inputs.shape[1] - length
        if written_out(self.model):
            return hidden_at(self.model, inputs, attached.past, rows, positions, attached.by_position)
        cache = prefix_cache(attached.past, self.num_layers)
        hidden = self.model.base_model(inputs_embeds=inputs, past_key_values=cache, use_cache=True).last_hidden_state
        return at(hidden, rows * inputs.shape[1] + positions)

    # ---- answers

    def generate(self, attached: Attached, prompts: Sequence[np.ndarray], max_new_tokens: int) -> Tensor:
        """The most likely next token, again and again (see Generative).

        Prompts are left-padded, so that all rows go on in the same column; the attention mask hides the padding, and
        the first real token of a row has position n, behind its n virtual ones, as in training. So a row's text does
        not depend on the other rows of its batch.
        """
        from transformers import DynamicCache

        n, device = attached.virtual_length, self.device
        lengths = np.array([len(prompt) for prompt in prompts])
        width = int(lengths.max())
        padding = width - lengths
        ids_ = np.full((len(prompts), width), self.pad_id, np.int64)
        mask_ = np.ones((len(prompts), n + width), np.int64)
        for b, prompt in enumerate(prompts):
            ids_[b, padding[b] :] = prompt
            mask_[b, n : n + padding[b]] = 0
        positions_ = n + (np.arange(width) - padding[:, None]).clip(min=0)
        ids, mask, positions = (kernels.on_device(array, device) for array in (ids_, mask_, positions_))

        limit = self.max_positions
        cache = DynamicCache(list(attached.past)) if attached.past else DynamicCache()
        generated = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.int64, device=device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        embed = self.model.get_input_embeddings()
        for step in range(max_new_tokens):
            inputs = embed(ids)
            if step == 0 and attached.embeddings is not None:
                inputs = torch.cat([attached.embeddings, inputs], dim=1)
                positions = torch.cat([torch.arange(n, device=device).expand(len(prompts), -1), positions], dim=1)
            hidden = self.model.base_model(
                inputs_embeds=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
            ).last_hidden_state[:, -1]
            chosen = self.logits(hidden).argmax(dim=-1)
            ended |= chosen == self.tokenizer.eos_token_id
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
