"""Sentence embeddings: a frozen encoder, and a contrastive loss on pairs of a question and its passage.

An example is the prompt (a question) and the target (its passage), each with the tokenizer's own special tokens and cut
at its end where it is too long. The vector of a text is the mean of the encoder's last hidden states, of length 1
(Reimers and Gurevych 2019, arXiv 1908.10084, section 3). The loss of a pair is that of its passage against the other
passages of its client's step (InfoNCE, van den Oord et al. 2018, arXiv 1807.03748, equation 4, with in-batch negatives
as in Karpukhin et al. 2020, arXiv 2004.04906, section 3.2). A text that is the pair's own passage is no negative.

What is trained is behind the encoder, so each text goes through it once, alone: its vector depends on no other text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from inspect import signature
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhpc import registry
from fedhpc.config import Config
from fedhpc.data.tokens import Examples, Join
from fedhpc.errors import UserError
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
    special_ids,
)  # fmt: skip
from fedhpc.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from fedhpc import kernels
else:
    torch, kernels = lazy("torch"), lazy("fedhpc.kernels")

_KEPT_BYTES = 2**29  # of vectors that are kept, on every rank
TEMPERATURE = 0.05  # as all-MiniLM and its like were trained (scale 20)


@dataclass(frozen=True)
class Pairs(Batch):
    """Vectors of length 1 of questions and of their passages."""

    questions: Tensor  # (B, D)
    passages: Tensor  # (B, D)
    same: Tensor  # bool (B, B): pairs whose passages are the same text


class Embedding(Kind):
    """See the module."""

    name = "embedding"
    needs = "an encoder (BERT, RoBERTa families)"
    auto_class = "AutoModel"
    task_type = "FEATURE_EXTRACTION"
    answers = frozenset({"losses"})
    contrasts = True

    def fits(self, config: Any) -> bool:
        """Whether it is an encoder: pretrained on masked tokens, and not said to be a decoder."""
        decoder = getattr(config, "is_decoder", False) or getattr(config, "is_encoder_decoder", False)
        return in_mapping("AutoModelForMaskedLM", config) and in_mapping(self.auto_class, config) and not decoder

    def check(self, config: Config) -> None:
        """A method that trains behind the encoder, and metrics of losses."""
        if config.method.name != "retriever":
            raise UserError(
                f"model.task: embedding trains the projection of questions alone: use method.name retriever, "
                f"or another model.task with {config.method.name}"
            )
        for name in {*config.evaluation.metrics, *config.evaluation.metrics_of_test}:
            if registry.choice("metrics", name).needs not in self.answers:
                raise UserError(
                    f"evaluation.metrics: an encoder of sentences has no {name}; use loss, and method.name rag with "
                    "method.retriever for what a search with it finds"
                )

    # ---- data

    def join(self, tokenizer: Any, max_length: int) -> Join:
        """Both texts between the tokenizer's special tokens, each cut at its end."""
        before, after = special_ids(tokenizer)
        room = max_length - len(before) - len(after)

        def join(prompt: list[int], target: list[int], place: str) -> tuple[list[int], list[int]]:
            if not prompt:
                raise UserError(f"{place}: data.prompt is empty here; leave the row out with data.where_not")
            return [*before, *prompt[:room], *after], [*before, *target[:room], *after]

        return join

    def supervised(self, examples: Examples, indices: Int64) -> Int64:
        """One each: the pair."""
        return np.ones(len(indices), np.int64)

    def batch(self, base: Loaded, examples: Examples, indices: Int64) -> Pairs:
        """See the base class."""
        questions = [examples.prompt(int(i)) for i in indices]
        passages = [examples.tokens(int(i))[len(q) :] for i, q in zip(indices, questions, strict=True)]
        _, text = np.unique([hashlib.sha256(p.tobytes()).hexdigest() for p in passages], return_inverse=True)
        rows = torch.arange(len(indices), device=base.device)
        tokens = int(examples.lengths_of(indices).sum())
        return Pairs(
            questions=_kept(base, questions),
            passages=_kept(base, passages),
            same=kernels.on_device(text[:, None] == text[None, :], base.device),
            row=rows,
            supervised=np.ones(len(indices), np.int64),
            tokens=tokens,
            real_tokens=tokens,
        )

    # ---- the model

    def may_be_new(self, network: Any, parameter: str) -> bool:
        """The pooling layer, which is not used."""
        return parameter.startswith("pooler.")

    def sizes(self, config: Any) -> Sizes:
        """See the base class."""
        heads = config.num_attention_heads
        return Sizes(config.num_hidden_layers, heads, config.hidden_size // heads, config.hidden_size)

    def max_positions(self, base: Loaded) -> int | None:
        """See the base class."""
        return encoder_positions(base.model)

    def activations(self, base: Loaded, ids: Sequence[int]) -> list[Tensor]:
        """Nothing is put in front of it."""
        raise NotImplementedError("nothing can be put in front of a frozen encoder of sentences")

    # ---- training

    def num_classes(self, base: Loaded) -> int:
        """It chooses between the passages of a step, which are no classes."""
        raise NotImplementedError("an encoder of sentences has no classes")

    def predictions(self, base: Loaded, attached: Attached, batch: Any) -> Iterator[Tensor]:
        """It has no classes."""
        raise NotImplementedError("an encoder of sentences has no classes")

    def losses(self, base: Loaded, attached: Attached, batch: Pairs) -> Tensor:
        """See the base class; (B,), every pair against the passages of its own client."""
        questions, rival = batch.questions, ~batch.same
        if attached.projection is not None and attached.rows is not None:
            weight = attached.projection.to(questions.dtype)  # (K, D, D)
            own = weight if len(weight) == 1 else weight.index_select(0, attached.rows)
            questions = torch.matmul(own, questions.unsqueeze(-1)).squeeze(-1)
            questions = torch.nn.functional.normalize(questions, dim=1)
            rival = rival & (attached.rows[:, None] == attached.rows[None, :])
        scores = questions @ batch.passages.T / TEMPERATURE
        right = scores.diagonal()
        eye = torch.eye(len(scores), dtype=torch.bool, device=scores.device)
        return torch.logsumexp(scores.masked_fill(~(rival | eye), -torch.inf), dim=1) - right

    def backward(
        self, base: Loaded, attached: Attached, batch: Pairs, row_weights: Tensor, scale: float = 1.0
    ) -> Tensor:
        """See the base class."""
        losses = self.losses(base, attached, batch)
        (losses * row_weights * scale).sum().backward()
        return losses.detach()

    # ---- answers

    def label_rows(self, base: Loaded, examples: Examples, indices: Int64, targets: Sequence[str]) -> LabelRows:
        """It has no labels."""
        raise NotImplementedError("an encoder of sentences has no labels")

    def label_scores(
        self, base: Loaded, attached: Attached, examples: Examples, rows: LabelRows, part: Int64, targets: Sequence[str]
    ) -> Tensor:
        """It has no labels."""
        raise NotImplementedError("an encoder of sentences has no labels")


def embed(base: Loaded, ids: Sequence[np.ndarray]) -> Tensor:
    """The vectors of texts, as token ids with the special ones: (n, D) of length 1 on the base's device.

    A text is run alone, without padding: what it comes to has the same bits in every company. On a CPU that is quicker
    than a padded batch too.
    """
    found = []
    takes_types = "token_type_ids" in signature(base.model.forward).parameters
    with torch.no_grad():
        for one in ids:
            text = kernels.on_device(np.asarray(one, np.int64), base.device).unsqueeze(0)
            types = {"token_type_ids": torch.zeros_like(text)} if takes_types else {}
            hidden = base.model(input_ids=text, attention_mask=torch.ones_like(text), **types).last_hidden_state
            found.append(torch.nn.functional.normalize(hidden[0].mean(dim=0), dim=0))
    return torch.stack(found)


def _kept(base: Loaded, ids: Sequence[np.ndarray]) -> Tensor:
    """`embed`, with the vectors of `base.kept` where they are there; (n, D) on the base's device.

    What is new is kept on the CPU, up to _KEPT_BYTES in all: the oldest goes first.
    """
    keys = [one.tobytes() for one in ids]
    found = {key: base.kept[key] for key in keys if key in base.kept}
    new = {key: one for key, one in zip(keys, ids, strict=True) if key not in found}
    if new:
        made = embed(base, list(new.values())).cpu()
        found.update(zip(new, made, strict=True))
        # Copies, since a row of `made` would hold all of it.
        base.kept.update({key: found[key].clone() for key in new})
        most = _KEPT_BYTES // made[0].nbytes
        for key in list(islice(base.kept, max(0, len(base.kept) - most))):
            del base.kept[key]
    return kernels.on_device(torch.stack([found[key] for key in keys]).numpy(), base.device)


KIND = Embedding()
