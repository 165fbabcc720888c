"""What a round costs beside training, against ranks, cohort and population: the bench itself, on few ranks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fedhpc.bench import processes
from fedhpc.bench.__main__ import interrupted
from fedhpc.errors import UserError
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.updates import cohort
from fedhpc.updates.layout import Layout


def test_a_robust_rule_never_sees_many_values_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many clients and coordinates there are, and with the same result."""
    monkeypatch.setattr(cohort, "_VALUES", 1000)
    updates = torch.randn(64, 1001, generator=torch.Generator().manual_seed(0))
    seen = []

    def median(values: torch.Tensor) -> torch.Tensor:
        seen.append(values.numel())
        return values.median(dim=0).values

    layout, clients = Layout({"a": (1001,)}), np.arange(64)
    found = cohort.Cohort(LoopbackTransport(), layout, list(range(64)), np.ones(64), clients, updates).by_coordinate(
        median
    )
    assert torch.equal(found, updates.double().median(dim=0).values)
    assert max(seen) <= 1000 and sum(seen) == updates.numel()


@pytest.mark.slow
def test_nothing_grows_with_the_population() -> None:
    command = [sys.executable, "-m", "fedhpc.bench", "--scale", "--quick", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    by = {(row["ranks"], row["cohort"], row["population"]): row for row in rows}
    small, large = by[4, 32, 100], by[4, 32, 10**6]
    assert small["wire_bytes"] == large["wire_bytes"]
    assert large["cpu_s_of_rank_0"] < 3 * small["cpu_s_of_rank_0"]  # ten thousand times the clients
    assert large["memory_of_rank_0"] < small["memory_of_rank_0"] + 8 * 2**20
    for row in rows:
        assert row["wire_bytes"] / row["ranks"] <= 16 * row["parameters"] + 65536 + 128 * row["cohort"], row


# ---------------------------------------------------------------- a bench that fails


def failing(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def raising(rank: int) -> None:
    if rank == 1:
        os._exit(3)


@pytest.mark.parametrize(
    ("work", "limit_s", "said"),
    [
        (failing, 30, "rank 1 was killed by signal 9"),
        (raising, 30, "rank 1 left with 3"),
        (lambda _: time.sleep(60), 0.3, "2 of 2 ranks still ran after 0 s"),
    ],
)
def test_a_rank_of_the_bench_that_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, work: Callable[[int], None], limit_s: float, said: str
) -> None:
    """It is named, and none is left."""
    monkeypatch.setattr(processes, "LIMIT_S", limit_s)
    monkeypatch.setattr(processes, "PARTING_S", 0.3)
    before = set(psutil.Process().children())
    with pytest.raises(UserError, match=said):
        processes.forked(2, work, tmp_path / "why")
    assert set(psutil.Process().children()) == before


def test_a_bench_that_is_ended_takes_its_ranks_along(tmp_path: Path) -> None:
    before = set(psutil.Process().children())
    handler = signal.signal(signal.SIGTERM, interrupted)
    over = threading.Event()

    def work(rank: int) -> None:
        (tmp_path / f"{rank} runs").touch()
        time.sleep(600)

    def end() -> None:
        while len(list(tmp_path.glob("* runs"))) < 2:
            if over.wait(0.02):
                return
        signal.pthread_kill(threading.main_thread().ident, signal.SIGTERM)

    ending = threading.Thread(target=end)
    ending.start()
    try:
        with pytest.raises(UserError, match="ended by SIGTERM"):
            processes.forked(2, work, tmp_path / "why")
    finally:
        over.set()
        ending.join()
        signal.signal(signal.SIGTERM, handler)
    assert set(psutil.Process().children()) == before


@pytest.mark.slow
def test_a_bench_whose_rank_is_killed_says_so() -> None:
    """In the middle of a measurement: one line, exit code 1, and no rank is left."""
    command = [sys.executable, "-m", "fedhpc.bench", "--scale", "--quick"]
    children: list[psutil.Process] = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as running:
        try:
            deadline = time.monotonic() + 600
            while len(children) < 2 or not all(child.net_connections() for child in children):
                assert time.monotonic() < deadline and running.poll() is None
                time.sleep(0.02)
                with contextlib.suppress(psutil.Error):
                    children = psutil.Process(running.pid).children()
            children[1].kill()
            _, err = running.communicate(timeout=300)
        finally:
            running.kill()
            for child in children:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
    assert running.returncode == 1
    (line,) = [line for line in err.splitlines() if line.startswith("fedhpc: ")]
    assert line.startswith("fedhpc: error: bench --scale at ranks 2, cohort 32, "), line
    assert "rank 1 was killed by signal 9" in line
    assert not psutil.wait_procs(children, timeout=60)[1]
