"""What a round would take on another number of ranks, from what it took in a run of the same configuration.

The pilot's measurements are scaled, term by term:

- local training: the pilot's seconds per token of the busiest worker, times the tokens of the busiest worker once the
  same blocks are placed on N - 1 workers. There are never more workers at work than blocks.
- exchange: a tree, so ceil(log2 N) steps in place of the pilot's; unknown where the pilot had one rank. In it is what
  the workers add up of their own clients' updates, which many workers share: too long from a pilot with one worker.
- evaluation: the batches of the busiest rank.
- server: as in the pilot.
- memory of a rank: the pilot's, less the updates that its busiest worker held, plus those of the new one. So the
  server's own memory, which does not depend on N, must not be the largest by far.

It knows no network but the pilot's, no stragglers, and no ranks that share a core or a GPU unless the pilot's did.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from fedhpc.config import Config
from fedhpc.participation.blocks import assign
from fedhpc.participation.plan import Plan


class Forecastable(Protocol):
    """As much of an approach as a forecast asks for."""

    @property
    def config(self) -> Config: ...
    @property
    def data(self) -> Any: ...
    @property
    def rounds(self) -> int: ...
    def plan(self, round_: int) -> Plan: ...
    def bytes_down(self, plan: Plan) -> int: ...
    def bytes_up(self, plan: Plan) -> int: ...


_ROUNDS = 50  # plans that are looked at: enough for a mean


class Forecast(NamedTuple):
    """One round on `ranks` ranks: seconds, bytes of the busiest rank, and tokens per second over the pilot's."""

    ranks: int
    local_s: float
    exchange_s: float  # NaN: unknown
    other_s: float  # server, and its share of evaluations
    memory_bytes: float
    busy: float  # workers with a block
    held: float  # updates that the busiest worker holds

    @property
    def round_s(self) -> float:
        """All of it, without an exchange that is unknown."""
        return self.local_s + np.nan_to_num(self.exchange_s) + self.other_s


class _Load(NamedTuple):
    tokens: np.ndarray  # per round: of the busiest worker
    clients: np.ndarray  # per round: the most on one worker
    busy: float


def _load(approach: Forecastable, ranks: int, rounds: int) -> _Load:
    tokens, clients, busy = [], [], []
    workers = range(1, ranks) if ranks > 1 else range(1)
    for round_ in range(1, rounds + 1):
        blocks = approach.plan(round_).blocks
        placed = assign([b.clients for b in blocks], [b.cost for b in blocks], workers)
        cost: dict[int, float] = {}
        held: dict[int, int] = {}
        for block in placed:
            cost[block.worker] = cost.get(block.worker, 0.0) + block.cost
            held[block.worker] = held.get(block.worker, 0) + len(block.clients)
        tokens.append(max(cost.values(), default=0.0))
        clients.append(max(held.values(), default=0))
        busy.append(len(cost))
    return _Load(np.array(tokens), np.array(clients), float(np.mean(busy)))


def forecast(
    approach: Forecastable, counts: Sequence[int], pilot: Mapping[str, np.ndarray] | None, pilot_ranks: int
) -> list[Forecast]:
    """One forecast per number of ranks. pilot: the columns of /rounds of a run on `pilot_ranks`; None: no seconds."""
    config, plan = approach.config, approach.plan(1)
    rounds = min(approach.rounds, _ROUNDS)
    each = approach.bytes_up(plan) / max(len(plan.training), 1)  # of one client's update
    known = None
    if pilot is not None and len(pilot["round"]) > 1:
        known = {name: np.asarray(column[1:]) for name, column in pilot.items()}  # without the initial state
        past = _load(approach, pilot_ranks, min(len(known["round"]), rounds))
        trained = past.tokens > 0
        per_token = np.median(known["seconds_local"][: len(past.tokens)][trained] / past.tokens[trained])
        exchange = np.median(known["seconds_broadcast"] + known["seconds_reduce"])
        batches = math.ceil(
            min(config.evaluation.max_examples, len(approach.data.validation)) / config.evaluation.batch_size
        )
    forecasts = []
    for ranks in counts:
        load = _load(approach, ranks, rounds)
        local = exchanged = other = memory = math.nan
        if known is not None:
            local = float(load.tokens.mean() * per_token)
            if pilot_ranks > 1:
                exchanged = exchange * math.ceil(math.log2(ranks)) / math.ceil(math.log2(pilot_ranks))
            evaluation = known["seconds_eval"].mean() * math.ceil(batches / ranks) / math.ceil(batches / pilot_ranks)
            other = float(np.median(known["seconds_server"]) + evaluation)
            memory = float(known["peak_memory_bytes"].max() + each * (load.clients.max() - past.clients.max()))
        forecasts.append(Forecast(ranks, local, exchanged, other, memory, load.busy, each * load.clients.max()))
    return forecasts


def lines(
    approach: Forecastable, counts: Sequence[int], pilot: Mapping[str, np.ndarray] | None, pilot_ranks: int
) -> list[str]:
    """`forecast` as a table for --check."""
    down, up = approach.bytes_down(approach.plan(1)), approach.bytes_up(approach.plan(1))
    blocks = len(approach.plan(1).blocks)
    table = [
        f"forecast: {down / 2**20:.2f} MiB down and {up / 2**20:.2f} MiB up a round on any number of ranks; "
        f"{blocks} blocks in round 1, so at most {blocks} workers train at a time",
    ]
    if pilot is None:
        table.append(
            f"no times: {approach.config.run_dir} holds no run of this configuration to take them from; run a few "
            "rounds of it there (--until 3), then ask again"
        )
    table.append(
        f"{'ranks':>6} {'at work':>8} {'round':>10} {'local':>10} {'exchange':>10} {'other':>10} {'updates held':>13} "
        f"{'memory':>10}"
    )
    for row in forecast(approach, counts, pilot, pilot_ranks):
        seconds = [row.round_s, row.local_s, row.exchange_s, row.other_s]
        shown = " ".join("         -" if math.isnan(s) else f"{s:>8.3f} s" for s in seconds)
        memory = "-" if math.isnan(row.memory_bytes) else f"{row.memory_bytes / 2**20:,.0f} MiB"
        table.append(f"{row.ranks:>6} {row.busy:>8.1f} {shown} {row.held / 2**20:>9.1f} MiB {memory:>10}")
    return table
