"""What kinds have in common whose loss is on the tokens of a target: logits exist at supervised positions only."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from fedhpc.data.tokens import Examples, Tokens, examples_from
from fedhpc.errors import UserError
from fedhpc.kinds._loss import frozen_head, token_losses
from fedhpc.kinds.base import Attached, Batch, Int64, Kind, LabelRows, Loaded
from fedhpc.lazy import lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

# Logits of more supervised tokens than fit in so many elements are computed and differentiated piece by piece.
_LOGITS_AT_ONCE = 2**24


@dataclass(frozen=True)
class TokenBatch(Batch):
    """A batch with a loss on tokens."""

    ids: Tensor  # int64 (B, T)
    positions: Tensor  # int64 (S,): b * T + t of the hidden state that predicts each supervised token
    targets: Tensor  # int64 (S,)


class TokenKind(Kind):
    """A kind whose model writes: the loss is on the target's tokens, a label is scored by its likelihood."""

    @abstractmethod
    def answer_ids(self, tokenizer: Any, ids: Sequence[int]) -> list[int]:
        """The supervised tokens of a target: its own `ids` and what ends (and starts) it."""

    @abstractmethod
    def hidden(self, base: Loaded, attached: Attached, batch: Any) -> Tensor:
        """Last hidden states (S, D) of the tokens that predict the supervised ones.

        Each row stands behind its own virtual positions.
        """

    @abstractmethod
    def logits(self, base: Loaded, hidden: Tensor) -> Tensor:
        """hidden (..., D) -> logits (..., vocabulary)."""

    def frozen_head(self, base: Loaded) -> Tensor | None:
        """The weight (V, D) of an output layer that is one product and not trained, in full precision, else None."""
        return None

    @abstractmethod
    def with_answers(
        self, base: Loaded, attached: Attached, prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray]
    ) -> Examples:
        """Each prompt with its answer as an example that fits behind what is attached."""

    def num_classes(self, base: Loaded) -> int:
        """The rows of the output layer, of which a vocabulary may leave some unused."""
        return int(base.model.get_output_embeddings().weight.shape[0])

    def predictions(self, base: Loaded, attached: Attached, batch: TokenBatch) -> Iterator[Tensor]:
        """See the base class."""
        selected = self.hidden(base, attached, batch)
        for piece in self._pieces(base, len(selected)):
            yield self._exact_logits(base, selected[piece])

    def losses(self, base: Loaded, attached: Attached, batch: TokenBatch) -> Tensor:
        """See the base class."""
        selected = self.hidden(base, attached, batch)
        return torch.cat([self._losses(base, selected, batch, piece) for piece in self._pieces(base, len(selected))])

    def backward(
        self, base: Loaded, attached: Attached, batch: TokenBatch, row_weights: Tensor, scale: float = 1.0
    ) -> Tensor:
        """See the base class. The logits exist for a piece of the tokens at a time."""
        selected = self.hidden(base, attached, batch)
        weights = row_weights.index_select(0, batch.row) * scale
        frozen = self.frozen_head(base) if batch.soft is None else None
        if frozen is not None:
            losses, gradient = frozen_head(selected.detach(), frozen, batch.targets, weights)
            selected.backward(gradient)
            return losses
        pieces = self._pieces(base, len(selected))
        if len(pieces) == 1:
            losses = self._losses(base, selected, batch, pieces[0])
            (losses * weights).sum().backward()
            return losses.detach()
        leaf = selected.detach().requires_grad_()
        done = []
        for piece in pieces:
            losses = self._losses(base, leaf, batch, piece)
            (losses * weights[piece]).sum().backward()
            done.append(losses.detach())
        selected.backward(leaf.grad)
        return torch.cat(done)

    def label_rows(self, base: Loaded, examples: Examples, indices: Int64, targets: Sequence[str]) -> LabelRows:
        """One row per example and label."""
        sizes = np.array([len(answer) for answer in self._answers(base, targets)])
        example, label = np.repeat(indices, len(targets)), np.tile(np.arange(len(targets)), len(indices))
        return LabelRows(example, label, examples.prompt_lengths[example] + sizes[label], 1)

    def label_scores(
        self, base: Loaded, attached: Attached, examples: Examples, rows: LabelRows, part: Int64, targets: Sequence[str]
    ) -> Tensor:
        """Log-likelihood of the target (and its end) after the prompt: (len(part), 1)."""
        candidates = self._answers(base, targets)
        prompts = [examples.prompt(int(e)) for e in rows.example[part]]
        answers = [candidates[c] for c in rows.label[part]]
        joined = self.with_answers(base, attached, prompts, answers)
        batch: Any = self.batch(base, joined, np.arange(len(part)))
        losses = self.losses(base, attached, batch).to("cpu", torch.float64)
        scores = torch.zeros(len(part), dtype=torch.float64)
        return -scores.index_add(0, batch.row.cpu(), losses).unsqueeze(1)

    def _answers(self, base: Loaded, targets: Sequence[str]) -> list[np.ndarray]:
        tokenizer = base.tokenizer
        plain = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in targets]
        return [np.array(self.answer_ids(tokenizer, ids), np.int32) for ids in plain]

    def _pieces(self, base: Loaded, tokens: int) -> list[slice]:
        """So many tokens in pieces whose logits can exist at once."""
        size = max(1, _LOGITS_AT_ONCE // self.num_classes(base))
        return [slice(start, min(start + size, tokens)) for start in range(0, max(tokens, 1), size)]

    def _exact_logits(self, base: Loaded, hidden: Tensor) -> Tensor:
        logits = self.logits(base, hidden)
        return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits

    def _losses(self, base: Loaded, selected: Tensor, batch: TokenBatch, piece: slice) -> Tensor:
        soft = batch.soft
        if soft is not None:
            soft = replace(soft, index=soft.index[piece], probability=soft.probability[piece])
        return token_losses(self._exact_logits(base, selected[piece]), batch.targets[piece], soft)

    def require_same_logits(self, base: Loaded, own: Tensor, ours: Tensor) -> None:
        """The model's own logits must equal ours, or losses would be silently wrong."""
        if not torch.allclose(own.float(), ours.float(), atol=1e-3, rtol=1e-3):
            raise UserError(
                f"model.name: '{base.name}' ({base.model.config.model_type}) changes its logits after the output "
                "layer in a way that fedhpc does not know"
            )


def at(states: Tensor, positions: Tensor) -> Tensor:
    """Those of states (B, T, D) at `positions`, b * T + t, (S,): (S, D)."""
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
        raise UserError("model.name: its tokenizer has no end-of-text token (eos), which every target ends with")
    return int(tokenizer.eos_token_id)
