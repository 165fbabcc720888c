"""What methods have in common that only score: no parameter is trained on a client."""

from __future__ import annotations

from typing import Any

from fedhpc import registry


def conflict(config: Any, objective: str) -> str | None:
    """What in the configuration does not go with a search, in one line."""
    name = config.method.name
    if config.mode == "local":
        return f"mode local: {name} searches over all clients together; use federated, or centralized for one owner"
    given = [
        key
        for key, value in (
            ("client.scaffold", config.client.scaffold),
            ("transforms", config.transforms),
            ("personalization", config.personalization.parts or config.personalization.finetune_steps),
            ("evaluation.client_fraction", config.evaluation.client_fraction),
        )
        if value
    ]
    if given:
        return f"{given[0]}: {name} trains no parameters on a client; take it out"
    if config.server.optimizer != "sgd" or config.server.lr != 1.0:
        return f"server.optimizer and server.lr are about averaged parameters, which {name} has none of: take them out"
    aggregator = config.server.aggregator
    if registry.choice("aggregators", aggregator).needs_movements:
        return f"server.aggregator {aggregator} weighs local steps, and {name} has none: use mean or median"
    if objective != "loss" and config.data.label is None:
        return f"method.objective {objective} needs data.label (a column)"
    if config.model.task in ("classification", "seq2seq"):
        return f"model.task {config.model.task}: {name} scores answers of a decoder-only model: use causal_lm"
    return None
