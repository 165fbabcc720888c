"""Kahneman-Tversky optimisation: single answers, desirable or not (Ethayarajh et al. 2024, arXiv 2402.01306).

Equations 7 and 8 of section 4.1. The point z0 from which gains and losses count is how far the model is from its base,
estimated within a client's step: on every prompt with the answer of the example before it, the first with the last.
It has no gradient. A step of one example has no other answer, and its z0 is 0, the least that it can be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from pydantic import Field

from fedhpc.config import Config
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.models.base import Base, Predictor
from fedhpc.models.generative import joined
from fedhpc.objectives._preference import AnswerBatch, Answers, Preference
from fedhpc.objectives.base import Int64
from fedhpc.registry import Open, Section


@dataclass(frozen=True)
class JudgedBatch(AnswerBatch):
    """The answers of E examples, then the prompt of each with another one's answer, the E mismatched rows."""

    desirable: Tensor  # bool (E,)
    client: Tensor  # int64 (E,): whose step an example is of
    shares: Tensor  # (clients, E): of the mismatched rows in the mean of each client


class KTO(Preference):
    """How much less an answer is worth than one could hope, by a value that levels off on both sides of z0."""

    class Options(Section):
        beta: float = Field(0.1, gt=0, description="how much the reward counts: the smaller, the further from the base")
        desirable_weight: float = Field(1.0, ge=0, description="weight of the loss of desirable answers")
        undesirable_weight: float = Field(1.0, ge=0, description="weight of the loss of undesirable answers")

    tasks = frozenset({"causal_lm"})
    data_keys = frozenset({"desirable"})
    needs_full_steps = True
    options: Open

    def check(self, config: Config, model: type[Base]) -> None:
        """Refuse steps of one example too, in which no answer is another one's, and chats with several answers."""
        super().check(config, model)
        if config.data.messages is not None and config.data.train_on != "last_assistant":
            raise UserError(
                f"data.train_on: {config.data.train_on}, but objective.name kto is told of the last answer of a chat "
                "whether it is desirable; use last_assistant"
            )
        if config.client.batch_size < 2:
            raise UserError(
                "client.batch_size: objective.name kto compares with other answers of a step, so it needs at least 2"
            )

    def batch(self, base: Predictor, examples: Examples, indices: Int64, clients: Int64 | None = None) -> JudgedBatch:
        if examples.desirable is None:
            raise ValueError("these examples do not say whether their answers are desirable")
        count = len(indices)
        client = np.zeros(count, np.int64) if clients is None else np.unique(clients, return_inverse=True)[1]
        prompts = [examples.prompt(int(i)) for i in indices]
        answers = [_answer(examples, int(i)) for i in indices]
        others = [answers[i] for i in _before(client)]
        longest, bos = int(examples.lengths_of(indices).max()), base.tokenizer.bos_token_id
        rows = joined(prompts + _cut(prompts, others, longest, bos), answers + others)
        known = self.reference(base, examples, indices)
        mismatched = -self.sums(base, rows, np.arange(count, 2 * count))
        batch = self.answers_in(base, rows, np.arange(2 * count), torch.cat([known, mismatched.to(known.dtype)]))
        same = np.arange(client.max() + 1)[:, None] == client
        sizes = same.sum(axis=1, keepdims=True)
        return JudgedBatch(
            **vars(batch),
            desirable=kernels.on_device(examples.desirable[indices], base.device),
            client=kernels.on_device(client, base.device),
            shares=kernels.on_device(same * (sizes > 1) / sizes, base.device, base.payload_dtype),
        )

    def outcome(self, answers: Answers, batch: AnswerBatch) -> tuple[Tensor, Tensor]:
        assert isinstance(batch, JudgedBatch)
        count = len(batch.client)
        mismatched = answers.rows(slice(count, None)).ratio.detach()
        reference_points = (batch.shares * mismatched).sum(dim=1).clamp(min=0)  # z0 of each client
        ratio, options = answers.rows(slice(count)).ratio, self.options
        gain = options.beta * (ratio - reference_points.index_select(0, batch.client))
        losses = torch.where(
            batch.desirable,
            options.desirable_weight * torch.sigmoid(-gain),
            options.undesirable_weight * torch.sigmoid(gain),
        )
        return losses, options.beta * torch.where(batch.desirable, ratio, -ratio)


def _answer(examples: Examples, example: int) -> np.ndarray:
    """The tokens of an answer; of a chat without what the template writes behind it."""
    if examples.spans is None:
        return examples.target(example)
    last = examples.spans.offsets[example + 1] - 1
    return examples.tokens(example)[examples.prompt_lengths[example] : examples.spans.ends[last]]


def _before(client: Int64) -> Int64:
    """Which example comes before each among those of its client, in a circle: int64 (E,)."""
    order = np.argsort(client, kind="stable")
    before = np.empty_like(order)
    for of_client in np.split(order, np.flatnonzero(np.diff(client[order])) + 1):
        before[of_client] = np.roll(of_client, 1)
    return before


def _cut(
    prompts: Sequence[np.ndarray], answers: Sequence[np.ndarray], longest: int, bos: int | None
) -> list[np.ndarray]:
    """Prompts that have lost their fronts, but for the bos, where prompt and answer are longer than `longest`."""
    cut = []
    for prompt, answer in zip(prompts, answers, strict=True):
        first = 1 if bos is not None and prompt[0] == bos else 0
        excess = min(max(len(prompt) + len(answer) - longest, 0), len(prompt) - max(first, 1))
        cut.append(np.concatenate([prompt[:first], prompt[first + excess :]]))
    return cut
