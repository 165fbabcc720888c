"""What is different where all ranks of a worker train a client together: its method changes the base that they hold."""

from __future__ import annotations

from torch import Tensor

from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.methods.base import Method
from fedhpc.objectives._preference import Preference
from fedhpc.objectives.base import Objective
from fedhpc.ranks.transport.base import Transport


def require_together(config: Config, method: Method, objective: Objective) -> None:
    """UserError where one rank alone would have to know more than its part (runtime.worker_ranks)."""
    name, ranks = config.method.name, config.runtime.worker_ranks
    if not method.can_be_divided:
        raise UserError(
            f"method.name {name} with these options changes the weights of the base, which the ranks of a worker hold "
            "together", key="runtime.worker_ranks", remedy="give 1, or a method that leaves the base as it is",
        )  # fmt: skip
    personal, contribution = config.personalization, getattr(config.federation.schedule, "contribution", None)
    refused = {
        f"mode {config.mode} keeps what a client's optimizer remembers": config.mode != "federated",
        "client.scaffold keeps control variates": config.corrects_drift,
        "client.moments needs all of what an optimizer remembers": config.exchanges_moments,
        "client.server_momentum needs all of the last round's direction": config.shares_direction,
        "personalization keeps or trains a model of each client": bool(personal.parts or personal.finetune_steps),
        "federation.schedule.contribution model needs two states of the server": contribution == "model",
        "client.proximal_metric relative needs the mean squares of whole tensors": (
            config.client.proximal_metric == "relative"
        ),
        "client.packing is tried on the whole base": config.client.packing,
        f"objective.name {config.objective.name} compares all examples of a step": objective.needs_full_steps,
        f"objective.name {config.objective.name} needs the base as it was beside what is trained": (
            isinstance(objective, Preference) and objective.has_reference
        ),
    }
    for what, given in refused.items():
        if given:
            raise UserError(
                f"method.name {name} trains a client on {ranks} ranks together, each with a part of the weights and of "
                f"the rows, and {what}", key="runtime.worker_ranks", remedy="give 1, or leave that out",
            )  # fmt: skip


def parts_on_every_rank(transport: Transport, method: Method, theta: Tensor | None, like: Tensor) -> Tensor:
    """Of theta (P,), which rank 0 has, what each rank that trains has a part of (T,); all of it on rank 0. Collective.

    like: an empty tensor of its type. A tensor at a time is sent, so no other rank ever has theta whole.
    """
    parts, layout = method.parts, method.payload
    tensors = None if theta is None else layout.views(theta)
    mine = None if parts is None else like.new_empty(method.trainable.size)
    views = {} if mine is None else method.trainable.views(mine)
    for name, shape in layout.shapes.items():
        sent = like.new_empty(shape) if tensors is None else tensors[name]
        transport.broadcast(sent)
        if parts is not None:
            views[name].copy_(parts.of(name, sent))
    result = theta if mine is None else mine
    assert result is not None  # the server alone has no parts
    return result
