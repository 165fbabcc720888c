"""Before the first round: where the ranks work, and the approach with its inputs, agreed by all ranks.

Rank 0 loads and checks first, so that a mistake is said once and the other ranks find the cache filled.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace

import torch

from fedhpc import registry
from fedhpc.approaches.base import AnyApproach
from fedhpc.approaches.inputs import load_inputs
from fedhpc.config import Config
from fedhpc.ranks.devices import device_of
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.placement import Placement, assign_gpus
from fedhpc.ranks.transport.base import Transport
from fedhpc.ranks.verdict import on_server
from fedhpc.results.resume import decide


def is_finished(config: Config, transport: Transport, fresh: bool) -> bool:
    """Whether the run directory holds this very run, complete; says so on rank 0. Collective.

    RefusedError where it holds another one.
    """
    finished = on_server(transport, lambda: decide(config, config.run_dir, fresh) == "finished")
    if finished and transport.is_server:
        fixed = config.method.fixes_rounds or config.privacy.fixes_rounds
        longer = "" if fixed else ", a larger federation.rounds extends it"
        print(f"{config.run_dir}: this run is finished; --fresh starts it over{longer}")
    return finished


def assign_devices(config: Config, transport: Transport, launch: Launch, gpus: Sequence[str]) -> Launch:
    """`launch` with the GPUs of all ranks, agreed by all. gpus: unique ids of those that this rank may use."""
    visible = transport.gather_json(list(gpus))
    quantized = config.model.quantize != "none"
    trains = registry.approach(config.method.name).server_trains
    chosen = on_server(transport, lambda: asdict(assign_gpus(visible or [], config.runtime.server, quantized, trains)))
    placement = Placement(tuple(chosen["gpus"]), chosen["seen"])
    # Under an MPI launcher that fedhpc.ranks.launch does not know, the transport alone knows the rank.
    launch = replace(launch, rank=transport.rank, placement=placement)
    device = device_of(launch)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    transport.use_placement(placement)
    return launch


def prepare(config: Config, transport: Transport, launch: Launch, write_cache: bool) -> AnyApproach:
    """The approach that the configuration names, with its inputs loaded and checked; no run directory is needed.

    RefusedError on every rank where rank 0 found a mistake of the user's.
    """
    approach_class: type[AnyApproach] = registry.approach(config.method.name)

    def make() -> AnyApproach:
        made = approach_class(load_inputs(config, launch, transport.world_size, write_cache, approach_class.read))
        made.plan(1)  # clients that cannot be scheduled are refused before anything is written
        return made

    approach: AnyApproach | None = None

    def first() -> None:
        nonlocal approach
        approach = make()

    on_server(transport, first)
    return approach or make()
