"""What all ranks report of a round, summed on rank 0 and made into one RoundRecord.

Every client of the cohort has a row and every rank has one; each is filled by one rank, so the sum is exact in any
order, and a number that is not finite affects no other row.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import numpy as np
import torch

from fedhpc.approaches.base import AnyApproach, BlockResult
from fedhpc.participation.plan import Plan
from fedhpc.ranks.devices import peak_memory
from fedhpc.ranks.group import Account
from fedhpc.ranks.topology import Topology
from fedhpc.ranks.transport.base import Transport
from fedhpc.results.record import DROPPED, LATE, OK, REJECTED, Event, RoundRecord


class Clock:
    """Wall seconds of the phases of a round."""

    def __init__(self) -> None:
        self._seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """The phase, or a part of it, is what the block does."""
        began = time.perf_counter()
        yield
        self.add(phase, time.perf_counter() - began)

    def add(self, phase: str, seconds: float) -> None:
        """A part of a phase took so long."""
        self._seconds[phase] = self.seconds(phase) + seconds

    def seconds(self, phase: str) -> float:
        """How long a phase took; 0 where there was none."""
        return self._seconds.get(phase, 0.0)

    @property
    def total(self) -> float:
        """How long all phases took."""
        return sum(self._seconds.values())


class Stopwatch:
    """Wall seconds that a process has spent on a run, which may be one of several."""

    def __init__(self) -> None:
        self._before, self._began = 0.0, -1.0

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """What the block does is for the run."""
        self._began = time.perf_counter()
        try:
            yield
        finally:
            self._before, self._began = self.seconds, -1.0

    def add(self, seconds: float) -> None:
        """So much was for the run of what was done for several."""
        self._before += seconds

    @property
    def seconds(self) -> float:
        """All of it so far, up to now in a block that goes on."""
        return self._before + (time.perf_counter() - self._began if self._began >= 0 else 0.0)


class Before(NamedTuple):
    """What a transport had counted before a round."""

    wire_bytes: int
    gathering: Account

    @classmethod
    def of(cls, transport: Transport) -> Before:
        """What it has counted by now."""
        return cls(transport.wire_bytes, transport.account)


@dataclass(frozen=True)
class RankReport:
    """What a rank reports of a round, as numbers that are sent as float64."""

    padded_tokens: float
    seconds_local: float
    peak_memory_bytes: float
    wire_bytes: float
    clients_that_fit: float  # 0: as many as before
    examples_that_fit: float  # of a client; 0: as many as before
    seconds_waited: float  # for others of its worker, in local training
    seconds_served: float  # in which it gathered layers for others of its worker alone, once it had trained
    gathered_bytes: float  # of layers, received


@dataclass(frozen=True)
class Reports:
    """The reports of a round on rank 0: a column per field, a row per client of the cohort and per rank."""

    clients: dict[str, np.ndarray]  # float64 (C,) each; `reported` is 0 where a client sent nothing
    ranks: dict[str, np.ndarray]  # float64 (world size,) each
    expert_load: np.ndarray  # float64 (L, E): tokens sent to each routed expert

    def status(self, plan: Plan) -> np.ndarray:
        """int8 (C,): OK, DROPPED, REJECTED or LATE."""
        accepted = (self.clients["reported"] > 0) & (self.clients["reason"] == 0)
        status = np.where(accepted, OK, REJECTED).astype(np.int8)
        status[[plan.index[client] for client in plan.dropped]] = DROPPED
        status[[plan.index[client] for client in plan.late]] = LATE
        return status


def collect(
    transport: Transport, plan: Plan, results: Sequence[BlockResult[Any]], approach: AnyApproach,
    fitted: tuple[int, int], seconds_local: float, before: Before,
) -> Reports | None:  # fmt: skip
    """The reports of all ranks on rank 0, None elsewhere. Collective: one sum of float64.

    fitted: `approach.fits` before the round. before: the transport's counts at its beginning.
    """
    clients = np.zeros((len(plan.cohort), 1 + len(BlockResult.COLUMNS)))
    rows = [plan.index[client] for result in results for client in result.clients]
    if rows:
        clients[rows, 0] = 1
        for column, name in enumerate(BlockResult.COLUMNS, start=1):
            clients[rows, column] = np.concatenate([getattr(result, name) for result in results])
    ranks = np.zeros((transport.world_size, len(fields(RankReport))))
    clients_fit, examples_fit = (now if now != then else 0 for now, then in zip(approach.fits, fitted, strict=True))
    gathering = transport.account.since(before.gathering)
    load = np.zeros((0, 0) if approach.experts is None else approach.experts.counts.shape)
    for result in results:
        load += 0 if result.expert_load is None else result.expert_load
    wire_bytes = transport.wire_bytes - before.wire_bytes + clients.nbytes + ranks.nbytes + load.nbytes
    of_this_rank = RankReport(
        padded_tokens=sum(result.padded_tokens for result in results),
        seconds_local=seconds_local,
        peak_memory_bytes=peak_memory(approach.base.device),
        wire_bytes=wire_bytes if transport.world_size > 1 else 0,
        clients_that_fit=clients_fit,
        examples_that_fit=examples_fit,
        seconds_waited=gathering.waited_s,
        seconds_served=gathering.served_s,
        gathered_bytes=gathering.received_bytes,
    )
    ranks[transport.rank] = [getattr(of_this_rank, field.name) for field in fields(of_this_rank)]
    sizes, shapes = (clients.size, ranks.size, load.size), (clients.shape, ranks.shape, load.shape)
    together = torch.from_numpy(np.concatenate([clients.ravel(), ranks.ravel(), load.ravel()]))
    transport.reduce_sum(together)
    if not transport.is_server:
        return None
    parts = zip(together.split(sizes), shapes, strict=True)
    clients, ranks, load = (part.reshape(shape).numpy() for part, shape in parts)
    return Reports(
        clients={name: clients[:, i] for i, name in enumerate(("reported", *BlockResult.COLUMNS))},
        ranks={field.name: ranks[:, i] for i, field in enumerate(fields(RankReport))},
        expert_load=load,
    )


def make_record(
    approach: AnyApproach, plan: Plan, reports: Reports, clock: Clock, update_norm: float, bytes_down: int,
    bytes_up: int, evaluators: Sequence[int], spent: Mapping[str, float],
) -> RoundRecord:  # fmt: skip
    """The record of a round, before its evaluation. bytes_up: beyond what the clients report. spent: of privacy."""
    column, ranks, status = reports.clients, reports.ranks, reports.status(plan)
    ok = status == OK
    tokens = column["tokens"][ok].sum()
    # A worker may have begun a moment before rank 0 had sent all.
    waited = clock.seconds("local") + clock.seconds("reduce")
    local = min(float(ranks["seconds_local"].max()), waited)
    return RoundRecord(
        round=plan.round,
        train_loss=column["loss_sum"][ok].sum() / tokens if tokens else float("nan"),
        cohort_size=len(plan.cohort),
        completed=int(ok.sum()),
        dropped=len(plan.dropped),
        rejected=int((status == REJECTED).sum()),
        tokens=int(column["tokens"].sum()),
        padded_tokens=int(ranks["padded_tokens"].sum()),
        bytes_down=bytes_down,
        bytes_up=int(column["bytes_up"].sum()) + bytes_up,
        wire_bytes=int(ranks["wire_bytes"].sum()),
        update_norm=update_norm,
        seconds=clock.total,
        seconds_broadcast=clock.seconds("broadcast"),
        seconds_local=local,
        seconds_reduce=waited - local,
        seconds_server=clock.seconds("server"),
        # Memory of a GPU and of a server on the CPU cannot be compared.
        peak_memory_bytes=int(ranks["peak_memory_bytes"][list(evaluators)].max()),
        more={
            **spent,
            **_occupancy(approach, plan, column["steps"]),
            **_virtual(plan, ok),
            **_gathering(approach.topology, ranks),
        },
        clients=_client_columns(approach, plan, column, status),
        experts=_expert_columns(approach, plan, reports.expert_load),
        events=[*_rejections(approach, plan, column, status), *_stragglers(plan), *_memory_events(ranks)],
    )


def _client_columns(
    approach: AnyApproach, plan: Plan, column: dict[str, np.ndarray], status: np.ndarray
) -> dict[str, Any]:
    """The rows of /clients."""
    rank_of = approach.topology.rank_of
    worker = np.full(len(plan.cohort), -1)
    block = worker.copy()
    for number, one in enumerate(plan.blocks):
        rows = [plan.index[client] for client in one.clients]
        worker[rows], block[rows] = rank_of(one.worker, one.member), number

    def reported(name: str) -> np.ndarray:
        return np.where(column["reported"] > 0, column[name], np.nan)

    return {
        "round": np.full(len(plan.cohort), plan.round),
        "client_id": np.array(plan.cohort),
        "num_examples": approach.data.population.num_examples_of(plan.cohort),
        "tokens": column["tokens"],
        "steps": column["steps"],
        "loss_first": reported("loss_first"),
        "loss_last": reported("loss_last"),
        "update_norm": reported("norms"),
        "status": status,
        "worker": worker,
        "block": block,
        **approach.client_columns(plan),
        **({} if plan.times is None else {"virtual_seconds": plan.times.clients, "staleness": plan.staleness}),
    }


def _occupancy(approach: AnyApproach, plan: Plan, steps: np.ndarray) -> dict[str, float]:
    """The column of /rounds that says how full the blocks were: the steps of their clients over those that full blocks
    would have had, which go on until the client with the most steps is done. steps: (C,).
    """
    if not approach.trains_in_steps:
        return {}
    of_blocks = [steps[[plan.index[client] for client in block.clients]] for block in plan.blocks]
    room = approach.block_size * sum(of_block.max() for of_block in of_blocks)
    return {"block_occupancy": float(sum(of_block.sum() for of_block in of_blocks) / room) if room else float("nan")}


def _gathering(topology: Topology, ranks: dict[str, np.ndarray]) -> dict[str, float]:
    """The columns of /rounds of workers that are several ranks."""
    if topology.group_size == 1:
        return {}
    of = {name: float(ranks[name][list(topology.training)].sum()) for name in ranks}
    idle, total = of["seconds_waited"] + of["seconds_served"], of["seconds_local"] + of["seconds_served"]
    return {"idle_share": idle / total if total else 0.0, "gathered_bytes": int(of["gathered_bytes"])}


def _expert_columns(approach: AnyApproach, plan: Plan, load: np.ndarray) -> dict[str, np.ndarray]:
    """The rows of /experts; none where there are no experts, or nobody trained."""
    if approach.experts is None or not load.any():
        return {}
    count = load.shape[1]
    return {
        "round": np.full(load.size, plan.round),
        "layer": np.repeat(approach.experts.layers, count),
        "expert": np.tile(np.arange(count), len(load)),
        "share": (load / load.sum(axis=1, keepdims=True)).ravel(),
    }


def _virtual(plan: Plan, ok: np.ndarray) -> dict[str, float]:
    """The columns of /rounds of clients that take time; ok: bool (C,), whose updates are used."""
    if plan.times is None:
        return {}
    used = np.array(plan.staleness)[ok]
    return {
        "late": len(plan.late),
        "virtual_seconds": plan.times.round,
        "staleness": float(used.mean()) if len(used) else float("nan"),
    }


def _stragglers(plan: Plan) -> list[Event]:
    if not plan.late or plan.times is None:
        return []
    end = f"{plan.times.round:.4g} virtual seconds"
    return [Event("late", f"{len(plan.late)} of {len(plan.cohort)} clients cut off after {end}")]


def _rejections(approach: AnyApproach, plan: Plan, column: dict[str, np.ndarray], status: np.ndarray) -> list[Event]:
    title, events = approach.data.population.title, []
    for i in np.flatnonzero(status == REJECTED):
        client, reason = plan.cohort[i], approach.reasons[int(column["reason"][i])]
        why = "it has no training examples" if client in plan.empty else reason
        events.append(Event("rejected", f"{title(client)}: {why}"))
    return events


def _memory_events(ranks: dict[str, np.ndarray]) -> list[Event]:
    return [
        Event("memory", f"rank {rank}: its memory is enough for {fit:.0f} {what} train in parts")
        for column, what in (
            ("clients_that_fit", "clients at a time; larger blocks"),
            ("examples_that_fit", "examples of a client at a time; larger batches"),
        )
        for rank, fit in enumerate(ranks[column])
        if fit
    ]
