"""What the server trains on its own, for an aggregator that measures updates by it (`Aggregator.needs_root`)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from fedhpc.approaches.averaging.personal import PersonalPart
from fedhpc.config import Config
from fedhpc.data import Data
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import subset
from fedhpc.methods.base import Method
from fedhpc.models.base import Base
from fedhpc.objectives.base import Objective
from fedhpc.rng import generator
from fedhpc.training.block import Work, train_block
from fedhpc.training.local import LocalTraining


class Root:
    """The server's own examples: a seeded sample of the validation examples that no round evaluates."""

    def __init__(self, config: Config, data: Data, rounds: int) -> None:
        """rounds: of the whole run, as for the clients. UserError where there are not enough examples."""
        self._config, self._examples, self._rounds = config, data.validation, rounds
        #: The number of no client, so that its draws are its own.
        self.client = data.population.num_clients
        size, wanted = len(data.validation), config.server.root_examples
        evaluated = subset(size, config.evaluation.max_examples)
        others = np.setdiff1d(np.arange(size), evaluated)
        if len(others) < wanted:
            raise UserError(
                f"{wanted} of {size} validation examples are asked for, of which the rounds evaluate {len(evaluated)}",
                key="server.root_examples",
                remedy="lower it or evaluation.max_examples, or give more validation data",
            )
        chosen = generator(config.run.seed, "root").choice(others, wanted, replace=False)
        #: Which of the validation examples they are, int64, ascending.
        self.indices: NDArray[np.int64] = np.sort(chosen)

    def update(
        self,
        base: Base,
        method: Method,
        objective: Objective,
        personal: PersonalPart,
        theta: Tensor,
        round_: int,
        fit: int | None = None,
    ) -> Tensor:
        """The update (S,) of a client with these examples, from theta (S,); it is trained on this rank.

        fit: as in `LocalTraining.of`. UserError where it diverges.
        """
        starts = personal.split.join(theta.unsqueeze(0), personal.initial_part)
        local = LocalTraining.of(self._config, round_, self._rounds, fit)
        local = replace(local, packing=self._config.client.packing)
        work = Work(self.client, self.indices)
        trained = train_block(base, method, objective, starts, [work], self._examples, local)
        update = personal.split.apart(trained.updates)[0][0]
        if not update.isfinite().all():
            raise UserError(
                f"round {round_}: what the server trains on its own diverges", key="client.lr", remedy="lower it"
            )
        return update
