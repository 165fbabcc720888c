"""Measures whole runs on one GPU: what a round costs beside training, equal bits, and what happens without memory.

The programs are started as users start them: one process, in which rank 0 hosts the clients itself, or a server on the
CPU and a worker on the GPU, over gloo. They train W1 or W2 with a base of 134 million parameters in bfloat16, a cohort
of 16 in one block.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from fedhpc.bench import workloads
from fedhpc.bench.bed import Clock
from fedhpc.bench.compute import Trainer, free, limit_memory, peak_bytes, reset_peak
from fedhpc.bench.processes import Watched, quiet
from fedhpc.bench.table import Row, skipped
from fedhpc.bench.workloads import COHORT, W1, W2, Workload
from fedhpc.errors import UserError

_LIMIT_S, _LEAST_S = 150.0, 60.0  # how long a run may take where there is time, and where there is none
_MAIN = ["-m", "fedhpc.main"]
_Launch = tuple[list[str], list[str]]  # the arguments before and after the configuration file in a command
_ONE: _Launch = ([sys.executable, *_MAIN], [])
_FORKED: _Launch = ([sys.executable, *_MAIN], ["--ranks", "2"])
_TORCHRUN: _Launch = (
    [str(Path(sysconfig.get_path("scripts"), "torchrun")), "--standalone", "--nproc_per_node=2", *_MAIN],
    [],
)
_TESTS = Path("tests", "test_gpu.py")
_SCARCE = 0.7  # share of a block's memory that is left: enough for half of the block


class _Runs:
    """Runs of one configuration, each in its own directory; a context manager that removes all of them."""

    def __init__(
        self, method: str, size: str, device: str, rounds: int, until: Clock, quantize: str = "none", **runtime: Any
    ) -> None:
        self._until = until
        workload = {workload.method["name"]: Workload(workload.name, workload.method, size) for workload in (W1, W2)}
        self._temporary = tempfile.TemporaryDirectory(prefix="bench-")
        self.folder = Path(self._temporary.name)
        self.config = workloads.write(
            workload[method], self.folder, rounds, model={"dtype": "bfloat16", "quantize": quantize},
            runtime={"device": device, "block_size": COHORT, **runtime},
        )  # fmt: skip

    def __enter__(self) -> _Runs:
        return self

    def __exit__(self, *_: object) -> None:
        self._temporary.cleanup()

    @property
    def limit_s(self) -> float:
        """How many seconds a run that starts now may take: as many as are left, but enough to start if there are."""
        return min(_LIMIT_S, self._until.at_least(_LEAST_S))

    def watched(self, launch: _Launch, name: str, on_line: Callable[[float, str], None]) -> Watched:
        """Start or resume the run `name`. on_line is called with the time and the text of each line of rank 0."""
        before, after = launch
        command = [*before, str(self.config), f"run.dir={self.folder / name}", *after]
        environment = {**os.environ, "FEDHPC_CACHE": str(self.folder / "cache")}
        return Watched([(command, environment)], self.folder / f"{name}.log", on_line)

    def complete(self, launch: _Launch, name: str) -> tuple[float, str]:
        """Run to the end: seconds from the command to the end of the first round, and the line about its blocks."""
        first: list[float] = []
        blocks_line = ""

        def on_line(moment: float, line: str) -> None:
            nonlocal blocks_line
            if " a round in blocks of " in line:
                blocks_line = line.partition(" a round in ")[2].strip()
            if line.startswith("round 1/"):
                first.append(moment)

        with self.watched(launch, name, on_line) as watched:
            watched.wait(self.limit_s)
        return (first[0] - watched.began if first else float("nan")), blocks_line

    def read(self, name: str, group: str) -> dict[str, np.ndarray]:
        """The columns of a group in results.h5 of the run `name`."""
        import h5py

        with h5py.File(self.folder / name / "results.h5") as file:
            return {key: column[()] for key, column in file[group].items()}


def tests(until: Clock) -> Iterator[Row]:
    """Run the tests that need a GPU, where the tests are: in the root of a checkout."""
    if not _TESTS.exists():
        yield skipped(str(_TESTS), "it is not there: run this in the root of a checkout")
        return
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        report = Path(folder, "report.xml")
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu"]
        with (
            Watched([([*command, f"--junitxml={report}", str(_TESTS)], os.environ)], Path(folder, "log")) as watched,
            contextlib.suppress(UserError),
        ):  # a test that fails: the report says which
            watched.wait(min(_LIMIT_S, until.at_least(_LEAST_S)))
        if not report.exists():
            last = Path(folder, "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()[-3:]
            raise UserError(f"{_TESTS} did not end: {' | '.join(last)}")
        suite = ElementTree.parse(report).getroot()[0]
    bad = [
        case.get("name", "") for case in suite.iter("testcase") if {part.tag for part in case} & {"failure", "error"}
    ]
    skips = int(suite.get("skipped", "0"))
    note = f"{int(suite.get('tests', '0')) - skips - len(bad)} passed, {skips} were skipped"
    yield Row(f"{_TESTS}: tests that fail", len(bad), 0.0, most=True, note=", ".join([note, *bad[:5]]))


def quantized(method: str, until: Clock, size: str = "large", device: str = "auto", rounds: int = 4) -> Iterator[Row]:
    """Compare rounds on a base in 4 bits with those on the same base in bfloat16."""
    columns: dict[str, dict[str, np.ndarray]] = {}
    for bits in ("none", "4bit"):
        if columns and until.over:
            yield skipped(f"{method}: rounds on 4 bits over bfloat16", "its time was over")
            return
        with _Runs(method, size, device, rounds, until, quantize=bits) as runs:
            runs.complete(_ONE, "run")
            columns[bits] = runs.read("run", "rounds")
    seconds, memory, loss = (
        [float(np.median(columns[bits][name][2:])) for bits in columns]
        for name in ("seconds_local", "peak_memory_bytes", "train_loss")
    )
    yield Row(f"{method}: local training on 4 bits over bfloat16, tokens/s", seconds[0] / seconds[1])
    yield Row(f"{method}: most memory on 4 bits over bfloat16", memory[1] / memory[0],
              note=f"loss {loss[1]:.4f}, in bfloat16 {loss[0]:.4f}")  # fmt: skip


def programs(method: str, until: Clock, size: str = "large", device: str = "auto", rounds: int = 6) -> Iterator[Row]:
    """Compare rounds of one process with those of a server and a worker, started in two ways; without the first."""
    seconds: dict[str, float] = {}
    with _Runs(method, size, device, rounds, until) as runs:
        for name, launch in {"one process": _ONE, "torchrun, 2 ranks": _TORCHRUN, "--ranks 2": _FORKED}.items():
            if seconds and until.over:
                yield skipped(f"{method}, {name}", "its time was over")
                continue
            first_s, blocks_line = runs.complete(launch, name)
            column = {key: values[2:] for key, values in runs.read(name, "rounds").items()}
            round_seconds = column["seconds"] - column["seconds_eval"]
            seconds[name] = float(np.median(round_seconds))
            outside = 1 - float(column["seconds_local"].sum() / round_seconds.sum())
            parts = ", ".join(
                f"{part} {statistics.median(column[f'seconds_{part}']) * 1e3:.1f}"
                for part in ("broadcast", "local", "reduce", "server")
            )
            what = f"{method}, {name}"
            yield Row(f"{what}: share of a round outside local training", outside, 0.03, most=True, unit="%",
                      note=f"ms: {parts}; {blocks_line}")  # fmt: skip
            yield Row(f"{what}: from the command to the first round done", first_s, unit="s")
    for name in list(seconds)[1:]:
        yield Row(f"{method}: a round of one process over {name}", seconds["one process"] / seconds[name])


def bits(method: str, until: Clock, size: str = "large", device: str = "auto", rounds: int = 4) -> Iterator[Row]:
    """Check that /final has the same bits under runtime.deterministic: killed and resumed, again, and on two ranks."""
    with _Runs(method, size, device, rounds, until, deterministic=True) as runs:
        runs.complete(_ONE, "first")
        expected = runs.read("first", "final")
        for name, launch in {"killed and resumed": _ONE, "again": _ONE, "on two ranks": _TORCHRUN}.items():
            what = f"{method}: /final has the same bits {name}"
            if until.over:
                yield skipped(what, "its time was over")
                continue
            if name == "killed and resumed":
                _kill(runs, name, after=2)
            runs.complete(launch, name)
            final = runs.read(name, "final")
            same = expected.keys() == final.keys() and all(
                expected[key].tobytes() == final[key].tobytes() for key in expected
            )
            apart = max(float(np.abs(expected[key] - final[key]).max()) for key in expected)
            yield Row(what, float(same), 1.0, note=f"differs by {apart:.1e}")


def _kill(runs: _Runs, name: str, after: int) -> None:
    """Start the run `name` and kill it once it has reported the round `after`. UserError where it had ended by then."""
    from fedhpc.results.status import read_status

    reported = threading.Event()

    def on_line(_: float, line: str) -> None:
        if line.startswith(f"round {after}/"):
            reported.set()

    with runs.watched(_ONE, name, on_line):
        if not reported.wait(limit_s := runs.limit_s):
            raise UserError(f"{name}: round {after} was not reported within {limit_s:.0f} s")
    status = read_status(runs.folder / name)
    if status is None or status.state != "running":
        raise UserError(f"{name}: it was not killed in time: {status}")


def scarce(device: Any, size: str = "large") -> Iterator[Row]:
    """Run a round with block_size auto where the GPU's memory holds half a block, but no whole one."""
    import torch

    from fedhpc import federation
    from fedhpc.ranks.transport.base import LoopbackTransport

    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        changes = {"model": {"dtype": "bfloat16"}, "federation": {"cohort_size": 64}}
        work = Trainer(Workload(W2.name, W2.method, size), Path(folder), "auto", **changes)
        before = reset_peak(device)
        work.train_once()
        taken = peak_bytes(device) - before
        free(device)
        limit_memory(device, before + int(_SCARCE * taken))
        outcome = "it ran to its end"
        try:
            with quiet():
                federation.run(work.approach, LoopbackTransport(), True, lambda round_: None)
        except (torch.OutOfMemoryError, UserError) as error:  # where even one client, or the evaluation, does not fit
            outcome = f"{type(error).__name__}: {str(error).partition('. ')[0]}"
        finally:
            limit_memory(device, None)
        what = f"block_size auto ({work.k}) with {_SCARCE:.0%} of a block's {taken / 2**20:,.0f} MiB: the run ends well"
        yield Row(what, float(outcome == "it ran to its end"), 1.0, note=outcome)
