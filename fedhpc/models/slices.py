"""Lets transformers load a model of which every rank holds a part, and reads that part alone.

transformers builds a model without memory, and then reads its weights, renamed and fused as the model has them. Between
the two the layers are sharded here, and of a sharded parameter it reads the rows that this rank holds, of safetensors
alone. So the ranks of a group read the files once between them, and none has the model whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch.distributed.tensor import DTensor

from fedhpc.errors import UserError

_HOOK = "maybe_distribute_model"  # which transformers calls with a model without memory, before it reads the weights


@contextmanager
def sharding_first(shard: Callable[[Any], None]) -> Iterator[dict[str, Any]]:
    """Whatever transformers loads meanwhile goes through `shard` first; gives arguments for its `from_pretrained`.

    UserError where the model has other files, or transformers has read the weights without calling it.
    """
    from transformers import PreTrainedModel
    from transformers.distributed import DistributedConfig

    sharded = []

    def take(cls: type, network: Any, *_: Any) -> Any:
        shard(network)
        _require_experts(network)
        del network.config.distributed_config  # of no meaning, and it would be saved
        sharded.append(network)
        return network

    setattr(PreTrainedModel, _HOOK, classmethod(take))
    try:
        yield {"distributed_config": DistributedConfig(), "use_safetensors": True}
    except OSError as error:
        if "safetensors" not in str(error):
            raise
        raise UserError(
            "this model has no safetensors, of which parts can be read", key="runtime.worker_ranks",
            remedy="save it anew with transformers (save_pretrained), or give 1",
        ) from error  # fmt: skip
    finally:
        delattr(PreTrainedModel, _HOOK)  # the one that it inherits is there again
    if not sharded:
        raise UserError(
            "this release of transformers reads whole models only", key="runtime.worker_ranks",
            remedy="pip install 'transformers>=5.20,<5.24'",
        )  # fmt: skip


def _require_experts(network: Any) -> None:
    """UserError where a rank would hold no expert: transformers fuses those that are stored one by one as they come."""
    for parameter in network.parameters():
        if isinstance(parameter, DTensor) and parameter.ndim == 3:
            experts, ranks = len(parameter), parameter.device_mesh.size()
            if (ranks - 1) * math.ceil(experts / ranks) >= experts:
                fitting = [n for n in range(1, ranks) if (n - 1) * math.ceil(experts / n) < experts]
                raise UserError(
                    f"{experts} experts cannot be divided among {ranks} ranks so that each holds some of them",
                    key="runtime.worker_ranks", remedy=f"use {fitting[-1]}",
                )  # fmt: skip
