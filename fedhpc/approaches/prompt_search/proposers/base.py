"""A proposer makes new candidate prompts from those that did best."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from fedhpc.approaches.scoring.prompts import Candidate, Shared, Space
from fedhpc.registry import Open, Section

if TYPE_CHECKING:
    from fedhpc.models.causal_lm import CausalLM


class Proposer(ABC):
    """Makes new candidate prompts, on the server; of the clients' data it sees only what they have shared.

    A proposer is a class derived from this one, in a file of this folder or in a plugin.
    """

    Options: ClassVar[type[Section]] = Section

    def __init__(self, options: Open, space: Space, base: CausalLM) -> None:
        self.options, self.space, self.base = options, space, base

    @abstractmethod
    def propose(
        self, parents: Sequence[Candidate], shared: Sequence[Shared], count: int, draws: np.random.Generator
    ) -> list[Candidate]:
        """Propose at most `count` candidates, made from the parents, of which there is at least one.

        parents: the best first. shared: examples that clients have sent. draws: the only source of randomness.
        Candidates that were tried before, are too long or do not tell the labels apart are not used; then this is
        called again.
        """
