"""The loss of a batch: language modelling, classification, contrastive, preferences, and soft targets of teachers.

One file per objective, with one class derived from `base.Objective`. An objective is given a base, what a method has
attached to it, and a batch; it knows nothing of hooks, rounds or ranks.
"""

from __future__ import annotations

from fedhpc import registry
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.models.base import Base
from fedhpc.objectives.base import Objective
from fedhpc.registry import Open


def for_model(model: type[Base], options: Open | None = None, precision: str = "float32") -> Objective:
    """The objective that models of this class are trained with, in forward passes of a precision.

    options: the section `objective`; None: auto.
    """
    name = "auto" if options is None else options.name
    chosen = registry.choice("objectives", name, "objective.name")
    objective: Objective = chosen.for_model(options, model, precision)
    return objective


def of_config(config: Config, model: type[Base]) -> Objective:
    """The objective that a configuration asks for. UserError where it does not go with models, columns or metrics."""
    objective = for_model(model, config.objective, config.runtime.precision)
    name, columns = config.objective.name, ("chosen", "rejected", "desirable")
    given = {key for key in columns if getattr(config.data, key) is not None}
    for key in columns:
        if key in objective.data_keys - given:
            raise UserError(f"objective.name {name} needs data.{key}, which names a column of the data")
        if key in given - objective.data_keys:
            raise UserError(
                f"objective.name {name} does not read it", key=f"data.{key}",
                remedy="take it out, or choose another objective: dpo, ipo, orpo and simpo read data.chosen and "
                "data.rejected, kto data.desirable",
            )  # fmt: skip
    objective.check(config, model)
    return objective
