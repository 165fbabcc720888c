"""Preferences: which of two answers is better, or whether one answer is what people want.

An example has the better and the worse answer to one prompt (pairs), or one answer (`kto`), each in a row of its own.
The loss follows from the log-likelihoods of whole answers, beside those that they have without the payload. This
*reference* is the base itself, which no method changes, so that nobody needs a copy of it. It is computed once for
each answer, in a forward pass of its own, so that it has the same bits on any rank and after a resume.

Shapes: E examples, R rows, T supervised tokens of all rows.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedhpc import registry
from fedhpc.config import Config
from fedhpc.data.tokens import Examples, Spans
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.models.base import Attached, Base, Batch, Predictor, TargetBatch
from fedhpc.models.load import autocast
from fedhpc.objectives.base import Int64, Objective, through_frozen_head, through_logits
from fedhpc.registry import Open

Float64 = NDArray[np.float64]

# Metrics of losses that take them for those of tokens.
_OF_TOKENS = frozenset({"perplexity"})


class Answers(NamedTuple):
    """How likely answers are, one in each row."""

    likelihood: Tensor  # (R,): log-likelihood of the answer behind its prompt
    reference: Tensor  # (R,): the same without the payload; 0 where the objective has no reference
    tokens: Tensor  # (R,): how many tokens the answer has
    text_loss: Tensor  # (R,): mean negative log-likelihood of all supervised tokens of the row

    @property
    def ratio(self) -> Tensor:
        """The logarithm of how many times likelier the payload makes the answer (R,)."""
        return self.likelihood - self.reference

    @property
    def mean(self) -> Tensor:
        """Log-likelihood per token of the answer (R,)."""
        return self.likelihood / self.tokens

    def rows(self, part: slice) -> Answers:
        """The answers of some rows."""
        return Answers(*(values[part] for values in self))


@dataclass(frozen=True)
class AnswerBatch(Batch):
    """Answers in R rows: the first row of every example, then the second of every example."""

    texts: TargetBatch  # the R rows
    text_tokens: Tensor  # int64 (R,): supervised tokens of each row
    answer_tokens: Tensor  # int64 (R,): those among them that are of the answer
    of_answer: Tensor | None  # bool (T,): which ones these are; None: all
    reference: Tensor  # (R,): log-likelihood of each answer without the payload


class Preference(Objective):
    """A loss of the log-likelihoods of whole answers. An example counts as one supervised token."""

    tasks = frozenset({"causal_lm", "seq2seq"})
    answers = frozenset({"preferences"})

    #: Whether answers are compared with what the base alone makes of them.
    has_reference: ClassVar[bool] = True

    def __init__(self, options: Open | None = None, precision: str = "float32") -> None:
        super().__init__(options, precision)
        self._references: dict[str, Float64] = {}  # fingerprint of rows -> of each (n,), NaN where it is not yet known

    def check(self, config: Config, model: type[Base]) -> None:
        """Refuse metrics of tokens or of labels, which the loss of whole answers has none of."""
        for name in (*config.evaluation.metrics, *config.evaluation.metrics_of_test):
            if name in _OF_TOKENS or registry.choice("metrics", name).needs == "labels":
                raise UserError(
                    f"evaluation.metrics: {name} is not of preferences, as objective.name {config.objective.name} has "
                    "them; use loss, reward_accuracy, reward_margin, or metrics of written texts such as rouge_l"
                )

    def num_supervised(self, examples: Examples, indices: Int64) -> Int64:
        """One each: the preference."""
        return np.ones(len(indices), np.int64)

    @abstractmethod
    def batch(self, base: Predictor, examples: Examples, indices: Int64, clients: Int64 | None = None) -> AnswerBatch:
        """The answers of the examples `indices` (E,)."""

    @abstractmethod
    def outcome(self, answers: Answers, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        """The loss of each example, and how much higher the reward of the better answer is: (E,) each.

        answers: of the R rows of the batch.
        """

    def answers_in(
        self, base: Predictor, rows: Examples, indices: Int64, reference: Tensor, wider: Examples | None = None
    ) -> AnswerBatch:
        """The batch of the rows `indices` (R,), two for each example, of which `reference` (R,) is known.

        wider: the same rows where more of their tokens are supervised than the answers.
        """
        texts, device, examples = base.batch(wider or rows, indices), base.device, len(indices) // 2
        of_answer = None if wider is None else kernels.on_device(_among(rows, wider, indices), device)
        return AnswerBatch(
            row=torch.arange(examples, device=device),
            supervised=np.ones(examples, np.int64),
            tokens=texts.tokens,
            real_tokens=texts.real_tokens,
            example=np.tile(np.arange(examples), 2),
            texts=texts,
            text_tokens=kernels.on_device(texts.supervised.astype(np.int64), device),
            answer_tokens=kernels.on_device(rows.num_supervised(indices), device),
            of_answer=of_answer,
            reference=reference,
        )

    def reference(self, base: Predictor, rows: Examples, indices: Int64) -> Tensor:
        """Log-likelihoods (R,) of the rows `indices` without the payload; those that are not yet known are computed."""
        if not self.has_reference:
            return torch.zeros(len(indices), dtype=base.payload_dtype, device=base.device)
        known = self._references.setdefault(rows.fingerprint, np.full(len(rows), np.nan))
        new = np.unique(indices[np.isnan(known[indices])])
        if len(new):
            known[new] = -torch.cat([self.sums(base, rows, one) for one in np.split(new, len(new))]).cpu().numpy()
        return kernels.on_device(known[indices], base.device, base.payload_dtype)

    def sums(self, base: Predictor, rows: Examples, indices: Int64) -> Tensor:
        """Losses of the rows `indices` (R,) without the payload, summed over the tokens of each: float64 (R,)."""
        with torch.no_grad(), autocast(base, self.precision):
            texts = base.batch(rows, indices)
            losses = _token_losses(base, Attached(), base.states(Attached(), texts), texts)
        return _summed(losses.double(), kernels.on_device(texts.supervised.astype(np.int64), base.device))

    def losses(self, base: Predictor, attached: Attached, batch: AnswerBatch) -> Tensor:
        return self.measured(base, attached, batch)[0]

    def measured(self, base: Predictor, attached: Attached, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        """Losses and margins of the examples of a batch: (E,) each (see `outcome`)."""
        states = base.states(attached, batch.texts)
        return self._outcome(_token_losses(base, attached, states, batch.texts), batch)

    def backward(
        self, base: Predictor, attached: Attached, batch: AnswerBatch, row_weights: Tensor, scale: float = 1.0
    ) -> Tensor:
        """Backpropagate through the losses of tokens, each by as much as its answer's likelihood counts."""
        texts, head = batch.texts, base.frozen_head(attached)
        states = base.states(attached, texts)
        detached, gradient = states.detach(), None
        with torch.no_grad():
            if head is None:
                of_tokens = _token_losses(base, attached, detached, texts)
            else:
                ones = detached.new_ones(len(detached))
                of_tokens, gradient = through_frozen_head(detached, head, texts.targets, ones)
        of_tokens.requires_grad_()
        losses = self._outcome(of_tokens, batch)[0]
        (losses * row_weights.index_select(0, batch.row) * scale).sum().backward()
        weights = of_tokens.grad
        assert weights is not None
        if gradient is None:

            def losses_of(logits: Tensor, piece: slice) -> Tensor:
                return _cross_entropy(logits, texts.targets[piece])

            through_logits(base, attached, states, texts.row, losses_of, weights)
        else:
            states.backward(gradient * weights.unsqueeze(1))
        return losses.detach()

    def _outcome(self, of_tokens: Tensor, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        """The `outcome` by the losses of all supervised tokens (T,)."""
        texts = _summed(of_tokens, batch.text_tokens)
        answers = texts if batch.of_answer is None else _summed(of_tokens * batch.of_answer, batch.text_tokens)
        reference = batch.reference.to(answers.dtype)
        return self.outcome(Answers(-answers, reference, batch.answer_tokens, texts / batch.text_tokens), batch)


class PairPreference(Preference):
    """A loss of the better and the worse of two answers to one prompt."""

    data_keys = frozenset({"chosen", "rejected"})

    #: Whether the loss of the better answer's row is over its prompt too.
    reads_prompt: ClassVar[bool] = False

    @abstractmethod
    def rewards(self, answers: Answers) -> Tensor:
        """The reward that the model gives each answer (E,)."""

    @abstractmethod
    def losses_of(self, chosen: Answers, rejected: Answers) -> Tensor:
        """The loss of each pair (E,)."""

    def batch(self, base: Predictor, examples: Examples, indices: Int64, clients: Int64 | None = None) -> AnswerBatch:
        rows = examples.pairs
        if rows is None:
            raise ValueError("these examples are no pairs of answers")
        both = np.concatenate([2 * indices, 2 * indices + 1])
        wider = _with_prompts(rows) if self.reads_prompt and base.one_text else None
        return self.answers_in(base, rows, both, self.reference(base, rows, both), wider)

    def outcome(self, answers: Answers, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        half = len(answers.tokens) // 2
        chosen, rejected = answers.rows(slice(half)), answers.rows(slice(half, None))
        return self.losses_of(chosen, rejected), self.rewards(chosen) - self.rewards(rejected)


def _token_losses(base: Predictor, attached: Attached, states: Tensor, texts: TargetBatch) -> Tensor:
    """The cross-entropies (T,) of the targets of `texts`, by the states (T, D) that predict them."""
    return torch.cat(
        [
            _cross_entropy(base.logits(attached, states, texts.row, piece), texts.targets[piece])
            for piece in base.pieces(len(states))
        ]
    )


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


def _summed(of_tokens: Tensor, lengths: Tensor) -> Tensor:
    """The sums (R,) of what the tokens of each row have, one row after the other (T,)."""
    return torch.segment_reduce(of_tokens, "sum", lengths=lengths, unsafe=True)  # else it would wait for the device


def _with_prompts(rows: Examples) -> Examples:
    """Rows of pairs in which all of the better answer's row is supervised."""
    lengths, spans = rows.prompt_lengths.copy(), rows.spans
    lengths[::2] = 0
    if spans is not None:
        row = np.repeat(np.arange(len(rows)), np.diff(spans.offsets))
        stays, better = row % 2 == 1, np.arange(0, len(rows), 2)
        order = np.argsort(np.concatenate([row[stays], better]), kind="stable")
        counts = np.bincount(row[stays], minlength=len(rows))
        counts[::2] = 1
        starts = np.concatenate([spans.starts[stays], np.zeros(len(better), np.int32)])[order]
        ends = np.concatenate([spans.ends[stays], rows.lengths[::2].astype(np.int32)])[order]
        spans = Spans(np.concatenate([[0], np.cumsum(counts)]), starts, ends)
    return replace(rows, prompt_lengths=lengths, spans=spans)


def _among(rows: Examples, wider: Examples, indices: Int64) -> NDArray[np.bool_]:
    """Which supervised tokens of `wider` are supervised in `rows` too: bool (T,)."""
    (row, position), (row_wider, position_wider) = rows.supervised(indices), wider.supervised(indices)
    width = int(rows.lengths_of(indices).max()) + 1
    return np.isin(row_wider * width + position_wider, row * width + position)
