"""SCAFFOLD: local gradients corrected for the drift of the clients (Karimireddy et al. 2020, arXiv 1910.06378).

Algorithm 1 with option II. Every client keeps a control variate c_i, the server their mean c over the population:

    local step k    d_k = g_i(y) - c_i + c, which the client optimizer is given as its gradient (SGD: y <- y - lr_k d_k)
    client          c_i+ = c_i - c + sum_k lr_k d_k / sum_k lr_k
    server          c <- c + 1/N sum over the clients of the round of (c_i+ - c_i)

So c_i+ is the mean of the client's gradients of the round by their learning rates, whatever the optimizer makes of
them. With plain SGD the sum of lr_k d_k is theta_t - theta_i, as in the paper; other optimizers have it added up. AdamW
is given d_k before its moments, as Adam in FAdamGC (Chen et al. 2025, arXiv 2502.02727). A client that was never
sampled has c_i = 0. Both ways a client exchanges twice the payload.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import numpy as np

from fedhpc.lazy import Tensor
from fedhpc.methods.base import Method
from fedhpc.training.auxiliary import Exchanged
from fedhpc.training.local import LocalTraining
from fedhpc.training.rules.base import Rule

_CONTROL = "control"  # its name in a client's file


class Correction(Rule):
    """Adds c - c_i to every gradient of a client (client.scaffold)."""

    def __init__(self, corrections: Tensor) -> None:
        self.corrections = corrections

    @classmethod
    def of(cls, local: LocalTraining, start: Tensor, corrections: Tensor | None, method: Method) -> Rule | None:
        return None if corrections is None else cls(corrections)

    def change(self, gradient: Tensor, parameters: Tensor) -> None:
        gradient.add_(self.corrections[: len(gradient)])


class ControlVariates(Exchanged):
    """The exchange of c and the changes of c_i, both (S,); keeps each client's c_i."""

    name = _CONTROL
    contents = "control variates"

    keeps: ClassVar[tuple[str, ...]] = (_CONTROL,)

    def initial(self, name: str) -> Tensor:
        return self.initial_vector()

    def weights(self, shares: np.ndarray, population: int) -> np.ndarray:
        return np.full(len(shares), 1.0 / population)

    def after(self, current: Tensor, total: Tensor) -> Tensor:
        return current + total


def corrections(tensors: Mapping[str, Tensor], control: Tensor) -> Tensor:
    """c - c_i (K, S) of the K clients that keep `tensors`. control (S,): c."""
    return control - tensors[_CONTROL]


def changes(control: Tensor, sums: Tensor, distance: Tensor) -> Tensor:
    """c_i+ - c_i of K clients (K, S).

    control (S,): c; sums (K, S): of lr_k d_k over a client's steps; distance (K,): of lr_k. A client whose rates are
    all 0 has not moved and learnt nothing: no change.
    """
    moved = distance.unsqueeze(1)
    return (sums / moved - control).where(moved > 0, 0.0)


def tensors_after(tensors: Mapping[str, Tensor], changes: Tensor) -> dict[str, Tensor]:
    """What the clients keep once their c_i have changed by `changes` (K, S)."""
    return {_CONTROL: tensors[_CONTROL] + changes}
