"""Contrastive: a question's passage against the other passages of its client's step.

InfoNCE (van den Oord et al. 2018, arXiv 1807.03748, equation 4) with in-batch negatives (Karpukhin et al. 2020, arXiv
2004.04906, section 3.2). A text that is the pair's own passage is no negative.

What is trained is behind the encoder, so each text goes through it once; its vector depends on no other text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np

from fedhpc import registry
from fedhpc.config import Config
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.models.base import Attached, Base, Batch
from fedhpc.models.encoder import SentenceEncoder
from fedhpc.objectives.base import Int64, Objective
from fedhpc.registry import Open

CACHED_BYTES = 2**29  # of vectors, on every rank
TEMPERATURE = 0.05  # as all-MiniLM and its like were trained (scale 20)


@dataclass(frozen=True)
class Pairs(Batch):
    """Vectors of length 1 of questions and of their passages."""

    questions: Tensor  # (B, D)
    passages: Tensor  # (B, D)
    rivals: Tensor  # bool (B, B): passages that a question has to be told from, and its own


class Contrastive(Objective):
    """The negative log-likelihood of a question's own passage among those of its client's step.

    The vectors of texts are cached, since the encoder is frozen.
    """

    tasks = frozenset({"embedding"})
    needs_full_steps = True

    def __init__(self, options: Open | None = None, precision: str = "float32") -> None:
        super().__init__(options, precision)
        self._cache: dict[bytes, Tensor] = {}  # token ids -> vector, on the CPU

    def check(self, config: Config, model: type[Base]) -> None:
        """A method that trains behind the encoder, and metrics of losses."""
        if config.method.name != "retriever":
            raise UserError(
                f"model.task: embedding trains the projection of questions alone: use method.name retriever, "
                f"or another model.task with {config.method.name}"
            )
        for name in {*config.evaluation.metrics, *config.evaluation.metrics_of_test}:
            if registry.choice("metrics", name).needs not in model.answers:
                raise UserError(
                    f"evaluation.metrics: an encoder of sentences has no {name}; use loss, and method.name rag with "
                    "method.retriever for what a search with it finds"
                )

    def num_supervised(self, examples: Examples, indices: Int64) -> Int64:
        """One each: the pair."""
        return np.ones(len(indices), np.int64)

    def batch(self, base: SentenceEncoder, examples: Examples, indices: Int64, clients: Int64 | None = None) -> Pairs:
        questions = [examples.prompt(int(i)) for i in indices]
        passages = [examples.target(int(i)) for i in indices]
        _, text = np.unique([hashlib.sha256(p.tobytes()).hexdigest() for p in passages], return_inverse=True)
        rivals = (text[:, None] != text[None, :]) | np.eye(len(indices), dtype=bool)
        if clients is not None:
            rivals &= clients[:, None] == clients[None, :]
        tokens = int(examples.lengths_of(indices).sum())
        return Pairs(
            questions=self.vectors(base, questions),
            passages=self.vectors(base, passages),
            rivals=kernels.on_device(rivals, base.device),
            row=torch.arange(len(indices), device=base.device),
            supervised=np.ones(len(indices), np.int64),
            tokens=tokens,
            real_tokens=tokens,
        )

    def losses(self, base: SentenceEncoder, attached: Attached, batch: Pairs) -> Tensor:
        """(B,), every pair against the passages of its own client."""
        questions = batch.questions if attached.questions is None else attached.questions(batch.questions)
        scores = questions @ batch.passages.T / TEMPERATURE
        right = scores.diagonal()
        return torch.logsumexp(scores.masked_fill(~batch.rivals, -torch.inf), dim=1) - right

    def vectors(self, base: SentenceEncoder, ids: Sequence[np.ndarray]) -> Tensor:
        """The vectors of texts, from the cache where they are there: (n, D) on the base's device.

        New ones are cached on the CPU, up to CACHED_BYTES in all: the oldest goes first.
        """
        keys = [one.tobytes() for one in ids]
        vectors = {key: self._cache[key] for key in keys if key in self._cache}
        new = {key: one for key, one in zip(keys, ids, strict=True) if key not in vectors}
        if new:
            made = base.vectors(list(new.values())).cpu()
            vectors.update(zip(new, made, strict=True))
            # Copies, since a row of `made` would hold all of it.
            self._cache.update({key: vectors[key].clone() for key in new})
            most = CACHED_BYTES // made[0].nbytes
            for key in list(islice(self._cache, max(0, len(self._cache) - most))):
                del self._cache[key]
        return kernels.on_device(torch.stack([vectors[key] for key in keys]).numpy(), base.device)
