"""A program of several ranks: rank 0 is the server, the others one worker that holds each base between them.

With full fine-tuning the worker trains each client together, in float64, and is compared with one rank that does.

Every rank of the worker trains clients of its own, more of them the higher the rank, on a base in one piece and on a
sharded one; the guest, rank 0, reads with both. It prints a line for each model and method; tests/test_groups.py reads
them. Arguments: how many ranks, and model/method pairs; with /offload in the way of parts that stay in host memory.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch

from fedhpc import config as configuration
from fedhpc import objectives, registry
from fedhpc.methods import with_head
from fedhpc.methods.base import Method
from fedhpc.models.load import layer_stacks
from fedhpc.models.parts import Parts
from fedhpc.models.sharding import shard
from fedhpc.ranks import fork, process
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.topology import Topology
from fedhpc.ranks.transport import open_transport
from fedhpc.training.block import Work
from tests import tiny

OPTIONS: dict[str, dict[str, Any]] = {
    "prefix": {"num_virtual_tokens": 3},
    "prompt": {"num_virtual_tokens": 3},
    "lora": {"rank": 2},
    "lora-sb": {"rank": 2, "aggregation": "sb"},
    "lora-dora": {"rank": 2, "use_dora": True},
    "lora-pissa": {"rank": 2, "init_lora_weights": "pissa"},
    "lora-eva": {"rank": 2, "init_lora_weights": "eva", "init_text": "Two quiet rooms."},
    "adapter": {"bottleneck": 4},
    "ia3": {},
    "full": {},
    "full-last": {"last_layers": 1},
    "full-bias": {"parameters": "bias"},
}
CONFIG = configuration.resolve(
    {"partition": {"name": "iid"}, "client": {"optimizer": "adamw", "lr": 0.02, "steps": 3, "batch_size": 4}}
)

# Steps of 4, 4 and 3 rows, in forwards of 2 rows a rank at most, and a last one of fewer rows than ranks.
TOGETHER = {"lr": 0.01, "epochs": 1, "steps": None, "batch_size": 4, "micro_batch": 1, "clip_norm": 0.5}
OPTIMIZERS: list[dict[str, Any]] = [
    # eps: the bias of keys has a gradient of zero, and AdamW would make steps of its rounding errors.
    {"optimizer": "adamw", "eps": 1e-5, "weight_decay": 0.1, "proximal": 0.1}, {"optimizer": "sgd", "momentum": 0.9}
]  # fmt: skip


def method_on(base: Any, name: str) -> Method:
    """The method, small."""
    cls = registry.choice("methods", name.partition("-")[0])
    return with_head(cls(cls.Options(**OPTIONS[name]), base, 0))


def learnt(base: Any, name: str, rank: int) -> torch.Tensor:
    """The updates of as many blocks of clients as the rank has, one below the other."""
    method = method_on(base, name)
    start = method.payload.flatten(method.initial()).unsqueeze(0).to(base.payload_dtype)
    examples = tiny.labelled() if base.task == "classification" else tiny.examples()
    updates = []
    for block in range(rank):
        works = [Work(10 * rank + block + i, np.arange(i, 60, 7 * rank)) for i in range(2)]
        trained = tiny.train(base, method, objectives.for_model(type(base)), start, works, examples, CONFIG)
        updates.append(trained.updates)
    return torch.cat(updates)


def learnt_together(base: Any, name: str, first: list[torch.Tensor]) -> list[tuple[Any, ...]]:
    """What one client learns with each optimizer: update, losses and tokens, of those that this rank takes.

    first: what this rank has of each parameter.
    """
    start = torch.cat([value.flatten() for value in first]).unsqueeze(0)
    method, learnt = method_on(base, name), []
    examples = tiny.labelled() if base.task == "classification" else tiny.examples()
    for number, options in enumerate(OPTIMIZERS):
        config = configuration.resolve({"partition": {"name": "iid"}, "client": {**TOGETHER, **options}})
        takes = base.parts is None or number % base.parts.size == base.parts.member
        work = Work(number, np.arange(11))
        of = tiny.train(
            base, method, objectives.for_model(type(base)), start, [work], examples, config, takes=takes
        )  # fmt: skip
        learnt.append((of.updates, of.loss_sum, of.loss_first, of.loss_last, of.tokens, of.steps) if takes else ())
    return learnt


def agree(one: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Whether two ways to train one client come to the same, but for rounding; nothing to compare is the same."""
    pairs = [(np.asarray(a), np.asarray(b)) for a, b in zip(one, other, strict=False)]
    return all(np.abs(a - b).max() <= 1e-9 * np.linalg.norm(a) and np.abs(a).max() > 0 for a, b in pairs)


def read(base: Any) -> torch.Tensor:
    with torch.no_grad():
        states: torch.Tensor = base.read_some(2, 3, 4)
    return states


def rank(launch: Launch, pairs: list[str]) -> int:
    """What one rank does."""
    torch.set_num_threads(1)
    transport = open_transport(launch, "torch", 60.0)
    transport.form_groups(Topology.of(transport.world_size, transport.world_size - 1))
    assert transport.group is not None
    for pair in pairs:
        model, name, *offload = pair.split("/")
        together = name.startswith("full")
        whole, sharded = (tiny.base(model, torch.float64 if together else torch.float32) for _ in range(2))
        layers = [layer for stack in layer_stacks(sharded.model) for layer in stack]
        shard(layers, transport.group, sharded.device, bool(offload))
        if not together:
            work = read if transport.rank == 0 else partial(learnt, name=name, rank=transport.rank)
            expected = work(whole)
            same = torch.equal(expected, work(sharded)) and bool(expected.abs().max() > 0)
        elif transport.rank:
            first = method_on(whole, name).initial()
            expected_each = learnt_together(whole, name, list(first.values()))
            parts = Parts(sharded.model, transport.group, torch.float64)
            mine = [parts.of(parameter, value) for parameter, value in first.items()]
            learnt_each = learnt_together(replace(sharded, parts=parts), name, mine)
            same = all(map(agree, expected_each, learnt_each))
        else:
            same = True
        said = transport.gather_json([same, transport.account.received_bytes])
        if said is not None:
            print(f"{pair}: {all(same for same, _ in said)}, {sum(received for _, received in said)} bytes", flush=True)
    transport.close()
    return 0


if __name__ == "__main__":
    launches = fork.launches(int(sys.argv[1]), Launch())
    sys.exit(fork.run(launches, lambda launch: process.leave(rank(launch, sys.argv[2:]))))
