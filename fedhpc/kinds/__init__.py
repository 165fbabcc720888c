"""Kinds of task: what differs between decoder-only language models, classifiers and encoder-decoders.

One file per kind, named as in `model.task`; the rest of the program asks `base.kind` and never which one it is.
"""

from __future__ import annotations

from typing import Any

from fedhpc import registry
from fedhpc.errors import UserError
from fedhpc.kinds.base import Kind


def choose(task: str, config: Any, model: str) -> Kind:
    """The kind that `model.task` means for a model with this transformers configuration.

    UserError where the two do not fit, or nothing fits the model.
    """
    kinds = {name: _load(name) for name in registry.names("kinds")}
    fitting = [kind for kind in kinds.values() if kind.fits(config)]
    if not fitting:
        raise UserError(
            f"model.name: '{model}' ({config.model_type}) is none of what can be trained here: "
            + "; ".join(f"{kind.needs} ({name})" for name, kind in kinds.items())
        )
    if task == "auto":
        return fitting[0]
    if kinds[task] not in fitting:
        raise UserError(
            f"model.task: {task} needs {kinds[task].needs}, but '{model}' ({config.model_type}) is "
            f"{fitting[0].needs}: leave model.task out, or choose another model"
        )
    return kinds[task]


def _load(name: str) -> Kind:
    kind: Kind = registry.load("kinds", name, "model.task").KIND
    return kind
