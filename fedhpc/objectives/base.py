"""What an objective has to say: how examples become a batch, and what the loss of each supervised token is.

Shapes: E examples, B rows of a forward, S supervised tokens (or pairs) of a batch.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from fedhpc.config import Config
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.models.base import Attached, Base, Batch, Predictor, TargetBatch
from fedhpc.registry import Open, Section

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]

# Logits that exist at once behind a frozen output layer: on a CPU about what its cache holds.
LOGITS_AT_ONCE = {"cpu": 2**18, "cuda": 2**24}


class Objective(ABC):
    """One way to tell how well a model does on a batch.

    It belongs to one base: what it computes once per example and caches is of that base.
    """

    #: The keys beside `name`.
    Options: ClassVar[type[Section]] = Section

    #: The model.task of the models that it can be the objective of.
    tasks: ClassVar[frozenset[str]] = frozenset()

    #: The loss of a row depends on the other rows of its client's step, so they are computed together.
    needs_full_steps: ClassVar[bool] = False

    #: Whether the loss of an example is the same where it shares a row with others (`packed`).
    can_pack: ClassVar[bool] = False

    #: Which of data.chosen, data.rejected and data.desirable it needs; the others nobody reads.
    data_keys: ClassVar[frozenset[str]] = frozenset()

    #: What metrics can need beside the answers of the base model.
    answers: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, options: Open | None = None, precision: str = "float32") -> None:
        """Where options is the section `objective` of the configuration, which has the keys.

        precision: of the run's forward passes, for what is computed once per example (`runtime.precision`).
        """
        self.options, self.precision = options, precision

    @classmethod
    def for_model(cls, options: Open, model: type[Base], precision: str = "float32") -> Objective:
        """The objective of models of this class. UserError where it is for others."""
        if model.task not in cls.tasks:
            suits = f"model.task {' or '.join(sorted(cls.tasks))}" if cls.tasks else "no model.task by itself"
            raise UserError(
                f"objective.name: {options.name} is for {suits}, not {model.task}", key="objective.name",
                remedy="leave objective out, or choose another model.task",
            )  # fmt: skip
        return cls(options, precision)

    def check(self, config: Config, model: type[Base]) -> None:  # noqa: B027  most have nothing to refuse
        """UserError where the configuration asks for what this objective cannot do with such models."""

    @abstractmethod
    def num_supervised(self, examples: Examples, indices: Int64) -> Int64:
        """Supervised tokens of each example: (len(indices),). The mean over them is a client's loss of a step."""

    @abstractmethod
    def batch(self, base: Any, examples: Examples, indices: Int64, clients: Int64 | None = None) -> Batch:
        """The batch of the examples `indices` (E,), in that order, on the base's device.

        An example may have several rows, as a preference has two (Batch.example).

        clients (E,): whose each is, counted from 0; None: all of one.
        """

    def packed(self, base: Any, examples: Examples, indices: Int64, clients: Int64) -> Batch:
        """`batch` with several examples of a client in one row; of those with `can_pack`."""
        raise NotImplementedError(f"{type(self).__name__} has a row for every example")

    @abstractmethod
    def losses(self, base: Any, attached: Attached, batch: Any) -> Tensor:
        """Loss of every supervised token (S,), in at least float32."""

    def backward(self, base: Any, attached: Attached, batch: Any, row_weights: Tensor, scale: float = 1.0) -> Tensor:
        """Backpropagate sum_s row_weights[row_s] * loss_s; returns the unweighted losses (S,), detached.

        row_weights (B,). Gradients are multiplied by `scale`.
        """
        losses = self.losses(base, attached, batch)
        weights = row_weights.index_select(0, batch.row) * scale
        (losses * weights).sum().backward()
        return losses.detach()


