"""What methods have in common that only score: no parameter is trained on a client."""

from __future__ import annotations

from typing import Any

from fedhpc import registry
from fedhpc.approaches.reads import ALWAYS, SPLITS

#: Clients train nothing, so of `server` only how scores combine is read.
READS = ALWAYS | SPLITS | {"server.aggregator", "server.preaggregator", "server.weighting"}

#: Nobody reads these, but files of runs that earlier versions began may have them: such a run must resume.
ACCEPTED = frozenset({"client.optimizer", "client.lr"})


def conflict(config: Any, objective: str) -> str | None:
    """What in the configuration does not go with a search, in one line."""
    name = config.method.name
    if config.mode == "local":
        return f"mode local: {name} searches over all clients together; use federated, or centralized for one owner"
    aggregator = config.server.aggregator
    if registry.choice("aggregators", aggregator).needs_root:
        return f"server.aggregator {aggregator} trains on the server, and {name} trains nothing: use median"
    if registry.choice("aggregators", aggregator).keeps_on_server:
        return f"server.aggregator {aggregator} goes on from the last round, and {name} scores others: use median"
    if registry.choice("aggregators", aggregator).needs_movements:
        return f"server.aggregator {aggregator} weighs local steps, and {name} has none: use mean or median"
    if registry.choice("aggregators", aggregator).updates_only:
        return (
            f"server.aggregator {aggregator} is of updates of parameters, and {name} sends scores: use mean or median"
        )
    if objective != "loss" and config.data.label is None:
        return f"method.objective {objective} needs data.label (a column)"
    if config.model.task in ("classification", "seq2seq"):
        return f"model.task {config.model.task}: {name} scores answers of a decoder-only model: use causal_lm"
    return None
