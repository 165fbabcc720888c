"""Before the first round: where the ranks work, and the approach with its inputs, agreed by all ranks.

Rank 0 loads and checks first, so that a mistake is said once and the other ranks find the cache filled.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import TypeVar

import torch

from fedhpc import registry
from fedhpc.approaches.base import AnyApproach
from fedhpc.approaches.inputs import Inputs, check_inputs, load_inputs
from fedhpc.approaches.memory import WORKER_RANKS, Room, fewest
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.models.footprint import footprint
from fedhpc.ranks.devices import device_of, memory_of
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.memory import keep_freed_memory
from fedhpc.ranks.placement import Placement, assign_gpus
from fedhpc.ranks.topology import Topology
from fedhpc.ranks.transport.base import Transport
from fedhpc.ranks.verdict import on_server
from fedhpc.results.lock import InUseError
from fedhpc.results.resume import decide

T = TypeVar("T")
_SERVER_FIRST_S = 3.0


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


def refuse_another_run(config: Config, transport: Transport, fresh: bool) -> None:
    """RefusedError where the run directory holds another run than this one. Collective; writes nothing."""

    def judge() -> None:
        with suppress(InUseError):  # a run under way can be checked, too
            decide(config, config.run_dir, fresh, wait_s=0.0)

    on_server(transport, judge)


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


def prepare(
    config: Config, transport: Transport, launch: Launch, write_cache: bool, beside: Sequence[AnyApproach] = ()
) -> AnyApproach:
    """The approach that the configuration names, with its inputs loaded and checked; no run directory is needed.

    beside: of the runs in this process whose `shared_settings` are those of this one: it shares what they have loaded.
    RefusedError on every rank where rank 0 found a mistake of the user's.
    """
    approach_class: type[AnyApproach] = registry.approach(config.method.name)
    group_size, of_workers = worker_ranks(config, transport, launch, approach_class.spreads(config))
    topology = Topology.of(transport.world_size, group_size, transport.nodes)
    if spread := topology.spread(transport.nodes):
        apart = "; ".join(", ".join(map(str, ranks)) for ranks in spread)
        line = f"runtime.worker_ranks: ranks of one worker are on several machines, layers cross the network: {apart}"
        of_workers = [*of_workers, line]
    if topology.group_size > 1 or config.model.offload != "none":
        on_server(transport, lambda: _require_workers_alone(approach_class, config))
    transport.form_groups(topology)

    def load() -> Inputs:
        known = [one.inputs for one in beside]
        return load_inputs(config, launch, topology, write_cache, approach_class.read, transport.group, known)

    inputs: Inputs | None = None
    if topology.group_size > 1:  # the server holds no layers: it cannot look at a model without the workers
        on_server(transport, lambda: check_inputs(config, launch, topology, write_cache, approach_class.read))
        inputs = load_together(transport, load)
    approach: AnyApproach | None = None

    def make(decided: Mapping[str, float]) -> AnyApproach:
        first_worker = len(beside) % topology.num_workers
        made = approach_class(
            replace(inputs or load(), decided=decided, of_workers=of_workers, first_worker=first_worker)
        )
        made.plan(1)  # clients that cannot be scheduled are refused before anything is written
        return made

    def first() -> dict[str, float]:
        nonlocal approach
        approach = make({})
        return approach.decisions

    decided = on_server(transport, first)
    return approach or make(decided)


def load_together(transport: Transport, load: Callable[[], T]) -> T:
    """Load what the ranks of a worker hold between them. Collective.

    All ranks find the same mistake, and the server's line names no rank.
    """
    try:
        return load()
    except UserError:
        time.sleep(0.0 if transport.is_server else _SERVER_FIRST_S)
        raise


def worker_ranks(config: Config, transport: Transport, launch: Launch, spreads: bool) -> tuple[int, list[str]]:
    """The ranks of each worker, and what is to be said of them. Collective.

    spreads: whether they may hold the base between them, by what is done with it.
    `runtime.worker_ranks: auto` is decided by the server from the memory of all ranks, before any weights are read.
    """
    asked, others = config.runtime.worker_ranks, transport.world_size - 1
    if asked != "auto":  # a process that is alone, as --check often is, holds the base whole
        return (asked if others else 1), []
    there = transport.gather_json(memory_of(device_of(launch)))
    gpus = [gpu for gpu in launch.placement.gpus[1:] if gpu]

    def decide() -> tuple[int, str]:
        training = Topology.of(transport.world_size).training
        room = Room.of(launch.placement, training, transport.nodes, there or [])
        weights = footprint(config.model, room.device)
        if not others:
            more, why = fewest(weights, WORKER_RANKS, replace(room, sharing=1))
            return 1, f"1, since this rank is alone; of more ranks with as much memory each {more} ({why})"
        can = spreads and transport.forms_groups and not weights.few_bits
        sizes = [size for size in range(1, others + 1) if others % size == 0]
        chosen, why = fewest(weights, sizes if can and len(set(gpus)) == len(gpus) else [1], room)
        return chosen, f"{chosen} ({why})"

    chosen, why = on_server(transport, decide)
    if chosen == 1:
        keep_freed_memory()
    return chosen, [f"runtime.worker_ranks: auto takes {why}"]


def _require_workers_alone(approach: type[AnyApproach], config: Config) -> None:
    """UserError where more than the workers' clients would train."""
    if approach.server_trains and config.model.offload != "none":
        raise UserError(
            f"method.name {config.method.name} trains models of its own beside the base",
            key="model.offload", remedy="take it out",
        )  # fmt: skip
    if approach.server_trains:
        raise UserError(
            f"method.name {config.method.name} lets the server train, which holds no layers where the ranks of a "
            "worker hold the base together", key="runtime.worker_ranks", remedy="give 1",
        )  # fmt: skip
