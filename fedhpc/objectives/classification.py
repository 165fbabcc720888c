"""Classification: the cross-entropy of an example's label among those of `data.label`."""

from __future__ import annotations

import numpy as np

from fedhpc import registry
from fedhpc.config import Config
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.models.base import Base
from fedhpc.objectives.base import CrossEntropy, Int32, Int64


class Classification(CrossEntropy):
    """The negative log-likelihood of an example's label, which counts as one supervised token."""

    tasks = frozenset({"classification"})

    def check(self, config: Config, model: type[Base]) -> None:
        """A column for the labels, and only metrics that a classifier has."""
        if config.data.label is None:
            raise UserError(
                f"data.label: '{config.model.name}' is trained as a classifier, which needs the column with the class "
                "of an example"
            )
        for name in {*config.evaluation.metrics, *config.evaluation.metrics_of_test}:
            if registry.choice("metrics", name).needs not in model.answers:
                raise UserError(
                    f"evaluation.metrics: {name} is of generated texts and a classifier writes none; "
                    "use loss, accuracy, macro_f1"
                )

    def num_supervised(self, examples: Examples, indices: Int64) -> Int64:
        """One each: the label."""
        return np.ones(len(indices), np.int64)

    def targets(self, examples: Examples, indices: Int64) -> Int32:
        if examples.labels is None:
            raise ValueError("these examples have no labels")
        labels: Int32 = examples.labels[indices]
        return labels
