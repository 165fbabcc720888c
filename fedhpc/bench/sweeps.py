"""Measures a sweep whose runs train together beside one whose runs are alone: three seeds of four learning rates.

Real text on a tiny model (E2E, tinystories-260k), a few short rounds. Starting a process, and loading model and
data, is a large part of such a run: the note says which. Then runs like those of configs/recipes with early stopping,
beside all runs to their end, alone, and whether both name the same learning rate as the best.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from functools import partial
from math import inf, isnan, nan
from pathlib import Path
from typing import Any, NamedTuple

from fedhpc.bench import workloads
from fedhpc.bench.table import Part, Row, ratio, skipped
from fedhpc.bench.workloads import Workload
from fedhpc.config.yaml import parse_yaml, to_yaml
from fedhpc.errors import UserError
from fedhpc.results.unfinished import read_results

_PREFIX, _LORA = Workload("prefix", workloads.W3.method), Workload("LoRA", workloads.W2.method)
_RATES = {"prefix": [0.01, 0.03, 0.1, 0.3], "LoRA": [0.001, 0.003, 0.01, 0.03]}
_SEEDS = [0, 1, 2]
_TOGETHER = 16
_EARLY_STOP = {"factor": 2, "after": [4, 10]}  # a tenth and a quarter of the rounds


class _Shape(NamedTuple):
    """What the runs of a sweep do: rounds, clients of each, local steps of a client, schedule of the learning rate."""

    rounds: int
    clients: int
    steps: int
    schedule: str


_SHORT = _Shape(2, 10, 4, "constant")
_RECIPE = _Shape(40, 2, 8, "linear")  # as in configs/recipes


def parts(repeats: int) -> list[Part]:
    """All parts of this file."""
    return [partial(part, workload, repeats) for part in (_sweep, _early_stop) for workload in (_PREFIX, _LORA)]


def _sweep(workload: Workload, repeats: int) -> list[Row]:
    """CPU seconds of all processes of the sweep, comparison included, alone over together."""
    what = f"{len(_SEEDS)} seeds of {len(_RATES[workload.name])} rates, {workload.name}, {_SHORT.rounds} rounds"
    if absent := workload.absent():
        return [skipped(what, absent)]
    alone, together = [], []
    for _ in range(repeats):
        alone.append(_run(workload, _SHORT, 1)[0])
        together.append(_run(workload, _SHORT, _TOGETHER)[0])
    shortest, _ = _run(workload, _SHORT._replace(rounds=1, steps=1), 1)
    note = f"{min(together):.0f} s together, {min(alone):.0f} s alone, {shortest:.0f} s of which for runs of one step"
    return [Row(f"{what}: CPU of the sweep, alone over together", ratio(alone, together), 1.6, note=note)]


def _early_stop(workload: Workload, repeats: int) -> list[Row]:
    """CPU seconds to the best learning rate: all runs to their end, alone, over early stopping with runs together."""
    what = f"{len(_SEEDS)} seeds of {len(_RATES[workload.name])} rates, {workload.name}, {_RECIPE.rounds} rounds"
    if absent := workload.absent():
        return [skipped(what, absent)]
    alone, early, rates = [], [], set()
    for _ in range(repeats):
        seconds, best = _run(workload, _RECIPE, 1)
        alone.append(seconds)
        seconds, winner = _run(workload, _RECIPE, _TOGETHER, _EARLY_STOP)
        early.append(seconds)
        rates.add((best, winner))
    what = f"{what}: CPU to the best rate, alone over early stop"
    if any(best != winner for best, winner in rates):
        return [Row(what, nan, 3.0, note=f"another rate: (best, chosen) is {sorted(rates)}")]
    note = f"{min(early):.0f} s, {min(alone):.0f} s alone; the same rate, {best:g}"
    return [Row(what, ratio(alone, early), 3.0, note=note)]


def _run(
    workload: Workload, shape: _Shape, together: int, early_stop: Mapping[str, Any] | None = None
) -> tuple[float, float]:
    """Run the sweep: CPU seconds, comparison included, and the learning rate with the lowest loss at its end."""
    with tempfile.TemporaryDirectory() as folder:
        base = workloads.write(
            workload, Path(folder), shape.rounds,
            federation={"cohort_size": shape.clients},
            client={
                "optimizer": "adamw", "epochs": None, "steps": shape.steps, "batch_size": 4, "schedule": shape.schedule
            },
            evaluation={"every": 2, "max_examples": 64, "test_max_examples": 64}, runtime={"block_size": "auto"},
        )  # fmt: skip
        sweep = {
            "name": "bench",
            "dir": f"{folder}/runs",
            "base": str(base),
            "grid": [{"client.lr": _RATES[workload.name]}, {"run.seed": _SEEDS}],
            "together": together,
            "early_stop": early_stop,
        }
        file = Path(folder) / "sweep.yaml"
        file.write_text(to_yaml(sweep), encoding="utf-8")
        before = _of_children()
        log = Path(folder) / "log"
        with log.open("wb") as output:
            command = [sys.executable, "-m", "fedhpc.sweep", str(file)]
            code = subprocess.run(command, stdout=output, stderr=output, env=os.environ, check=False).returncode
        if code:
            raise UserError(f"the sweep ended with exit code {code}: {log.read_text(errors='replace')[-500:]}")
        return _of_children() - before, _best(Path(folder) / "runs")


def _best(runs: Path) -> float:
    """The learning rate with the lowest mean of the last validation losses, of the runs that came to their end."""
    losses: dict[float, list[float]] = {}
    for file in runs.glob("*/results.h5"):
        results = read_results(file.parent)
        if results.complete:
            rate = parse_yaml(str(results.attributes["config"]), str(file))["client"]["lr"]
            losses.setdefault(rate, []).append(float(results.rounds["eval_loss"][-1]))
    means = {rate: sum(of_seeds) / len(of_seeds) for rate, of_seeds in losses.items()}
    return min(means, key=lambda rate: inf if isnan(means[rate]) else means[rate])


def _of_children() -> float:
    """CPU seconds of all processes that this one has started and waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
