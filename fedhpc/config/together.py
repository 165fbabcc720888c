"""Which runs may train together in one process, their clients side by side in one forward."""

from __future__ import annotations

import json

from fedhpc import registry
from fedhpc.config.schema import Config

#: What is each run's own: what its clients draw and hold, how many take part, how far and how fast they go, and all
#: that is done to their updates and by the server.
_SECTIONS = (
    *("run", "partition", "federation", "devices", "server", "secure", "attack", "transforms", "privacy"),
    *("checkpoint", "local"),
)
_OF_CLIENT = ("lr", "epochs", "steps", "schedule", "schedule_per", "lr_min", "warmup")


def shared_settings(config: Config) -> str | None:
    """What runs must have alike to train together, as text that is equal then; None for a run that trains alone.

    It trains alone where a row of a forward cannot tell all that is its own: where more than the model goes to the
    clients, or they keep what their optimizers remember, or where it has the base or the process for itself.
    """
    alone = (
        config.mode != "federated"
        or registry.is_approach(config.method.name)
        or registry.choice("methods", config.method.name).shares_base is False
        or bool(config.beside_theta)
        or config.privacy.name == "example"
        or registry.choice("attacks", config.attack.name).changes_examples
        or config.data.label_noise > 0
        or config.runtime.worker_ranks != 1
        or bool(config.trackers)
    )
    if alone:
        return None
    shared = config.model_dump(mode="json", exclude={*_SECTIONS})
    for key in _OF_CLIENT:
        del shared["client"][key]
    return json.dumps(shared, sort_keys=True)
