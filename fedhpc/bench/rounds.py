"""Measures whole rounds: what they cost beside local training, and how much faster a second worker makes them.

Ranks are processes over gloo, forked from this one, which has imported the libraries; one thread each.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc.bench import workloads
from fedhpc.bench.processes import Watched, forked, free_port, quiet
from fedhpc.bench.table import Part, Row
from fedhpc.bench.workloads import W1


def parts(repeats: int, quick: bool) -> list[Part]:
    """All parts of this file."""
    return [partial(_workers, repeats, 3 if quick else 4), partial(_zero_work, 5 if quick else 11), _default, _placed]


def _workers(repeats: int, rounds: int) -> list[Row]:
    """Compare two workers with one, and measure the share of a round that is not local training."""
    columns_of: dict[int, list[dict[str, np.ndarray]]] = {1: [], 2: []}
    with tempfile.TemporaryDirectory() as folder:
        workloads.write(W1, Path(folder), rounds)
        for _ in range(repeats):
            for workers, runs in columns_of.items():
                runs.append(_federation(Path(folder), workers + 1))
    seconds = {
        workers: [float(np.median(run["seconds"][1:] - run["seconds_eval"][1:])) for run in runs]
        for workers, runs in columns_of.items()
    }
    outside = [
        float(1 - (run["seconds_local"].sum() / (run["seconds"] - run["seconds_eval"]).sum())) for run in columns_of[2]
    ]
    gain = statistics.median(one / two for one, two in zip(seconds[1], seconds[2], strict=True))
    return [
        Row("W1 small: two workers over one, wall seconds of a round", gain, 1.9, note=f"{os.cpu_count()} cores"),
        Row("W1 small: share of a round outside local training", statistics.median(outside), 0.03, most=True, unit="%"),
    ]


def _federation(folder: Path, ranks: int) -> dict[str, np.ndarray]:
    """Run config.yaml of the folder on `ranks` ranks: the columns of /rounds, without row 0."""
    import h5py
    import torch
    import transformers

    from fedhpc import federation
    from fedhpc.approaches.prepare import prepare
    from fedhpc.ranks.launch import Launch
    from fedhpc.ranks.transport import open_transport

    config, port = workloads.read(folder / "config.yaml"), free_port()
    torch.set_num_threads(1)
    assert transformers.LlamaForCausalLM  # imported once for all ranks

    def work(rank: int) -> None:
        launch = Launch("torchrun", rank, ranks, rank, ranks, "127.0.0.1", port)
        with open_transport(launch, "torch", 600) as transport:
            approach = prepare(config, transport, launch, True)
            with quiet():
                federation.run(approach, transport, True, lambda round_: None)

    forked(ranks, work, folder / "why")
    with h5py.File(folder / "run" / "results.h5") as file:
        return {name: column[1:] for name, column in file["rounds"].items()}


def _zero_work(rounds: int) -> list[Row]:
    """Measure rounds of clients that return at once: how they grow with the cohort and with the population."""
    costs = {}
    for cohort, population in ((32, 10_000), (544, 10_000), (32, 100_000_000)):
        with tempfile.TemporaryDirectory() as folder:
            costs[cohort, population] = idle_round(Path(folder), cohort, population, rounds)
    each = (costs[544, 10_000] - costs[32, 10_000]) / 512
    registered = (costs[32, 100_000_000] - costs[32, 10_000]) / 99_990_000
    return [
        Row("a client without work", each * 1e6, 20, most=True, unit="µs", note="CPU seconds, 544 a round over 32"),
        Row(
            "a registered client",
            registered * 1e9,
            1,
            most=True,
            unit="ns",
            note="a hundred million over 10,000",
        ),
    ]


def idle_round(folder: Path, cohort: int, population: int, rounds: int) -> float:
    """CPU seconds of a round without the clients' training: plan, exact sum, server step, writing of results."""
    import torch

    from fedhpc import federation
    from fedhpc.approaches.averaging.approach import Averaging
    from fedhpc.approaches.averaging.local import Upload
    from fedhpc.approaches.base import BlockResult
    from fedhpc.approaches.inputs import load_inputs
    from fedhpc.ranks.launch import Launch
    from fedhpc.ranks.topology import Topology
    from fedhpc.ranks.transport.base import LoopbackTransport

    class Idle(Averaging):
        """An approach whose clients train nothing: every update is zero."""

        def local(self, plan: Any, clients: Sequence[int], down: Any) -> BlockResult[Upload]:
            nothing = np.zeros(len(clients))
            counts = nothing.astype(np.int64)
            updates = torch.zeros(len(clients), self.split.shared.size)
            upload, losses = Upload(updates, {}), (nothing, nothing, nothing, nothing)
            return BlockResult(tuple(clients), upload, counts, counts, counts, *losses, bytes_up=counts)

    path = workloads.write(
        W1,
        folder,
        rounds,
        method={"num_virtual_tokens": 1},
        partition={"name": "virtual", "num_clients": population, "examples_per_client": 1},
        federation={"cohort_size": cohort},
    )
    inputs = load_inputs(workloads.read(path), Launch(), Topology.of(1), False, Averaging.read)
    moments: list[float] = []
    with quiet():
        federation.run(Idle(inputs), LoopbackTransport(), True, lambda round_: moments.append(time.process_time()))
    # The first moments are the start and the initial state, and the last round evaluates. The least: other programs
    # only add to it.
    return min(b - a for a, b in pairwise(moments[1:-1]))


def _default() -> list[Row]:
    """Run the embedded default in one process by its command: its start-up and the share of its evaluations."""
    import h5py

    ends: list[float] = []

    def on_line(moment: float, line: str) -> None:
        if line.startswith("round 1/"):
            ends.append(moment)

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "fedhpc.main", f"run.dir={folder}/run"]
        with Watched([(command, os.environ)], Path(folder) / "log", on_line) as watched:
            watched.wait(600)
        with h5py.File(Path(folder) / "run" / "results.h5") as file:
            columns = {name: column[1:] for name, column in file["rounds"].items()}
    share = columns["seconds_eval"].sum() / columns["seconds"].sum()
    what = "embedded default, one process"
    return [
        Row(f"{what}: evaluation's share of rounds", float(share), 0.10, most=True, unit="%", note="loss, texts, BLEU"),
        Row(f"{what}: from the command to the first round done", ends[0] - watched.began, unit="s"),
    ]


def _placed(rounds: int = 50) -> list[Row]:
    """Measure the placement of very unequal clients: the busiest worker's tokens x steps over the mean."""
    from fedhpc import config as configuration
    from fedhpc.approaches.averaging.approach import Averaging
    from fedhpc.approaches.inputs import load_inputs
    from fedhpc.participation.blocks import resolve_block_size
    from fedhpc.participation.schedules.synchronous import Synchronous
    from fedhpc.ranks.launch import Launch
    from fedhpc.ranks.topology import Topology

    overrides = ["partition.name=quantity_skew", "partition.num_clients=200", "federation.cohort_size=64"]
    config = configuration.load(None, overrides)
    data = load_inputs(config, Launch(), Topology.of(1), False, Averaging.read).data
    block, sizes, rows = resolve_block_size(config, 64, "cpu"), data.population.sizes(), []
    for workers in (4, 8):
        busiest = []
        for round_ in range(1, rounds + 1):
            cost = dict.fromkeys(range(workers), 0.0)
            for placed in Synchronous(config, data.population, data.train, list(cost), block).plan(round_).blocks:
                cost[placed.worker] += placed.cost
            busiest.append(max(cost.values()) / statistics.mean(cost.values()))
        rows.append(
            Row(
                f"the busiest of {workers} workers over the mean, 64 unequal clients a round",
                statistics.median(busiest),
                1.10,
                most=True,
                note=f"{sizes.min()} to {sizes.max()} examples a client, block size {block}; worst {max(busiest):.3g}",
            )
        )
    return rows
