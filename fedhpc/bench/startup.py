"""Measures what it costs to start ranks: a process for each, as a launcher starts them, or one on each node that forks.

Two nodes of four ranks. Both nodes are this machine, so what they read from disk is read once here; nodes of their own
would do so twice, in both cases.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from fedhpc.bench import workloads
from fedhpc.bench.processes import LIMIT_S, Watched, free_port
from fedhpc.bench.table import Part, Row, ratio, skipped

_NODES, _RANKS = 2, 4  # of each node
_Commands = Sequence[tuple[Sequence[str], Mapping[str, str]]]


def parts(repeats: int) -> list[Part]:
    """All parts of this file."""
    return [partial(_started, repeats), _opened]


def _started(repeats: int) -> list[Row]:
    """CPU seconds of all processes until the server has evaluated the base, just before the first round."""
    each: list[float] = []
    forked: list[float] = []
    for _ in range(repeats):
        each.append(_cpu_seconds(_a_process_each))
        forked.append(_cpu_seconds(_a_process_a_node))
    note = f"{statistics.median(forked):.1f} s with --ranks-per-node, {statistics.median(each):.1f} s without"
    what = f"{_NODES} nodes of {_RANKS} ranks: "
    return [
        Row(f"{what}CPU until the first round, forked over a process each", ratio(forked, each), 0.4, True, "", note)
    ]


def _opened() -> list[Row]:
    """How many times files are opened in the whole of a run of one round, counted by strace."""
    what = f"{_NODES} nodes of {_RANKS} ranks: files opened, forked over a process each"
    if shutil.which("strace") is None:
        return [skipped(what, "strace is not installed")]
    each, forked = _files(_a_process_each), _files(_a_process_a_node)
    return [Row(what, forked / each, 0.3, True, "", f"{forked:,} with --ranks-per-node, {each:,} without")]


def _a_process_each(config: Path) -> _Commands:
    world = _NODES * _RANKS
    return _commands(config, world, [(rank, rank % _RANKS) for rank in range(world)], _RANKS)


def _a_process_a_node(config: Path) -> _Commands:
    return _commands(config, _NODES, [(node, 0) for node in range(_NODES)], 1, "--ranks-per-node", str(_RANKS))


def _commands(config: Path, world_size: int, ranks: Sequence[tuple[int, int]], on_node: int, *more: str) -> _Commands:
    """The commands of a launcher that starts `ranks`, each with its number on its node."""
    command = [sys.executable, "-m", "fedhpc.main", str(config), *more]
    common = {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(on_node)}
    common |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [(command, {**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(local)}) for rank, local in ranks]


def _cpu_seconds(commands: Callable[[Path], _Commands]) -> float:
    began: list[float] = []

    def on_line(moment: float, line: str) -> None:
        if line.startswith("round 0/"):
            began.append(moment)

    with tempfile.TemporaryDirectory() as folder:
        config = workloads.write(workloads.W1, Path(folder), 1)
        with Watched(commands(config), Path(folder) / "log", on_line) as watched:
            watched.wait(LIMIT_S)
        return watched.cpu_at(began[0])


def _files(commands: Callable[[Path], _Commands]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        config = workloads.write(workloads.W1, Path(folder), 1)
        traced = [
            (["strace", "-f", "-qq", "-e", "trace=open,openat", "-o", f"{folder}/{i}.trace", *command], environ)
            for i, (command, environ) in enumerate(commands(config))
        ]
        with Watched(traced, Path(folder) / "log") as watched:
            watched.wait(LIMIT_S)
        lines = [
            line for file in Path(folder).glob("*.trace") for line in file.read_text(errors="replace").splitlines()
        ]
    return sum(" = -1 " not in line and "open" in line for line in lines)
