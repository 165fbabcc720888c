"""Decoder-only language models: `[bos] prompt target [eos]` in one row, the loss on the target only.

Rows are right-padded. A causal model never looks to the right, so training needs no padding mask at all; the last
token of a row is a target only, so it is not an input. A label is scored by the likelihood of its target.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhpc.data.tokens import Examples, Join, OverlongError, Row, Tokens, examples_from, ranges
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.models.base import (
    Attached,
    Base,
    Int64,
    Sizes,
    angles_of_the_longest,
    bare,
    choosy_beyond,
    in_mapping,
    most_positions,
    sizes_of,
)
from fedhpc.models.call import backbone, takes, with_cache
from fedhpc.models.generative import Generative, TokenBatch, at, joined, require_eos
from fedhpc.models.packing import PackedBatch, pack, packed_mask
from fedhpc.models.trial import agree, same_rows, succeeds
from fedhpc.ranks.failed_collective import TransportError

if TYPE_CHECKING:
    from fedhpc.models.continuation import Anew, Cached

# Keys of a model's configuration that change its logits behind the output layer.
_AFTER_THE_HEAD = ("logit_scale", "logits_scaling", "final_logit_softcapping")


@dataclass(frozen=True, eq=False)
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
    one_text = True

    #: The keys and values (1, heads, 2, width) that the model keeps of two tokens, layer by layer. Empty if it keeps
    #: anything else of earlier tokens: the state of a recurrence, say.
    keys_and_values: tuple[tuple[Tensor, Tensor], ...] = ()
    #: Whether logits are what the output layer and the known keys of the configuration make.
    plain_head: bool = True
    #: Whether rows of unequal length go on behind their keys and values as each does alone.
    goes_on: bool = False

    @classmethod
    def fits(cls, config: Any) -> bool:
        """Whether it is a decoder and nothing else: BERT's class for language modelling is one only if it says so."""
        encoder = in_mapping("AutoModelForMaskedLM", config) and not getattr(config, "is_decoder", False)
        return in_mapping(cls.auto_class, config) and not encoder and not getattr(config, "is_encoder_decoder", False)

    # ---- data

    @classmethod
    def join(cls, tokenizer: Any, max_length: int, room: int = 0, truncate: bool = False) -> Join:
        """`[bos] prompt target [eos]`; an over-long example loses the front of its prompt.

        With `truncate` a target that does not fit loses its end, and the eos with it. Its prompt keeps at most half of
        the row.
        """
        eos = require_eos(tokenizer)
        bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]

        def join(prompt: list[int], target: list[int], where: str) -> Row:
            prompt, target = bare(prompt, bos, ()), bare(target, (), [eos])
            supervised = [*target, eos]
            left = max_length - len(bos) - len(supervised)
            if left >= (0 if bos else 1):
                left = max(left - max(room - len(target), 0), 0 if bos else 1)
            elif truncate and not room:
                left = (max_length - len(bos)) // 2
            else:
                needed = max_length - left + (not bos)
                raise OverlongError.target(where, len(target), max_length, needed, is_label=room > 0)
            lost = max(len(prompt) - left, 0)
            prompt = prompt[lost:]
            if not bos and not prompt:
                raise UserError(
                    f"{where}: the prompt is empty and the tokenizer has no start token (bos): give "
                    "data.prompt a text, so that something comes before the target"
                )
            needed = len(bos) + lost + len(prompt) + max(len(target), room) + 1
            fitting = supervised[: max_length - len(bos) - len(prompt)]
            return Row(bos + prompt, fitting, lost, needed, len(supervised) - len(fitting))

        return join

    @classmethod
    def answer_ids(cls, tokenizer: Any, ids: Sequence[int]) -> list[int]:
        """The target and eos."""
        eos = require_eos(tokenizer)
        return [*bare([*ids], (), [eos]), eos]

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

    def packed(self, examples: Examples, indices: Int64, groups: Int64) -> PackedBatch:
        """`batch` with several examples in one row, of those of one group (E,)."""
        starts, sizes, device = examples.offsets[indices], examples.lengths_of(indices) - 1, self.device
        row_of, first = pack(sizes, groups)
        shape = int(row_of.max()) + 1, int(sizes.max(initial=1))
        begin = row_of * shape[1] + first
        cells = ranges(begin, begin + sizes)
        ids, columns, texts = np.full(shape, self.pad_id), np.zeros(shape, np.int64), np.full(shape, -1)
        ids.flat[cells] = examples.ids[ranges(starts, starts + sizes)]
        columns.flat[cells] = ranges(np.zeros_like(sizes), sizes)
        texts.flat[cells] = np.repeat(np.arange(len(indices)), sizes)
        example, position = examples.supervised(indices)
        return PackedBatch(
            ids=kernels.on_device(ids, device),
            positions=kernels.on_device(begin[example] + position - 1, device),
            targets=kernels.on_device(examples.ids[starts[example] + position].astype(np.int64), device),
            row=kernels.on_device(row_of[example], device),
            supervised=np.bincount(example, minlength=len(indices)),
            tokens=int(ids.size),
            real_tokens=int(sizes.sum()),
            example=np.unique(row_of, return_index=True)[1],
            columns=kernels.on_device(columns, device),
            texts=kernels.on_device(texts, device),
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
    def of(
        cls, network: Any, tokenizer: Any, device: torch.device, name: str, fingerprint: str, new: Sequence[str] = ()
    ) -> Base:
        """UserError where the model does not take text alone."""
        base = super().of(network, tokenizer, device, name, fingerprint, new)
        assert isinstance(base, CausalLM)
        try:
            with torch.no_grad():
                return base._looked_at()
        except (torch.OutOfMemoryError, TransportError):
            raise
        except Exception as error:  # anything, from a missing package to inputs of another sort
            reason = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(
                f"'{name}' ({network.config.model_type}) does not take text alone: {reason[0][:200]}",
                key="model.name", remedy="choose another model",
            ) from error  # fmt: skip

    def _looked_at(self) -> CausalLM:
        """The base with what a few tokens say of its model."""
        base = replace(self, keys_and_values=self._keeps())
        if base.keys_and_values:
            heads, _, width = base.keys_and_values[0][0].shape[1:]
            base = replace(base, num_layers=len(base.keys_and_values), num_kv_heads=heads, head_dim=width)
        base = replace(base, plain_head=base._has_plain_head())
        return replace(base, goes_on=base._goes_on())

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        """What the configuration says; the model itself, once it is looked at, knows better what its layers keep."""
        text = config.get_text_config(decoder=True)
        return sizes_of(text, text.num_hidden_layers)

    @property
    def max_positions(self) -> int | None:
        return most_positions(self.model.config.get_text_config(decoder=True))

    @property
    def limited_by(self) -> str:
        form = angles_of_the_longest(self.model.config.get_text_config(decoder=True))
        if form:
            return f" (in a longer batch every row's {form} angles follow the longest row)"
        chosen = choosy_beyond(self.model.config.get_text_config(decoder=True)) == self.max_positions
        return " (in longer rows its attention chooses among tokens, padding and later ones too)" if chosen else ""

    def _keeps(self) -> tuple[tuple[Tensor, Tensor], ...]:
        from transformers import DynamicCache

        cache = DynamicCache()
        try:
            self.hidden(self.some_ids(1, 2), cache=cache)
            return tuple((layer.keys, layer.values) for layer in cache.layers if layer.keys.shape[2] == 2)
        except (torch.OutOfMemoryError, TransportError):
            raise
        except Exception:  # what models raise that keep something else differs from one to the next
            return ()

    def hidden(
        self,
        ids: Tensor,
        embeddings: Tensor | None = None,
        cache: Any = None,
        mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """The last hidden states (B, n + T, D) of the tokens ids (B, T) behind embeddings (B, n, D), or none.

        cache: holds keys and values of what comes before, and takes in those of the tokens. mask: (B, all positions), 0
        where attention may not look. positions: (B, T), where the model is told them; else they are counted.
        """
        layers = backbone(self.model)
        if embeddings is None:
            inputs = {"input_ids": ids}
        else:
            inputs = {"inputs_embeds": torch.cat([embeddings, self.model.get_input_embeddings()(ids)], dim=1)}
        if mask is not None:
            inputs["attention_mask"] = mask
        if positions is not None and takes(layers, "position_ids"):
            inputs["position_ids"] = positions
        hidden: Tensor = layers(**inputs, **with_cache(layers, cache)).last_hidden_state
        return hidden

    def read(self, attached: Attached, ids: Tensor) -> Tensor:
        """The last hidden states (B, n + T, D) of right-padded tokens (B, T) behind n attached embeddings."""
        from fedhpc.models.prefix_cache import prefix_cache

        cache = prefix_cache(attached.past, self.num_layers) if self.keys_and_values else None
        return self.hidden(ids, attached.embeddings, cache)

    def _read_packed(self, attached: Attached, batch: PackedBatch) -> Tensor:
        """The last hidden states (B, T, D) of packed texts, each behind the keys and values that are attached."""
        from fedhpc.models.prefix_cache import prefix_cache

        if attached.embeddings is not None:
            raise ValueError("embeddings stand in front of a row, not of each text in it")
        layers, n = backbone(self.model), attached.virtual_length
        if not takes(layers, "position_ids"):
            raise ValueError("the positions of a row cannot be told")
        takes_booleans = layers.config._attn_implementation == "sdpa"
        seen = packed_mask(batch, n, None if takes_booleans else self.model.get_input_embeddings().weight)
        cache = prefix_cache(attached.past, self.num_layers) if self.keys_and_values else None
        return self.hidden(batch.ids, None, cache, seen, batch.columns + n)

    def base_logits(self, states: Tensor) -> Tensor:
        return self._plain_logits(states) if self.plain_head else self._full_logits(states)

    def _plain_logits(self, states: Tensor) -> Tensor:
        """The output layer, and what some families do behind it."""
        logits: Tensor = self.model.get_output_embeddings()(states)
        config = self.model.config.get_text_config(decoder=True)
        if (scale := getattr(config, "logit_scale", None)) is not None:
            logits = logits * scale
        if (scaling := getattr(config, "logits_scaling", None)) is not None:
            logits = logits / scaling
        if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
            logits = (logits / cap).tanh() * cap
        return logits

    def _full_logits(self, states: Tensor) -> Tensor:
        """What the model itself makes of states (..., D): its forward pass, with these in place of its layers'."""
        with _answering(backbone(self.model), states.reshape(1, -1, states.shape[-1])):
            logits: Tensor = self.model(input_ids=torch.zeros(1, 1, dtype=torch.int64, device=states.device)).logits
        return logits.reshape(*states.shape[:-1], -1)

    def _has_plain_head(self) -> bool:
        ids = self.some_ids(1, 3)
        theirs = self.model(input_ids=ids, **with_cache(self.model, None)).logits
        states = self.hidden(ids)
        if states.shape[-1] != self.model.get_output_embeddings().weight.shape[-1]:
            return False
        return agree(theirs, self._plain_logits(states))

    def frozen_head(self, attached: Attached) -> Tensor | None:
        layer, config = self.model.get_output_embeddings(), self.model.config.get_text_config(decoder=True)
        changed = any(getattr(config, key, None) is not None for key in _AFTER_THE_HEAD) or not self.plain_head
        trained = attached.output is not None or layer._forward_hooks or layer._forward_pre_hooks
        if type(layer) is not torch.nn.Linear or layer.bias is not None or changed or trained:
            return None
        exact = layer.weight.dtype in (torch.float32, torch.float64)
        frozen = exact and not layer.weight.requires_grad and not torch.is_autocast_enabled(self.device.type)
        return layer.weight if frozen else None

    # ---- what it computes, looked at before it is trained

    def check(self) -> None:
        """UserError too where a row depends on what comes later, or on the rows beside it."""
        ids = self.some_ids(1, 8)
        start, end = ids[:, :4], ids[:, 4:]
        with torch.no_grad():
            theirs = self.model(input_ids=ids, **with_cache(self.model, None)).logits
            alone = self.hidden(ids)
            ours = self.base_logits(alone)
            others = [torch.cat([start, other], dim=1) for other in (end.flip(1), torch.full_like(end, self.pad_id))]
            beside = self.read(Attached(), torch.cat([ids, *others]))
        self.require_same_logits(theirs, ours)
        if not same_rows([alone[0], *[alone[0, :4]] * len(others)], list(beside)):
            raise UserError(
                f"in '{self.name}' ({self.model.config.model_type}) tokens depend on later ones, or on other rows",
                key="model.name", remedy="choose a model that reads from left to right",
            )  # fmt: skip

    def check_past(self) -> None:
        what = f"'{self.name}' ({self.model.config.model_type})"
        remedy = "choose method lora, ia3 or another that changes the model's layers"
        if not self.keys_and_values:
            raise UserError(
                f"method.name: a prefix needs layers that keep keys and values of every token; {what} keeps something "
                "else, such as the state of a recurrence", key="method.name", remedy=remedy,
            )  # fmt: skip
        if len({tensor.shape for pair in self.keys_and_values for tensor in pair}) > 1:
            raise UserError(
                f"method.name: the keys and values of {what} differ in size, and a prefix has one size for all layers",
                key="method.name", remedy=remedy,
            )  # fmt: skip
        ids = self.some_ids(1, 6)
        with torch.no_grad():
            layers = self.activations(ids[0, :3].tolist())
            past = tuple((k[None], v[None]) for k, v in zip(layers[0::2], layers[1::2], strict=True))
            behind, together = self.read(Attached(past), ids[:, 3:]), self.hidden(ids)
        if not agree(behind, together[:, 3:]):
            raise UserError(
                f"method.name: {what} does not read keys and values in front of its own as those of earlier tokens",
                key="method.name", remedy=remedy,
            )  # fmt: skip

    def check_embeddings(self) -> None:
        ids = self.some_ids(1, 4)
        with torch.no_grad():
            together = self.hidden(ids)

            def stand_for_tokens() -> bool:
                first = self.model.get_input_embeddings()(ids[:, :2])
                self.read(Attached(embeddings=first / 2), ids[:, 2:])  # some look for the tokens that they are of
                return agree(self.read(Attached(embeddings=first), ids[:, 2:]), together, 1e-5)

            same = succeeds(stand_for_tokens)
        if not same:
            raise UserError(
                f"method.name: '{self.name}' ({self.model.config.model_type}) looks its tokens up more than once, so "
                "trained embeddings cannot stand for tokens",
                key="method.name", remedy="choose method lora, ia3 or another that changes the model's layers",
            )  # fmt: skip

    def check_shared(self, longest: int) -> None:
        """UserError where rows of up to `longest` tokens cannot share keys and values, with padding between the two."""
        window = narrowest_window(self.model.config.get_text_config(decoder=True))
        if not self.goes_on or not takes(backbone(self.model), "position_ids"):
            reason = "does not let rows of unequal length share keys and values"
        elif window is not None and window < longest:
            reason = f"looks at the last {window} columns alone, padding included, and there are up to {longest}"
        else:
            return
        raise UserError(
            f"method.name: '{self.name}' ({self.model.config.model_type}) {reason}",
            key="method.name", remedy="choose a method that is trained, such as prompt or lora, or another model",
        )  # fmt: skip

    def check_packing(self, longest: int) -> None:
        """UserError where texts of up to `longest` tokens are not computed in one row as each is by itself."""
        what = f"'{self.name}' ({self.model.config.model_type})"
        window = narrowest_window(self.model.config.get_text_config(decoder=True))
        if window is not None and window < longest:
            reason = f"looks at the last {window} tokens alone, and a text has up to {longest}"
        elif not succeeds(self._packs):
            reason = "does not read several texts in one row as it reads each by itself"
        else:
            return
        raise UserError(f"{what} {reason}", key="client.packing", remedy="take it out")

    def _packs(self) -> bool:
        ids, sizes = self.some_ids(1, 13)[0].cpu().numpy().astype(np.int32), np.array([6, 4, 3])
        tokens = Tokens(ids, np.concatenate([[0], np.cumsum(sizes)]), np.ones(len(sizes), np.int32))
        examples, indices = examples_from(tokens), np.arange(len(sizes))
        with torch.no_grad():
            past: tuple[tuple[Tensor, Tensor], ...] = ()
            if self.keys_and_values:  # as a prefix has them
                past = tuple((k.repeat(3, 1, 1, 1), v.repeat(3, 1, 1, 1)) for k, v in self.keys_and_values)
            apart = self.states(Attached(past), self.batch(examples, indices))
            batch = self.packed(examples, indices, np.zeros_like(indices))
            together = self.states(Attached(tuple((k[: len(batch.ids)], v[: len(batch.ids)]) for k, v in past)), batch)
        return len(batch.ids) == 2 and agree(together, apart)

    def _goes_on(self) -> bool:
        from fedhpc.models.continuation import Anew, Cached

        if not self.keys_and_values:
            return False
        ids = self.some_ids(1, 5)[0].cpu().numpy()
        states = []
        for way in (Cached, Anew):
            going = way(self, Attached(), [ids[:2], ids[:4]])
            going.add(self.some_ids(1, 2)[0])
            states.append(going.states)
        return agree(states[0], states[1])

    def activations(self, ids: Sequence[int]) -> list[Tensor]:
        from transformers import DynamicCache

        cache = DynamicCache()  # one that a window does not cut
        with torch.no_grad():
            self.hidden(torch.tensor([ids], device=self.device), cache=cache)
        return [t for layer in cache.layers for t in (layer.keys[0], layer.values[0])]

    def states(self, attached: Attached, batch: TokenBatch) -> Tensor:
        from fedhpc.models.llama import hidden_at, written_out

        if isinstance(batch, PackedBatch):
            return at(self._read_packed(attached, batch), batch.positions)
        rows, length = batch.row, batch.ids.shape[1]
        # Positions of a row of inputs: behind virtual embeddings.
        before = 0 if attached.embeddings is None else attached.embeddings.shape[1]
        positions = batch.positions - rows * length + before
        if not written_out(self.model):
            return at(self.read(attached, batch.ids), rows * (before + length) + positions)
        inputs = self.model.get_input_embeddings()(batch.ids)
        if attached.embeddings is not None:
            inputs = torch.cat([attached.embeddings, inputs], dim=1)
        return hidden_at(self.model, inputs, attached.past, rows, positions, attached.by_position)

    # ---- answers

    def continuation(self, attached: Attached, prompts: Sequence[np.ndarray]) -> Cached | Anew:
        """B non-empty prompts behind what is attached, to go on with token by token."""
        from fedhpc.models.continuation import Anew, Cached

        return (Cached if self.goes_on else Anew)(self, attached, prompts)

    def generate(
        self, attached: Attached, prompts: Sequence[np.ndarray], max_new_tokens: int, ends: Sequence[int] = ()
    ) -> Tensor:
        """The most likely next token, again and again (see Generative).

        The first token of a row has position n, behind its n virtual ones, as in training, and a row's text does not
        depend on the other rows of its batch.
        """
        limit, device = self.max_positions, self.device
        generated = torch.full((len(prompts), max_new_tokens), -1, dtype=torch.int64, device=device)
        ended = torch.zeros(len(prompts), dtype=torch.bool, device=device)
        lengths = kernels.on_device(np.array([len(prompt) for prompt in prompts]), device)
        rows = torch.arange(len(prompts), device=device)
        written = self.continuation(attached, prompts)
        for step in range(max_new_tokens):
            chosen = self.logits(attached, written.states, rows).argmax(dim=-1)
            for end in {self.tokenizer.eos_token_id, *ends}:
                ended |= chosen == end
            generated[:, step] = torch.where(ended, -1, chosen)
            if limit is not None:
                ended |= attached.virtual_length + lengths + step >= limit
            if step + 1 == max_new_tokens or bool(ended.all()):
                break
            written.add(chosen)  # ended rows go along until the last one ends
        return generated


def narrowest_window(config: Any) -> int | None:
    """How many columns the layers look back that do not look at all of them; None where all do."""
    layers = getattr(config, "layer_types", None)
    if layers and not any("sliding" in layer or "chunked" in layer for layer in layers):
        return None
    sizes = (getattr(config, key, None) for key in ("sliding_window", "window_size", "attention_chunk_size"))
    return min((size for size in sizes if size), default=None)


class _Answer:
    """A model's output of which only the last hidden states are there."""

    def __init__(self, states: Tensor) -> None:
        self.last_hidden_state = states

    def __getattr__(self, name: str) -> None:
        return None

    def __getitem__(self, index: Any) -> Tensor:
        states: Tensor = (self.last_hidden_state,)[index]
        return states


@contextmanager
def _answering(layers: Any, states: Tensor) -> Iterator[None]:
    """Let the model's layers answer with these states (1, S, D), whatever they are asked."""
    replaced = vars(layers).get("forward")  # of a library that wraps a module, such as accelerate
    layers.forward = lambda *args, **kwargs: _Answer(states)
    try:
        yield
    finally:
        del layers.forward
        if replaced is not None:
            layers.forward = replaced
