"""The loss of a batch: language modelling, classification, contrastive, and what teachers hold likely.

One file per objective, with one class derived from `base.Objective`. An objective is given a base, what a method has
attached to it, and a batch; it knows nothing of hooks, rounds or ranks.
"""

from __future__ import annotations

from fedhpc import registry
from fedhpc.models.base import Base
from fedhpc.objectives.base import Objective
from fedhpc.registry import Open


def for_model(model: type[Base], options: Open | None = None) -> Objective:
    """The objective that models of this class are trained with. options: the section `objective`; None: auto."""
    name = "auto" if options is None else options.name
    objective: Objective = registry.choice("objectives", name, "objective.name").for_model(options, model)
    return objective
