"""Measures a sweep whose runs train together beside one whose runs are alone: three seeds of four learning rates.

Real text on a tiny model (E2E, tinystories-260k), a few short rounds. Starting a process, and loading model and
data, is a large part of such a run: the note says which.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path

from fedhpc.bench import workloads
from fedhpc.bench.table import Part, Row, ratio, skipped
from fedhpc.bench.workloads import Workload
from fedhpc.config.yaml import to_yaml
from fedhpc.errors import UserError

_PREFIX, _LORA = Workload("prefix", workloads.W3.method), Workload("LoRA", workloads.W2.method)
_RATES = {"prefix": [0.03, 0.1, 0.3, 0.5], "LoRA": [0.003, 0.01, 0.03, 0.1]}
_SEEDS = [0, 1, 2]
_ROUNDS = 2


def parts(repeats: int) -> list[Part]:
    """All parts of this file."""
    return [partial(_sweep, workload, repeats) for workload in (_PREFIX, _LORA)]


def _sweep(workload: Workload, repeats: int) -> list[Row]:
    """CPU seconds of all processes of the sweep, comparison included, alone over together."""
    what = f"{len(_SEEDS)} seeds of {len(_RATES[workload.name])} rates, {workload.name}, {_ROUNDS} rounds"
    if absent := workload.absent():
        return [skipped(what, absent)]
    alone, together = [], []
    for _ in range(repeats):
        alone.append(_cpu_seconds(workload, _ROUNDS, 1))
        together.append(_cpu_seconds(workload, _ROUNDS, 16))
    shortest = _cpu_seconds(workload, 1, 1, steps=1)
    note = f"{min(together):.0f} s together, {min(alone):.0f} s alone, {shortest:.0f} s of which for runs of one step"
    return [Row(f"{what}: CPU of the sweep, alone over together", ratio(alone, together), 1.6, note=note)]


def _cpu_seconds(workload: Workload, rounds: int, together: int, steps: int = 4) -> float:
    with tempfile.TemporaryDirectory() as folder:
        base = workloads.write(
            workload, Path(folder), rounds,
            federation={"cohort_size": 10}, client={"epochs": None, "steps": steps, "batch_size": 4},
            evaluation={"every": 2, "max_examples": 64, "test_max_examples": 64}, runtime={"block_size": "auto"},
        )  # fmt: skip
        sweep = {
            "name": "bench",
            "dir": f"{folder}/runs",
            "base": str(base),
            "grid": [{"client.lr": _RATES[workload.name]}, {"run.seed": _SEEDS}],
            "together": together,
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
        return _of_children() - before


def _of_children() -> float:
    """CPU seconds of all processes that this one has started and waited for, and of theirs."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime
