"""Soft targets: models learn from what teachers hold likely (Hinton, Vinyals and Dean 2015, arXiv 1503.02531)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.data.tokens import Examples, ranges
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.models.base import Attached, Batch, Predictor, TargetBatch
from fedhpc.objectives.base import Int32, Int64, PredictedObjective


@dataclass(frozen=True)
class SoftBatch(Batch):
    """A batch with the likeliest classes of a teacher at each of its supervised tokens."""

    examples: TargetBatch
    index: Tensor  # int64 (S, k)
    probability: Tensor  # (S, k)


class SoftTargets(PredictedObjective):
    """The distance to a teacher's probabilities at each supervised token, beside the loss of the example's target."""

    def __init__(
        self,
        labels: PredictedObjective,
        index: Int32,
        probability: NDArray[np.floating[Any]],
        offsets: Int64,
        temperature: float,
        hard_weight: float,
    ) -> None:
        """The objective on examples about which teachers have been asked.

        labels: the objective of the examples' own targets.
        index, probability: (positions, k), the likeliest classes at the supervised tokens of all examples, one example
        after the other, and softmax(logits / temperature) of the teacher there. An entry that is not needed repeats the
        first class with probability 0.
        offsets: (n + 1,); the positions of example e are offsets[e] to offsets[e + 1].
        """
        self.labels, self.index, self.probability, self.offsets = labels, index, probability, offsets
        self.temperature, self.hard_weight = temperature, hard_weight

    def num_supervised(self, examples: Examples, indices: Int64) -> Int64:
        return self.labels.num_supervised(examples, indices)

    def targets(self, examples: Examples, indices: Int64) -> Int32:
        return self.labels.targets(examples, indices)

    def batch(self, base: Predictor, examples: Examples, indices: Int64, clients: Int64 | None = None) -> SoftBatch:
        batch = base.batch(examples, indices)
        rows = ranges(self.offsets[indices], self.offsets[indices + 1])
        return SoftBatch(
            row=batch.row,
            supervised=batch.supervised,
            tokens=batch.tokens,
            real_tokens=batch.real_tokens,
            examples=batch,
            index=kernels.on_device(self.index[rows].astype(np.int64), base.device),
            probability=kernels.on_device(self.probability[rows], base.device),
        )

    def states(self, base: Predictor, attached: Attached, batch: SoftBatch) -> Tensor:
        return base.states(attached, batch.examples)

    def losses_of(self, logits: Tensor, batch: SoftBatch, piece: slice) -> Tensor:
        return soft_losses(
            logits,
            batch.examples.targets[piece],
            batch.index[piece],
            batch.probability[piece],
            self.temperature,
            self.hard_weight,
        )


def soft_losses(
    logits: Tensor, targets: Tensor, index: Tensor, probability: Tensor, temperature: float, hard_weight: float
) -> Tensor:
    """The loss (S,) of each token: (1 - w) T^2 KL(p || q) + w CE, as in section 2 of the paper.

    p are the teacher's probabilities, q is the softmax of the model's logits / T, CE the cross-entropy with the
    example's own target, w the hard_weight. Only the k likeliest classes of p are known; all others are one more class
    with the rest of the probability, in p and q alike. By the log-sum inequality this KL is never more than that of the
    whole distributions, and it is the same where k is V.

    logits (S, V), targets (S,), index and probability (S, k).
    """
    q = (logits / temperature).log_softmax(dim=-1)
    p = probability.to(q)
    losses = (torch.xlogy(p, p) - p * q.gather(-1, index)).sum(dim=-1)
    if p.shape[-1] < q.shape[-1]:
        left = (1 - p.sum(dim=-1)).clamp(min=0)  # probabilities in 16 bits may add up to a little more than 1
        others = q.scatter(-1, index, -torch.inf).logsumexp(dim=-1)
        losses = losses + torch.xlogy(left, left) - left * others
    losses = (1 - hard_weight) * temperature**2 * losses
    if hard_weight:
        losses = losses + hard_weight * torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    return losses
