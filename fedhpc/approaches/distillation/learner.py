"""Models that learn from knowledge and give knowledge: the student of the server, and those of groups of clients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from fedhpc.approaches.distillation.alignment import Alignment
from fedhpc.approaches.distillation.knowledge import (
    Knowledge,
    num_classes,
    position_offsets,
    predict,
    token_texts,
)
from fedhpc.config import Config, Model
from fedhpc.data import Data
from fedhpc.data.tokens import Examples
from fedhpc.methods import make_method, require_layers
from fedhpc.methods.base import Method
from fedhpc.models.base import Predictor
from fedhpc.models.load import check_tokens, load_base
from fedhpc.objectives.base import PredictedObjective
from fedhpc.objectives.soft_targets import SoftTargets
from fedhpc.rng import generator, torch_seed
from fedhpc.training.block import Trained, Work, train_block
from fedhpc.training.local import LocalTraining

_GOLDEN = 0.6180339887498949  # its multiples, modulo 1, are spread evenly however many there are


class Learner:
    """A model that is trained on the public set: a base, the method that trains it, and the set in its tokens."""

    def __init__(self, config: Config, method: Any, data: Data, base: Predictor, objective: PredictedObjective) -> None:
        """config: of the run. method: the options of this learner's method, which may differ from the run's."""
        self.config, self.data, self._method, self._base = config, data, method, base
        self.objective = objective

    @property
    def base(self) -> Predictor:
        """The frozen base model."""
        return self._base

    @cached_property
    def method(self) -> Method:
        """The method, which defines the trained parameters."""
        method = make_method(self._method, self.base, self.config.run.seed, self.config.data.max_length)
        if self.config.client.layer_lr_decay != 1.0:
            require_layers(method)
        return method

    @property
    def public(self) -> Examples:
        """The public set in this learner's tokens."""
        assert self.data.public is not None
        return self.data.public

    @cached_property
    def initial(self) -> Tensor:
        """The payload before any training (P,), on the CPU."""
        dtype = self.base.payload_dtype
        return self.method.payload.flatten({name: t.to(dtype) for name, t in self.method.initial().items()})

    def learn(
        self,
        payloads: Tensor,
        clients: Sequence[int],
        knowledge: Knowledge | None,
        learning: Any,
        round_: int,
        rounds: int,
        fit: int | None = None,
    ) -> Trained:
        """Train K models from `payloads` (K, P) on the public set, to predict `knowledge`, or its targets if None.

        learning: the section `distil` or `digest` of the method's options. clients: the clients whose random draws the
        models use. fit: as in `LocalTraining.of`.
        """
        options, examples = self.config.method, self.public
        objective: PredictedObjective = self.objective
        if knowledge is not None:
            objective = SoftTargets(
                objective,
                knowledge.index,
                knowledge.probability,
                position_offsets(objective, examples),
                options.temperature,
                options.hard_weight,
            )
        local = LocalTraining.of(self.config, round_, rounds, fit)
        local = replace(
            local,
            lr=local.lr if learning.lr is None else learning.lr,
            batch_size=learning.batch_size or local.batch_size,
            gradient_accumulation_steps=1,
            epochs=learning.epochs,
            steps=None,
            seed=torch_seed(self.config.run.seed, "public set"),  # other draws than those on private data
        )
        works = [Work(c, np.arange(len(examples))) for c in clients]
        return train_block(self.base, self.method, objective, payloads, works, examples, local)

    def knowledge(self, payloads: Tensor) -> list[Knowledge | None]:
        """The knowledge of the models `payloads` (K, P) on the public set; None for one that is not finite."""
        options, classes = self.config.method, num_classes(self.base)
        return predict(
            self.base,
            self.method,
            self.objective,
            payloads,
            self.public,
            classes,
            classes if options.top_k is None else min(options.top_k, classes),
            options.temperature,
            self.config.evaluation.batch_size,
            self.config.runtime.precision,
            confident=options.aggregation == "entropy",
        )


class LearnerGroup(Learner):
    """The model of a group of clients with the same base and method; its base is loaded when it is first needed."""

    def __init__(self, config: Config, model: Model, method: Any, data: Data | None, server: Learner) -> None:
        """data: in the group's tokens; None where these are the server's.

        model: the section `model` of the group; if it is that of the run, the group shares the server's base.
        """
        super().__init__(config, method, data or server.data, server.base, server.objective)
        self.model, self.server = model, server
        #: Whether the group's tokens differ from the server's; labels are the same for all.
        self.aligned = data is not None and server.base.has_target

    @cached_property
    def base(self) -> Predictor:
        """The group's base; the server's where the models are the same."""
        if self.model == self.config.model:
            return self.server.base
        names = self.data.train.label_names
        base = load_base(self.model, self.server.base.device, names, self.config.run.seed)
        assert isinstance(base, Predictor)
        for split, examples in self.data.splits.items():
            check_tokens(base, examples, split)
        return base

    @cached_property
    def upwards(self) -> Alignment:
        """The translation from the group's tokens to the server's."""
        group_texts, server_texts = self._texts
        return Alignment(self.objective, self.public, group_texts, self.server.public, server_texts)

    @cached_property
    def downwards(self) -> Alignment:
        """The translation from the server's tokens to the group's."""
        group_texts, server_texts = self._texts
        return Alignment(self.objective, self.server.public, server_texts, self.public, group_texts)

    @property
    def _texts(self) -> tuple[list[str], list[str]]:
        return token_texts(self.base.tokenizer), token_texts(self.server.base.tokenizer)

    def from_server(self, knowledge: Knowledge) -> Knowledge:
        """Translate the server's knowledge into the group's tokens."""
        return self.downwards(knowledge, knowledge.index.shape[1]) if self.aligned else knowledge

    def knowledge_for_server(self, payloads: Tensor, k: int) -> list[Knowledge | None]:
        """The knowledge of the models `payloads` (K, P) in the server's tokens, with k classes per position."""
        ours = self.knowledge(payloads)
        return [None if one is None else self.upwards(one, k) for one in ours] if self.aligned else ours


def group_of(shares: Sequence[float], seed: int, client: int) -> int:
    """The group of a client. Of any range of client numbers, groups have their shares to within one or two clients."""
    point = (generator(seed, "groups").random() + client * _GOLDEN) % 1.0
    bounds = np.cumsum(shares) / np.sum(shares)
    return min(int(np.searchsorted(bounds, point, side="right")), len(shares) - 1)
