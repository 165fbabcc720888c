"""Whether examples may share rows (client.packing): asked of the objective, the base and the method before round 1."""

from __future__ import annotations

import torch

from fedhpc.errors import UserError
from fedhpc.methods.base import Method, as_one_client
from fedhpc.models.causal_lm import CausalLM
from fedhpc.objectives.base import Objective


def require_packing(objective: Objective, method: Method, max_length: int) -> None:
    """UserError where examples in one row would not be trained as each is in a row of its own.

    max_length: tokens of the longest example.
    """
    base = method.base
    if not isinstance(base, CausalLM) or not objective.can_pack:
        what = f"model.task {base.task}" if not isinstance(base, CausalLM) else "this objective"
        raise UserError(
            f"{what} has a row for every example; decoders with the loss of a language model can share rows",
            key="client.packing", remedy="take it out",
        )  # fmt: skip
    base.check_packing(max_length)
    received = as_one_client({name: t.to(base.device, base.payload_dtype) for name, t in method.initial().items()})
    row = torch.zeros(1, dtype=torch.int64, device=base.device)
    with torch.no_grad(), method.attach(method.start(received), received, row, row) as attached:
        if attached.embeddings is not None or attached.by_position:
            reason = (
                "embeddings in front of a row"
                if attached.embeddings is not None
                else "dropout by the position in a row"
            )
            raise UserError(
                f"the method has {reason}, which several examples would share",
                key="client.packing",
                remedy="take it out",
            )
