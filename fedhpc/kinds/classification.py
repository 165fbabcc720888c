"""Sequence classification: an encoder (BERT, RoBERTa families) with a head over the classes of `data.label`.

An example is the prompt with the tokenizer's own special tokens, cut at its end where it is too long; there is no
target. The head's cross-entropy on the label is the loss, one per row, so the "supervised tokens" that are counted
are examples. The head is trained with every method and is part of its payload (methods/_head.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhpc import registry
from fedhpc.config import Config
from fedhpc.data.tokens import Examples, Join
from fedhpc.errors import UserError
from fedhpc.kinds._loss import token_losses
from fedhpc.kinds.base import (
    Attached,
    Batch,
    Int64,
    Kind,
    LabelRows,
    Loaded,
    Sizes,
    encoder_positions,
    in_mapping,
    pad_id,
    padded,
    soft_targets,
    special_ids,
)
from fedhpc.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedhpc import kernels
else:
    torch, kernels = lazy("torch"), lazy("fedhpc.kernels")


@dataclass(frozen=True)
class TextBatch(Batch):
    """Texts and their classes."""

    ids: Tensor  # int64 (B, T)
    mask: Tensor  # int64 (B, T): 0 on padding
    labels: Tensor  # int64 (B,)


class Classification(Kind):
    """See the module."""

    name = "classification"
    needs = "an encoder (BERT, RoBERTa families)"
    auto_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"
    has_target = False
    answers = frozenset({"losses", "labels"})

    def fits(self, config: Any) -> bool:
        """Whether it is an encoder: pretrained on masked tokens, and not said to be a decoder."""
        decoder = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
        return in_mapping("AutoModelForMaskedLM", config) and in_mapping(self.auto_class, config) and not decoder

    def check(self, config: Config) -> None:
        """A column for the classes, and only metrics that a classifier has."""
        if config.data.label is None:
            raise UserError(
                f"data.label: '{config.model.name}' is trained as a classifier, which needs the column with the class "
                "of an example"
            )
        for name in {*config.evaluation.metrics, *config.evaluation.metrics_of_test}:
            if registry.choice("metrics", name).needs not in self.answers:
                raise UserError(
                    f"evaluation.metrics: {name} is of generated texts and a classifier writes none; "
                    "use loss, accuracy, macro_f1"
                )

    # ---- data

    def join(self, tokenizer: Any, max_length: int) -> Join:
        """The prompt between the tokenizer's special tokens, cut at its end; no target."""
        before, after = special_ids(tokenizer)
        room = max_length - len(before) - len(after)

        def join(prompt: list[int], target: list[int], place: str) -> tuple[list[int], list[int]]:
            if not prompt and not before and not after:
                raise UserError(f"{place}: the text is empty; leave the row out with data.where_not")
            return [*before, *prompt[:room], *after], []

        return join

    def supervised(self, examples: Examples, indices: Int64) -> Int64:
        """One each: the label."""
        return np.ones(len(indices), np.int64)

    def batch(self, base: Loaded, examples: Examples, indices: Int64) -> TextBatch:
        """See the base class."""
        if examples.labels is None:
            raise ValueError("a classifier needs labelled examples")
        ids, mask = padded([examples.tokens(int(i)) for i in indices], pad_id(base))
        labels, rows = examples.labels[indices].astype(np.int64), np.arange(len(indices))
        ids_, mask_, labels_, rows_ = (kernels.on_device(a, base.device) for a in (ids, mask, labels, rows))
        return TextBatch(
            ids=ids_,
            mask=mask_,
            labels=labels_,
            row=rows_,
            supervised=np.ones(len(indices), np.int64),
            tokens=int(ids.size),
            real_tokens=int(mask.sum()),
            soft=soft_targets(base, examples, indices),
        )

    # ---- the model

    def config_options(self, labels: Sequence[str]) -> dict[str, Any]:
        """The classes. UserError for fewer than two."""
        if len(labels) < 2:
            raise UserError(f"data.label: a classifier needs at least two classes, the data have {len(labels)}")
        names = dict(enumerate(labels))
        return {"num_labels": len(labels), "id2label": names, "label2id": {name: i for i, name in names.items()}}

    def may_be_new(self, network: Any, parameter: str) -> bool:
        """The head, which a bare encoder lacks, and the pooling layer, which some encoders lack too."""
        return not _in_backbone(network, parameter) or ".pooler." in parameter

    def head(self, network: Any, new: Sequence[str]) -> tuple[str, ...]:
        """The linear layers behind the encoder, and within it those that have no stored weights."""
        paths = []
        for path, module in network.named_modules():
            own = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
            if not own or (_in_backbone(network, path) and not set(own) & set(new)):
                continue
            if not isinstance(module, torch.nn.Linear):
                raise UserError(
                    f"model.name: the head of '{network.config.model_type}' models has more than linear layers "
                    f"({path} is {type(module).__name__}), which cannot be trained here"
                )
            paths.append(path)
        return tuple(paths)

    def sizes(self, config: Any) -> Sizes:
        """See the base class."""
        heads = config.num_attention_heads
        return Sizes(config.num_hidden_layers, heads, config.hidden_size // heads, config.hidden_size)

    def max_positions(self, base: Loaded) -> int | None:
        """See the base class."""
        return encoder_positions(base.model)

    def check_past(self, base: Loaded) -> None:
        """See the base class."""
        if "past_key_values" not in signature(base.model.base_model.forward).parameters:
            raise UserError(
                f"method.name: a prefix cannot be put in front of '{base.model.config.model_type}' models; "
                "use prompt, p_tuning, lora or ia3"
            )

    def activations(self, base: Loaded, ids: Sequence[int]) -> list[Tensor]:
        """See the base class."""
        from transformers import DynamicCache

        cache = DynamicCache()  # an encoder fills one though it has no use for it
        text = torch.tensor([ids], device=base.device)
        with torch.no_grad():
            base.model.base_model(input_ids=text, attention_mask=torch.ones_like(text), past_key_values=cache)
        return [t for layer in cache.layers for t in (layer.keys[0], layer.values[0])]

    def logits(self, base: Loaded, attached: Attached, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, T) -> logits (B, classes), each row behind its own virtual positions, which all can see."""
        from fedhpc.kinds._masks import padding

        inputs = {"input_ids": ids}
        if attached.embeddings is not None:
            inputs = {"inputs_embeds": torch.cat([attached.embeddings, base.model.get_input_embeddings()(ids)], dim=1)}
        if n := attached.virtual_length:
            mask = torch.cat([mask.new_ones(len(mask), n), mask], dim=1)
        with _past(base, attached):
            logits: Tensor = base.model(**inputs, attention_mask=padding(base.model, mask)).logits
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    # ---- training

    def num_classes(self, base: Loaded) -> int:
        """The labels."""
        return int(base.model.config.num_labels)

    def predictions(self, base: Loaded, attached: Attached, batch: TextBatch) -> Iterator[Tensor]:
        """See the base class."""
        yield self.logits(base, attached, batch.ids, batch.mask)

    def losses(self, base: Loaded, attached: Attached, batch: TextBatch) -> Tensor:
        """See the base class."""
        logits = self.logits(base, attached, batch.ids, batch.mask)
        return token_losses(logits, batch.labels, batch.soft)

    def backward(
        self, base: Loaded, attached: Attached, batch: TextBatch, row_weights: Tensor, scale: float = 1.0
    ) -> Tensor:
        """See the base class."""
        losses = self.losses(base, attached, batch)
        (losses * row_weights * scale).sum().backward()
        return losses.detach()

    # ---- answers

    def label_rows(self, base: Loaded, examples: Examples, indices: Int64, targets: Sequence[str]) -> LabelRows:
        """One row per example: the head scores all labels at once."""
        return LabelRows(indices, np.zeros(len(indices), np.int64), examples.lengths_of(indices), len(targets))

    def label_scores(
        self, base: Loaded, attached: Attached, examples: Examples, rows: LabelRows, part: Int64, targets: Sequence[str]
    ) -> Tensor:
        """The logits of the head: (len(part), classes)."""
        batch = self.batch(base, examples, rows.example[part])
        return self.logits(base, attached, batch.ids, batch.mask).to("cpu", torch.float64)


def _in_backbone(network: Any, path: str) -> bool:
    return path.startswith(f"{network.base_model_prefix}.")


@contextmanager
def _past(base: Loaded, attached: Attached) -> Iterator[None]:
    """The encoder with keys and values in front of its own: its classifier does not pass them on everywhere."""
    from fedhpc.kinds._cache import prefix_cache

    if not attached.past:
        yield
        return

    def give(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "past_key_values": prefix_cache(attached.past)}

    hook = base.model.base_model.register_forward_pre_hook(give, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


KIND = Classification()
