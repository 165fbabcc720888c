"""The loss of a batch: language modelling, classification, contrastive, and what teachers hold likely.

One file per objective, with one class derived from `base.Objective`. An objective is given a base, what a method has
attached to it, and a batch; it knows nothing of hooks, rounds or ranks.
"""

from __future__ import annotations

from fedhpc import registry
from fedhpc.models.base import Base
from fedhpc.objectives.base import Objective


def for_model(model: type[Base]) -> Objective:
    """The objective that models of this class are trained with."""
    objective: Objective = registry.choice("objectives", model.objective)()
    return objective
