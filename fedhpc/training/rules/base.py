"""What a rule of the local steps is: it changes the gradients of a block before the optimizer takes its step."""

from __future__ import annotations

from abc import ABC, abstractmethod

from fedhpc.lazy import Tensor
from fedhpc.methods.base import Method
from fedhpc.training.local import LocalTraining


class Rule(ABC):
    """One change to the gradients of all clients of a block."""

    @classmethod
    @abstractmethod
    def of(cls, local: LocalTraining, start: Tensor, corrections: Tensor | None, method: Method) -> Rule | None:
        """The rule as this training asks for it; None where it does not.

        start (K, T): the parameters before the first step, which change in place afterwards. corrections (K, T): what
        is to be added to each client's gradients.
        """

    @abstractmethod
    def change(self, gradient: Tensor, parameters: Tensor) -> None:
        """Change the gradients (k, T) in place. parameters (k, T): where they were taken.

        They are of the first k clients of the block, those that take the step.
        """
