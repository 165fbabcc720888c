"""auto: the objective that the model is made for, so that nobody has to name it."""

from __future__ import annotations

from fedhpc import registry
from fedhpc.models.base import Base
from fedhpc.objectives.base import Objective
from fedhpc.registry import Open


class Auto(Objective):
    """Chooses by the model: targets for language models, labels for classifiers, passages for sentence encoders."""

    @classmethod
    def for_model(cls, options: Open, model: type[Base], precision: str = "float32") -> Objective:
        chosen: Objective = registry.choice("objectives", model.objective)(options, precision)
        return chosen
