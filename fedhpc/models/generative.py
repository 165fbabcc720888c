"""Models that write: the targets are tokens, a label is scored by the likelihood of its text, texts are generated."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.data.encoding import encode
from fedhpc.data.tokens import Answers, Examples, Tokens, examples_from
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.models.base import Attached, Int64, LabelRows, Predictor, TargetBatch
from fedhpc.models.trial import agree


@dataclass(frozen=True)
class TokenBatch(TargetBatch):
    """A batch of texts with tokens to be predicted."""

    ids: Tensor  # int64 (B, T)
    positions: Tensor  # int64 (S,): b * T + t of the hidden state that predicts each supervised token


class Generative(Predictor):
    """A model that writes texts. Logits exist at supervised positions only."""

    answers = frozenset({"losses", "labels", "texts"})

    @classmethod
    @abstractmethod
    def answer_ids(cls, tokenizer: Any, ids: Sequence[int]) -> list[int]:
        """The supervised tokens of a target: its own `ids` and what ends (and starts) it."""

    @abstractmethod
    def with_answers(
        self, attached: Attached, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]
    ) -> Examples:
        """Each prompt with its answer as an example that fits behind what is attached."""

    @abstractmethod
    def generate(
        self, attached: Attached, prompts: Sequence[np.ndarray], max_new_tokens: int, ends: Sequence[int] = ()
    ) -> Tensor:
        """The most likely next token, again and again: int64 (B, max_new_tokens), -1 after the end.

        prompts: B non-empty arrays of token ids. A row ends at eos or one of the tokens `ends`, which is left out, or
        when the model has no positions left. Call it without gradients and with the method attached.
        """

    def text(self, ids: NDArray[Any]) -> str:
        """The text of a row that was generated, (max_new_tokens,) with -1 after the end, without blanks around it."""
        return self.decoded(ids[ids >= 0]).strip()

    def decoded(self, ids: NDArray[Any]) -> str:
        """The text of token ids, without special tokens."""
        text: str = self.tokenizer.decode(ids.tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    @property
    def num_classes(self) -> int:
        """The rows of the output layer, of which a vocabulary may leave some unused."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def label_rows(self, examples: Examples, indices: Int64, targets: Sequence[str]) -> LabelRows:
        """One row per example and label."""
        variant, ids = self._target_ids(examples, targets)
        sizes = np.array([[len(self._answer(of_label)) for of_label in of_labels] for of_labels in ids])
        example, label = np.repeat(indices, len(targets)), np.tile(np.arange(len(targets)), len(indices))
        return LabelRows(example, label, examples.prompt_lengths[example] + sizes[variant[example], label], 1)

    def label_scores(
        self, attached: Attached, examples: Examples, rows: LabelRows, part: Int64, targets: Sequence[str]
    ) -> Tensor:
        """Log-likelihood of the target (and its end) after the prompt: (len(part), 1)."""
        variant, ids = self._target_ids(examples, targets)
        prompts = [examples.prompt(int(e)) for e in rows.example[part]]
        answers = [self._answer(ids[variant[e]][c]) for e, c in zip(rows.example[part], rows.label[part], strict=True)]
        batch = self.batch(self.with_answers(attached, prompts, answers), np.arange(len(part)))
        pieces = self.pieces(len(batch.targets))
        losses = [
            torch.nn.functional.cross_entropy(logits, batch.targets[piece], reduction="none")
            for logits, piece in zip(self.predictions(attached, batch), pieces, strict=True)
        ]
        scores = torch.zeros(len(part), dtype=torch.float64)
        return -scores.index_add(0, batch.row.cpu(), torch.cat(losses).to("cpu", torch.float64)).unsqueeze(1)

    def _target_ids(self, examples: Examples, targets: Sequence[str]) -> Answers:
        """The token ids of every label's target in all variants, and which variant each example has."""
        if examples.answers is not None:
            return examples.answers
        return Answers(np.zeros(len(examples), np.int32), [encode(self.tokenizer, targets)[0]])

    def _answer(self, ids: Sequence[int]) -> np.ndarray:
        """The supervised tokens of a target."""
        return np.array(self.answer_ids(self.tokenizer, ids), np.int32)

    def require_same_logits(self, theirs: Tensor, ours: Tensor) -> None:
        """UserError where the model's own logits are not ours: losses would be silently wrong."""
        if not agree(theirs.float(), ours.float(), 1e-3):
            raise UserError(
                f"'{self.name}' ({self.model.config.model_type}) changes its logits after the output "
                "layer in a way that fedhpc does not know",
                key="model.name",
            )


def at(states: Tensor, positions: Tensor) -> Tensor:
    """Select the states (B, T, D) at `positions` (S,), given as b * T + t: (S, D)."""
    return states.flatten(0, 1).index_select(0, positions)


def joined(prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]) -> Examples:
    """Examples of prompts, each with its answer."""
    lengths = [len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)]
    ids = np.concatenate([part for pair in zip(prompts, answers, strict=True) for part in pair])
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return examples_from(Tokens(ids, offsets, np.array([len(prompt) for prompt in prompts], np.int32)))


def require_eos(tokenizer: Any) -> int:
    """The id that ends a target. UserError where the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError("its tokenizer has no end-of-text token (eos), which every target ends with", key="model.name")
    return int(tokenizer.eos_token_id)
