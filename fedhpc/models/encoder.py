"""Encoders (BERT, RoBERTa families): classifiers with a head over labels, and vectors of sentences.

A text stands between the tokenizer's own special tokens, cut at its end where it is too long. Encoder-decoders that
have a classifier of their own (BART, T5 families) classify too: both halves read the text, and the head reads the
decoder's state at the eos token (Lewis et al. 2020, arXiv 1910.13461, section 3.1).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from fedhpc.data.labels import in_head
from fedhpc.data.tokens import Examples, Join, Row
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.models.base import (
    Absent,
    Attached,
    Base,
    Fitted,
    Int64,
    LabelRows,
    Predictor,
    Sizes,
    TargetBatch,
    in_mapping,
    most_positions,
    padded,
    sizes_of,
    text_of,
)
from fedhpc.models.call import cache_argument, takes
from fedhpc.models.trial import agree, succeeds

_ROWS, _STEP, _LONGEST = 8, 8, 47  # of texts that share a batch: rows; columns in steps of; tokens of the longest


class Encoder(Base):
    """A model that reads a whole text at once."""

    needs = "an encoder (BERT, RoBERTa families)"

    @classmethod
    def fits(cls, config: Any) -> bool:
        """Whether it is an encoder: pretrained on masked tokens, and not said to be a decoder."""
        decoder = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
        return in_mapping("AutoModelForMaskedLM", config) and in_mapping(cls.auto_class, config) and not decoder

    @classmethod
    def sizes(cls, config: Any) -> Sizes:
        config = config.get_text_config()
        return sizes_of(config, config.num_hidden_layers)

    @property
    def max_positions(self) -> int | None:
        """The longest input. RoBERTa's positions begin behind the index of its padding."""
        limit = most_positions(self.model.config.get_text_config())
        embeddings = getattr(self.model.base_model, "embeddings", None)
        if limit and embeddings is not None and hasattr(embeddings, "create_position_ids_from_inputs_embeds"):
            limit -= int(embeddings.padding_idx) + 1
        return limit

    def ended(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        """Rows of any tokens (B, T) of these lengths as texts end, in place: encoders need no certain token there."""
        return ids

    def check(self) -> None:
        """A row must be the same alone as beside others, behind which it is padded."""
        lengths = [5, 6, 7, 9, min(40, self.max_positions or 40)]
        ids = self.ended(self.some_ids(len(lengths), lengths[-1]), lengths)
        mask = torch.arange(lengths[-1], device=self.device) < torch.tensor(lengths, device=self.device).unsqueeze(1)
        beside = self._output(mask.long(), input_ids=ids.where(mask, self.pad_id))
        alone = [self._output(mask[[i], :n].long(), input_ids=ids[[i], :n])[0] for i, n in enumerate(lengths)]
        self.require_same_rows(alone, list(beside))

    def check_embeddings(self) -> None:
        ids = self.ended(self.some_ids(1, 5), [5])
        mask = torch.ones_like(ids)

        def stand_for_tokens() -> bool:
            embeddings = self.model.get_input_embeddings()(ids)
            return agree(self._output(mask, inputs_embeds=embeddings), self._output(mask, input_ids=ids))

        if not succeeds(stand_for_tokens):
            raise UserError(
                f"embeddings cannot be put in front of the text of '{self.model.config.model_type}' models",
                key="method.name", remedy="use lora, ia3, adapter or full",
            )  # fmt: skip

    def _output(self, mask: Tensor, **text: Tensor) -> Tensor:
        """What the model says of a text: logits (B, V), or hidden states (B, T, D)."""
        with torch.inference_mode():
            output: Tensor = self.model(**text, attention_mask=mask)[0]
        return output

    def check_past(self) -> None:
        from fedhpc.models.prefix_cache import prefix_cache

        def takes_a_past() -> bool:
            layers = self.activations([3, 4]) if cache_argument(self.model.base_model) else []
            shape = (self.num_kv_heads, 2, self.head_dim)
            if len(layers) != 2 * self.num_layers or any(tuple(t.shape) != shape for t in layers):
                return False
            past = [(k.unsqueeze(0), v.unsqueeze(0)) for k, v in zip(layers[0::2], layers[1::2], strict=True)]
            given = {str(cache_argument(self.model.base_model)): prefix_cache(past)}
            ids = self.some_ids(1, 3)  # XLM has a cache, but counts its positions otherwise
            self.model.base_model(input_ids=ids, attention_mask=ids.new_ones(1, 5), **given)
            return True

        if not succeeds(takes_a_past):
            raise UserError(
                f"a prefix cannot be put in front of '{self.model.config.model_type}' models",
                key="method.name", remedy="use prompt, p_tuning, lora or ia3",
            )  # fmt: skip

    def activations(self, ids: Sequence[int]) -> list[Tensor]:
        from transformers import DynamicCache

        cache = DynamicCache()  # an encoder fills one though it has no use for it
        text = torch.tensor([ids], device=self.device)
        given = {str(cache_argument(self.model.base_model)): cache}
        with torch.no_grad():
            self.model.base_model(input_ids=text, attention_mask=torch.ones_like(text), **given)
        return [t for layer in cache.layers for t in (layer.keys[0], layer.values[0])]


@dataclass(frozen=True)
class TextBatch(TargetBatch):
    """Texts and their labels, the targets."""

    ids: Tensor  # int64 (B, T)
    mask: Tensor  # int64 (B, T): 0 on padding


class Classifier(Encoder, Predictor):
    """An encoder with a head over the labels of `data.label`.

    An example is the prompt; there is no target text. Its label counts as one supervised token. The head is trained
    with every method and is part of its payload.
    """

    task = "classification"
    objective = "classification"
    auto_class = "AutoModelForSequenceClassification"
    task_type = "SEQ_CLS"
    has_target = False

    # ---- before it is loaded

    @classmethod
    def fits(cls, config: Any) -> bool:
        """Whether it is an encoder, or an encoder-decoder that has a classifier of its own."""
        both = getattr(config, "is_encoder_decoder", False) and in_mapping(cls.auto_class, config)
        return both or super().fits(config)

    @classmethod
    def join(cls, tokenizer: Any, max_length: int, room: int = 0, truncate: bool = False) -> Join:
        """The prompt between the tokenizer's special tokens, cut at its end; no target."""
        text = text_of(tokenizer, max_length)

        def join(prompt: list[int], target: list[int], where: str) -> Row:
            row = text(prompt)
            if not row.front:
                raise UserError(f"{where}: the text is empty; leave the row out with data.where_not")
            return row

        return join

    @classmethod
    def config_options(cls, labels: Sequence[str]) -> dict[str, Any]:
        """The labels, one of which an example has. UserError for fewer than two."""
        if len(labels) < 2:
            raise UserError(f"data.label: a classifier needs at least two classes, the data have {len(labels)}")
        names = dict(enumerate(labels))
        return {
            "id2label": names,
            "label2id": {name: i for i, name in names.items()},
            "problem_type": "single_label_classification",
        }

    @classmethod
    def stored_classes(cls, config: Any) -> list[str]:
        """The names in `id2label`, or in `label2id` where that alone has names; none where the two disagree."""
        by_id, by_name = dict(config.id2label), {int(row): name for name, row in (config.label2id or {}).items()}
        if _is_unnamed(by_id) and by_name.keys() == by_id.keys():
            by_id = by_name
        holds = sorted(by_id) == list(range(len(by_id))) and (by_name == by_id or _is_unnamed(by_name))
        return [by_id[row] for row in sorted(by_id)] if holds else []

    @classmethod
    def fit_head(cls, network: Any, head: Sequence[str], labels: Sequence[str], absent: Absent) -> Fitted:
        """The rows of the stored output layer go with their names; where they cannot, it is drawn anew."""
        outputs = [
            (path, module)
            for path, module in network.named_modules()
            if isinstance(module, torch.nn.Linear)
            and not _in_backbone(network, path)
            and module.out_features == len(labels)
        ]
        if not outputs:
            return Fitted()
        path, layer = outputs[-1]
        names = [f"{path}.{name}" for name, _ in layer.named_parameters()]
        drawn = f"one for the {len(labels)} classes of data.label is drawn by run.seed"
        if not absent.missing.isdisjoint(names):
            return Fitted(messages=[f"has no head of a classifier: {drawn}"])
        if rows := [absent.resized[name] for name in names if name in absent.resized]:
            return Fitted(messages=[f"has a head of size {rows[0]}, which is left out: {drawn}"])
        ordered = in_head(labels, head)
        if ordered is None:
            named = f"for {_listed(head)} and not {_listed(labels)}" if head else "without names for its rows"
            way_out = "to keep it, give its config.json an id2label and a label2id with the values of data.label"
            return Fitted(names, [f"has a head {named}, which is left out: {drawn}; {way_out}"])
        if ordered.classes != list(labels):
            rows = [ordered.classes.index(label) for label in labels]
            with torch.no_grad():
                for parameter in layer.parameters():
                    parameter.copy_(parameter[rows])
        taken = f"has a head for {_listed(head)}, which are taken for {_listed(ordered.classes)}"
        return Fitted(messages=[] if ordered.by_name else [taken])

    @classmethod
    def may_be_new(cls, network: Any, parameter: str) -> bool:
        """The head, which a bare encoder lacks, and the pooling layer, which some encoders lack too."""
        return not _in_backbone(network, parameter) or ".pooler." in parameter

    @classmethod
    def head_layers(cls, network: Any, new: Sequence[str]) -> tuple[str, ...]:
        """The linear layers behind the encoder, and within it those that have no stored weights.

        A norm between them, as ModernBERT's head has one, stays as it is.
        """
        paths = []
        for path, module in network.named_modules():
            names = [f"{path}.{name}" for name, _ in module.named_parameters(recurse=False)]
            if not names or (_in_backbone(network, path) and not set(names) & set(new)):
                continue
            if all(parameter.ndim == 1 for parameter in module.parameters(recurse=False)):
                continue
            if not isinstance(module, torch.nn.Linear):
                raise UserError(
                    f"model.name: the head of '{network.config.model_type}' models has more than linear layers "
                    f"({path} is {type(module).__name__}), which cannot be trained here"
                )
            paths.append(path)
        return tuple(paths)

    # ---- the network

    @property
    def num_classes(self) -> int:
        """How many labels there are."""
        return int(self.model.config.num_labels)

    @property
    def end_id(self) -> int | None:
        """The token whose state the head of an encoder-decoder reads, of which a row has one; None of an encoder."""
        config = self.model.config
        return int(config.eos_token_id) if config.is_encoder_decoder else None

    def ended(self, ids: Tensor, lengths: Sequence[int]) -> Tensor:
        if self.end_id is not None:
            ids[torch.arange(len(ids)), torch.tensor(lengths) - 1] = self.end_id
        return ids

    def check_examples(self, examples: Examples, split: str) -> None:
        if self.end_id is None or not len(examples):
            return
        counts = np.add.reduceat((examples.ids == self.end_id).astype(np.int64), examples.offsets[:-1])
        if (wrong := np.flatnonzero(counts != 1)).size:
            first = int(wrong[0])
            text = self.tokenizer.decode(examples.tokens(first).tolist())
            raise UserError(
                f"example {first + 1} of {split}, {text[:60]!r}, has {counts[first]} tokens "
                f"{self.tokenizer.convert_ids_to_tokens(self.end_id)!r}, where the classifier of '{self.name}' reads "
                "one, which its tokenizer puts behind a text; take others out of the text and of the templates",
                key="model.name",
            )  # fmt: skip

    def check_past(self) -> None:
        if self.end_id is not None:
            raise UserError(
                f"a prefix cannot be put in front of a text that '{self.model.config.model_type}' models classify",
                key="method.name", remedy="use lora or ia3",
            )  # fmt: skip
        super().check_past()

    def read_text(self, ids: Tensor, prompt: int) -> Tensor:
        rows, length = ids.shape
        ids = self.ended(ids, [length] * rows)
        return self.class_logits(Attached(), ids, torch.ones_like(ids))

    def batch(self, examples: Examples, indices: Int64) -> TextBatch:
        if examples.labels is None:
            raise ValueError("a classifier needs labelled examples")
        ids, mask = padded([examples.tokens(int(i)) for i in indices], self.pad_id)
        labels, rows = examples.labels[indices].astype(np.int64), np.arange(len(indices))
        ids_, mask_, labels_, rows_ = (kernels.on_device(a, self.device) for a in (ids, mask, labels, rows))
        return TextBatch(
            ids=ids_,
            mask=mask_,
            targets=labels_,
            row=rows_,
            supervised=np.ones(len(indices), np.int64),
            tokens=int(ids.size),
            real_tokens=int(mask.sum()),
        )

    def states(self, attached: Attached, batch: TextBatch) -> Tensor:
        """The logits themselves: the head is a part of the network."""
        return self.class_logits(attached, batch.ids, batch.mask)

    def base_logits(self, states: Tensor) -> Tensor:
        return states

    def class_logits(self, attached: Attached, ids: Tensor, mask: Tensor) -> Tensor:
        """ids, mask (B, T) -> logits (B, labels), each row behind its own virtual positions, which all can see."""
        from fedhpc.models.masks import padding

        inputs = {"input_ids": ids}
        if attached.embeddings is not None:
            inputs = {"inputs_embeds": torch.cat([attached.embeddings, self.model.get_input_embeddings()(ids)], dim=1)}
        if n := attached.virtual_length:
            mask = torch.cat([mask.new_ones(len(mask), n), mask], dim=1)
        with self._past(attached):
            logits: Tensor = self.model(**inputs, attention_mask=padding(self.model, mask)).logits
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    @contextmanager
    def _past(self, attached: Attached) -> Iterator[None]:
        """The encoder with keys and values in front of its own: its classifier does not pass them on everywhere."""
        from fedhpc.models.prefix_cache import prefix_cache

        if not attached.past:
            yield
            return

        def give(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            return args, {**kwargs, str(cache_argument(module)): prefix_cache(attached.past)}

        hook = self.model.base_model.register_forward_pre_hook(give, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    # ---- answers

    def label_rows(self, examples: Examples, indices: Int64, targets: Sequence[str]) -> LabelRows:
        """One row per example: the head scores all labels at once."""
        return LabelRows(indices, np.zeros(len(indices), np.int64), examples.lengths_of(indices), len(targets))

    def label_scores(
        self, attached: Attached, examples: Examples, rows: LabelRows, part: Int64, targets: Sequence[str]
    ) -> Tensor:
        """The logits of the head: (len(part), labels)."""
        batch = self.batch(examples, rows.example[part])
        return self.class_logits(attached, batch.ids, batch.mask).to("cpu", torch.float64)


class SentenceEncoder(Encoder):
    """An encoder that gives each text a vector, and nothing in front of its inputs.

    An example is the prompt (a question) and the target (its passage), each with the tokenizer's own special tokens.
    The vector of a text is the mean of the encoder's last hidden states, of length 1 (Reimers and Gurevych 2019, arXiv
    1908.10084, section 3).
    """

    task = "embedding"
    objective = "contrastive"
    auto_class = "AutoModel"
    task_type = "FEATURE_EXTRACTION"

    @classmethod
    def join(cls, tokenizer: Any, max_length: int, room: int = 0, truncate: bool = False) -> Join:
        """Both texts between the tokenizer's special tokens, each cut at its end."""
        text = text_of(tokenizer, max_length)

        def join(prompt: list[int], target: list[int], where: str) -> Row:
            if not prompt:
                raise UserError(f"{where}: data.prompt is empty here; leave the row out with data.where_not")
            question, passage = text(prompt), text(target)
            lost, needed = question.lost + passage.lost, max(question.needed, passage.needed)
            return Row(question.front, passage.front, lost, needed)

        return join

    @classmethod
    def may_be_new(cls, network: Any, parameter: str) -> bool:
        """The pooling layer, which is not used."""
        return parameter.startswith("pooler.")

    def vectors(self, ids: Sequence[np.ndarray]) -> Tensor:
        """The vectors of texts, as token ids with the special ones: (n, D) of length 1 on the base's device.

        Texts of like length go through the encoder together. A product's last bits depend on how many rows it has, so
        the shape of a text's batch follows from the text alone (`batch_shape`): its vector has the same bits whatever
        other texts there are.
        """
        together: dict[tuple[int, int], list[int]] = {}
        for i, one in enumerate(ids):
            together.setdefault(batch_shape(len(one), self.max_positions), []).append(i)
        vectors = torch.empty(len(ids), self.hidden_size, dtype=self.model.dtype, device=self.device)
        for (rows, length), those in together.items():
            for begin in range(0, len(those), rows):
                part = those[begin : begin + rows]
                vectors[part] = self._vectors([ids[i] for i in part], rows, length)
        return vectors

    def _vectors(self, texts: Sequence[np.ndarray], rows: int, length: int) -> Tensor:
        """The vectors (n, D) of n texts, from a batch of this shape; what texts do not fill, the last one does."""
        filled = [*texts, *[texts[-1]] * (rows - len(texts))]
        batch = np.full((rows, length), self.pad_id, np.int64)
        for row, text in zip(batch, filled, strict=True):
            row[: len(text)] = text
        lengths = np.array([len(text) for text in filled])
        mask = (np.arange(length) < lengths[:, None]).astype(np.int64)
        inputs = {"input_ids": batch, "attention_mask": mask}
        if takes(self.model, "token_type_ids"):
            inputs["token_type_ids"] = np.zeros_like(batch)
        with torch.no_grad():
            hidden = self.model(**{n: kernels.on_device(v, self.device) for n, v in inputs.items()}).last_hidden_state
        means = torch.stack([hidden[i, : len(text)].mean(dim=0) for i, text in enumerate(texts)])
        return torch.nn.functional.normalize(means, dim=1)


def batch_shape(length: int, limit: int | None) -> tuple[int, int]:
    """The rows and columns of the batch for a text of `length` tokens; `limit` is how many the encoder reads.

    Every row of a batch of several ends in padding: where nothing is padded, transformers leaves the mask out, and
    attention takes another kernel. A long text is alone: more rows make its products no faster.
    """
    columns = (length // _STEP + 1) * _STEP
    if length > _LONGEST or (limit is not None and columns > limit):
        return 1, length
    return _ROWS, columns


def _is_unnamed(names: Mapping[int, str]) -> bool:
    """Whether these are the names that transformers gives to classes without one."""
    return all(name == f"LABEL_{row}" for row, name in names.items())


def _listed(names: Sequence[str]) -> str:
    shown = [name or "(empty)" for name in names[:6]]
    return ", ".join(shown) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def _in_backbone(network: Any, path: str) -> bool:
    return path.startswith(f"{network.base_model_prefix}.")
