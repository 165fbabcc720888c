"""Compares fedhpc with its peers, as whole programs that run in turn on the same clients, tokens and SGD steps.

The peers are Apple's pfl-research on two processes of torchrun, and the loop that one would write by hand with PEFT on
two gloo processes, both from the harness that `--peers` names. Every program trains the same sequences in the same
steps from the same initial parameters, and all must arrive at the same parameters, or no figure is given.

fedhpc runs as a server and two workers over gloo, forked from one process (`--ranks 3`). Its server, which trains
nothing, and the process that waits for the three are counted too.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from fedhpc.bench import workloads
from fedhpc.bench.processes import Watched, free_port
from fedhpc.bench.table import Part, Row, ratio, skipped
from fedhpc.bench.workloads import Workload
from fedhpc.errors import UserError, nearest

_LIMIT_S = 600.0
_ROUNDS = {"small": 4, "big": 2, "": 2}  # the first is not counted; those of small take a second or two
_SAME = 1e-3  # of the update: averages of parameters near 1 round to 1e-7, an update is a thousandth of them
# How many times fewer CPU seconds than pfl a round shall take.
_CPU = {"W1 small": 1.6, "W2 small": 1.6, "W1 big": 1.1, "W2 big": 1.35, "W3": 2.5}
_FIRST, _MEMORY = 0.45, 0.9


@dataclass(frozen=True)
class ProgramCost:
    """What one program took for one workload, all its processes together."""

    cpu_s: float  # per round, without the first
    wall_s: float  # per round, without the first
    first_round_s: float  # from the command to the end of the first round
    first_cpu_s: float  # CPU seconds in this time
    pss_bytes: int  # peak memory; what processes share is counted once

    def __str__(self) -> str:
        return (
            f"{self.cpu_s:.2f} CPU s and {self.wall_s:.2f} s a round, first done after {self.first_round_s:.1f} s "
            f"({self.first_cpu_s:.1f} CPU s), "
            f"{self.pss_bytes / 2**20:,.0f} MiB"
        )


def parts(harness: Path, environment: Path, repeats: int, only: str) -> list[Part]:
    """All parts of this file, or those of the workloads that `only` names. harness, environment: of the peers."""
    python = environment / "bin" / "python"
    for needed in (harness / "common.py", python):
        if not needed.exists():
            raise UserError(f"there is no {needed}: --peers and --environment say where the peers are")
    if subprocess.run([str(python), "-c", "import pfl, torch, peft"], capture_output=True, check=False).returncode:
        raise UserError(f"{python} cannot import pfl, torch and peft: --environment says where pfl is installed")
    names = {workload.name: workload for workload in workloads.ALL}
    for name in only.split(",") if only else []:
        if name not in names:
            raise UserError(f"--only: there is no workload '{name}'; {nearest(name, list(names))}")
    chosen = [names[name] for name in (only.split(",") if only else names)]
    return [partial(_compare, workload, harness, python, repeats) for workload in chosen]


def _compare(workload: Workload, harness: Path, python: Path, repeats: int) -> list[Row]:
    if why := workload.absent():
        return [skipped(workload.name, why)]
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        return _compared(workload, Path(folder), harness, python, repeats)


def _compared(workload: Workload, folder: Path, harness: Path, python: Path, repeats: int) -> list[Row]:
    start, tokens = prepare(workload, folder, _ROUNDS[workload.size])
    runs: dict[str, list[ProgramCost]] = {"fedhpc": [], "pfl": [], "PEFT loop": []}
    apart: dict[str, float] = {}
    for _ in range(repeats):
        run, reached = fedhpc(folder, tokens)
        runs["fedhpc"].append(run)
        for name, of_peer in (("pfl", python), ("PEFT loop", Path(sys.executable))):
            if name != "pfl" and runs[name]:
                continue  # one repeat is enough, to save time: it only shows what pfl adds to bare PEFT
            run, other = peer(name, folder, of_peer, harness, workload)
            runs[name].append(run)
            apart[name] = difference(other, reached, start)
            if not apart[name] <= _SAME:
                raise UserError(f"{workload.name}: the update of {name} is {apart[name]:.1e} off, so it did other work")
    for name, of_program in runs.items():
        print(f"{workload.name}, {name}: {_medians(of_program)}", file=sys.stderr, flush=True)

    def over(above: str, below: str, figure: str) -> float:
        pairs = min(len(runs[above]), len(runs[below]))
        return ratio(*([getattr(run, figure) for run in runs[name][:pairs]] for name in (above, below)))

    target, note = _CPU[workload.name], f"fedhpc {_medians(runs['fedhpc'])}; pfl {_medians(runs['pfl'])}"
    same = f"updates differ by {apart['pfl']:.0e} and {apart['PEFT loop']:.0e}"
    return [
        Row(
            f"{workload.name}: CPU seconds of a round, pfl over fedhpc",
            over("pfl", "fedhpc", "cpu_s"),
            target,
            note=note,
        ),
        Row(
            f"{workload.name}: CPU seconds of a round, PEFT loop over fedhpc",
            over("PEFT loop", "fedhpc", "cpu_s"),
            note=same,
        ),
        Row(f"{workload.name}: seconds of a round, pfl over fedhpc", over("pfl", "fedhpc", "wall_s")),
        Row(
            f"{workload.name}: first round done, fedhpc over pfl",
            over("fedhpc", "pfl", "first_round_s"),
            _FIRST,
            most=True,
        ),
        Row(f"{workload.name}: CPU seconds to it, fedhpc over pfl", over("fedhpc", "pfl", "first_cpu_s")),
        Row(f"{workload.name}: peak memory, fedhpc over pfl", over("fedhpc", "pfl", "pss_bytes"), _MEMORY, most=True),
    ]


def _medians(runs: Sequence[ProgramCost]) -> ProgramCost:
    """The median of each figure over the repeats."""
    return ProgramCost(
        *(statistics.median(getattr(run, name) for run in runs) for name in ProgramCost.__dataclass_fields__)
    )


def fedhpc(folder: Path, tokens: Sequence[int], workers: int = 2) -> tuple[ProgramCost, dict[str, np.ndarray]]:
    """Run fedhpc on config.yaml of the folder: what it took, and the parameters that it arrived at.

    tokens: how many supervised tokens each round must have; UserError where they differ.
    """
    import h5py

    shutil.rmtree(folder / "run", ignore_errors=True)
    ends: list[float] = []

    def on_line(moment: float, line: str) -> None:
        if line.startswith("round ") and not line.startswith("round 0/"):
            ends.append(moment)

    command = [sys.executable, "-m", "fedhpc.main", str(folder / "config.yaml"), "--ranks", str(workers + 1)]
    with Watched([(command, _environment(folder))], folder / "fedhpc.log", on_line) as watched:
        watched.wait(_LIMIT_S)
    with h5py.File(folder / "run" / "results.h5") as file:
        reached = {name: tensor[()] for name, tensor in file["final"].items()}
        seen = file["rounds"]["tokens"][1:].tolist()
    if seen != list(tokens):
        raise UserError(f"fedhpc trained {seen} tokens, not {list(tokens)}")
    return _cost(watched, ends), reached


def peer(
    name: str, folder: Path, python: Path, harness: Path, workload: Workload
) -> tuple[ProgramCost, dict[str, np.ndarray]]:
    """Run the peer `name` on work.npz of the folder: what it took, and the parameters that it arrived at."""
    out, reached = folder / "peer.json", folder / "reached.npz"
    for path in (out, reached):
        path.unlink(missing_ok=True)
    environment = {
        **_environment(folder),
        "FB_SIZE": workload.size or "small",
        "FB_WL": "lora" if workload.method["name"] == "lora" else "prefix",
        "FB_OPT": "sgd",
        "FB_THREADS": "1",
        "FB_OUT": str(out),
        "FEDHPC_BENCH_REACHED": str(reached),
    }
    program = [str(Path(__file__).with_name("peer_program.py")), str(harness), str(folder / "work.npz"), name]
    if name == "pfl":
        torchrun = [str(python.with_name("torchrun")), "--standalone", "--nproc_per_node=2"]
        commands: list[tuple[list[str], dict[str, str]]] = [([*torchrun, *program], environment)]
    else:
        ranks = {"WORLD_SIZE": "2", "MASTER_PORT": str(free_port())}
        commands = [([str(python), *program], {**environment, **ranks, "RANK": str(rank)}) for rank in range(2)]
    began = time.time()
    for _, of_process in commands:
        of_process["FB_T0"] = repr(began)
    with Watched(commands, folder / "peer.log") as watched:
        watched.wait(_LIMIT_S)
    times = json.loads(out.read_text())
    ends = list(began + times["t_ready"] + np.cumsum(times["rounds"]))
    with np.load(reached) as file:
        return _cost(watched, ends), dict(file)


def prepare(workload: Workload, folder: Path, rounds: int) -> tuple[dict[str, np.ndarray], list[int]]:
    """Write the files that fedhpc and its peers run from.

    Returns the initial values of the trained parameters, and how many supervised tokens each round has. The cache of
    tokens is filled, so that fedhpc need not tokenise, as its peers need not.
    """
    from fedhpc.approaches import prepare as preparation
    from fedhpc.approaches.averaging.approach import Averaging
    from fedhpc.ranks.launch import Launch
    from fedhpc.ranks.transport.base import LoopbackTransport
    from fedhpc.training.schedule import batches

    config = workloads.read(workloads.write(workload, folder, rounds))
    os.environ["FEDHPC_CACHE"] = _environment(folder)["FEDHPC_CACHE"]
    approach = preparation.prepare(config, LoopbackTransport(), Launch(), write_cache=True)
    assert isinstance(approach, Averaging)
    population, train = approach.data.population, approach.data.train
    longest = max(int(train.lengths_of(population.indices(c)).max()) for c in range(population.num_clients))
    ids = np.full((rounds, workloads.COHORT, workloads.SEQUENCES, longest), -1, dtype=np.int64)
    labels = np.full_like(ids, -100)  # no loss there, as transformers has it
    for round_ in range(rounds):
        for index, client in enumerate(approach.plan(round_ + 1).cohort):
            indices = population.indices(client)
            order = np.concatenate(batches(len(indices), config.client, config.run.seed, round_ + 1, client))
            for row, example in enumerate(indices[order].tolist()):
                tokens, first = train.tokens(example), int(train.prompt_lengths[example])
                ids[round_, index, row, : len(tokens)] = tokens
                labels[round_, index, row, first : len(tokens)] = tokens[first:]
    start = {
        name: tensor[0].numpy()
        for name, tensor in approach.method.payload.views(approach.initial_payload().unsqueeze(0)).items()
    }
    settings = {
        "model": config.model.name if workload.real else None,
        "num_virtual_tokens": workload.method.get("num_virtual_tokens"),
        "batch_size": config.client.batch_size,
        "lr": config.client.lr,
    }
    arrays: dict[str, Any] = {f"start/{name}": tensor for name, tensor in start.items()}
    np.savez(folder / "work.npz", ids=ids, labels=labels, settings=json.dumps(settings), **arrays)
    return start, (labels >= 0).sum(axis=(1, 2, 3)).tolist()


def difference(
    reached: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray], start: Mapping[str, np.ndarray]
) -> float:
    """How far two updates are apart, as a share of the second."""
    if {name: t.size for name, t in reached.items()} != {name: t.size for name, t in other.items()}:
        raise UserError(f"other parameters: {sorted(reached)} and {sorted(other)}")
    flat = [
        np.concatenate([t[name].ravel().astype(np.float64) for name in sorted(start)]) for t in (reached, other, start)
    ]
    return float(np.linalg.norm(flat[0] - flat[1]) / np.linalg.norm(flat[1] - flat[2]))


def _cost(watched: Watched, ends: Sequence[float]) -> ProgramCost:
    if len(ends) < 2:
        raise UserError(f"only {len(ends)} rounds were seen")
    cpu = watched.cpu_at(ends[-1]) - watched.cpu_at(ends[0])
    return ProgramCost(
        cpu_s=cpu / (len(ends) - 1),
        wall_s=(ends[-1] - ends[0]) / (len(ends) - 1),
        first_round_s=ends[0] - watched.began,
        first_cpu_s=watched.cpu_at(ends[0]),
        pss_bytes=watched.peak_pss_bytes,
    )


def _environment(folder: Path) -> dict[str, str]:
    """The environment of every program: one thread per process, no network, temporary files in the folder."""
    # Without PYTHONDONTWRITEBYTECODE: modules are compiled once and not at every start, as users have it.
    return {
        **{name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"},
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONWARNINGS": "ignore",
        "TMPDIR": str(folder),
        "FEDHPC_CACHE": str(folder / "cache"),
    }