class PredictedObjective(Objective):
    """The loss of each supervised token follows from the logits there.

    Logits exist for a piece of the tokens at a time.
    """

    @abstractmethod
    def targets(self, examples: Examples, indices: Int64) -> Int32:
        """The classes that these examples have at their supervised tokens, in order: (S,)."""

    def states(self, base: Predictor, attached: Attached, batch: Any) -> Tensor:
        """What the logits of the supervised tokens are computed from: (S, D)."""
        return base.states(attached, batch)

    @abstractmethod
    def losses_of(self, logits: Tensor, batch: Any, piece: slice) -> Tensor:
        """Loss (s,) of the tokens `piece` of the batch. logits (s, V), in at least float32."""

    def losses(self, base: Predictor, attached: Attached, batch: Batch) -> Tensor:
        states = self.states(base, attached, batch)
        pieces = base.pieces(len(states))
        return torch.cat(
            [self.losses_of(base.logits(attached, states, batch.row, piece), batch, piece) for piece in pieces]
        )

    def backward(
        self, base: Predictor, attached: Attached, batch: Any, row_weights: Tensor, scale: float = 1.0
    ) -> Tensor:
        return self._through(base, attached, self.states(base, attached, batch), batch, row_weights, scale)

    def _through(
        self, base: Predictor, attached: Attached, states: Tensor, batch: Batch, row_weights: Tensor, scale: float
    ) -> Tensor:
        """Backpropagate through the logits and then through `states`."""
        weights = row_weights.index_select(0, batch.row) * scale

        def losses_of(logits: Tensor, piece: slice) -> Tensor:
            return self.losses_of(logits, batch, piece)

        return through_logits(base, attached, states, batch.row, losses_of, weights)


class CrossEntropy(PredictedObjective):
    """The negative log-likelihood of the class at each supervised token."""

    def batch(self, base: Predictor, examples: Examples, indices: Int64, clients: Int64 | None = None) -> TargetBatch:
        return base.batch(examples, indices)

    def losses_of(self, logits: Tensor, batch: TargetBatch, piece: slice) -> Tensor:
        return torch.nn.functional.cross_entropy(logits, batch.targets[piece], reduction="none")

    def backward(
        self, base: Predictor, attached: Attached, batch: TargetBatch, row_weights: Tensor, scale: float = 1.0
    ) -> Tensor:
        states = self.states(base, attached, batch)
        head = base.frozen_head(attached)
        if head is None:
            return self._through(base, attached, states, batch, row_weights, scale)
        weights = row_weights.index_select(0, batch.row) * scale
        losses, gradient = through_frozen_head(states.detach(), head, batch.targets, weights)
        states.backward(gradient)
        return losses


def through_logits(
    base: Predictor,
    attached: Attached,
    states: Tensor,
    rows: Tensor,
    losses_of: Callable[[Tensor, slice], Tensor],
    weights: Tensor,
) -> Tensor:
    """Backpropagate sum_s weights[s] * loss_s through the logits, piece by piece, and then through `states` (S, D).

    rows (S,): the row of each state. losses_of: the losses (s,) of a piece of the tokens, by their logits (s, V).
    Returns all of them (S,), detached.
    """
    pieces = base.pieces(len(states))
    if len(pieces) == 1:
        losses = losses_of(base.logits(attached, states, rows), pieces[0])
        (losses * weights).sum().backward()
        return losses.detach()
    # Where only the output layer is trained, nothing is below it.
    leaf = states.detach().requires_grad_(states.requires_grad)
    done = []
    for piece in pieces:
        losses = losses_of(base.logits(attached, leaf, rows, piece), piece)
        (losses * weights[piece]).sum().backward()
        done.append(losses.detach())
    if leaf.grad is not None:
        states.backward(leaf.grad)
    return torch.cat(done)


def through_frozen_head(hidden: Tensor, weight: Tensor, targets: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy (S,) behind an output layer that is not trained, and its gradient, weighted, by `hidden`: (S, D).

    hidden (S, D), weight (V, D), targets int64 (S,), weights (S,). The gradient of a token's loss by its logits is its
    softmax less the target (Bridle 1990), so logits are gone again while they are still in the processor's cache.
    """
    gradient, losses = torch.empty_like(hidden), hidden.new_empty(len(hidden))
    size = max(16, LOGITS_AT_ONCE[hidden.device.type] // len(weight))
    for start in range(0, len(hidden), size):
        piece = slice(start, start + size)
        logits = hidden[piece] @ weight.mT
        logits.sub_(logits.amax(dim=-1, keepdim=True))
        target = targets[piece].unsqueeze(1)
        of_target = logits.gather(1, target)
        total = logits.exp_().sum(dim=-1, keepdim=True)
        losses[piece] = (total.log() - of_target).squeeze(1)
        scale = weights[piece].unsqueeze(1)
        torch.mm(logits.mul_(scale / total).scatter_add_(1, target, -scale), weight, out=gradient[piece])
    return losses, gradient
