"""Killed, signalled, interrupted and out of disk: nothing reported is lost, nothing is left running, resume is exact."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
import yaml

from fedhpc.main import main
from tests.federations import final, same_bits, table
from tests.ranks import Launcher, Ranks

ROUNDS = 12
GONE_WITHIN_S = 10


def write(folder: Path, run_dir: Path, **changes: Any) -> Path:
    """A configuration whose rounds take a fraction of a second."""
    raw: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "data": {"label": "label", "client": "client"},
        "partition": {"name": "iid", "num_clients": 12},
        "method": {"name": "prefix", "num_virtual_tokens": 4},
        "federation": {"rounds": ROUNDS, "cohort_size": 6, "dropout": 0.2},
        "client": {"steps": 2, "batch_size": 4, "lr": 0.05},
        "server": {"optimizer": "adam", "lr": 0.05},
        "evaluation": {"every": 4, "max_examples": 8, "samples": 0},
    }
    for section, value in changes.items():
        raw[section] = {**raw.get(section, {}), **value}
    path = folder / f"{run_dir.name}.yaml"
    path.write_text(yaml.safe_dump(raw))
    return path


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        assert main([str(write(folder, folder / "run"))]) == 0
    return folder / "run"


def start(ranks: int, path: Path, launcher: Launcher) -> Ranks:
    return Ranks(ranks, ["-m", "fedhpc.main", str(path)], launcher)


def printed(output: str) -> int:
    """The last round that was reported on the screen."""
    rounds = [int(line.split()[1].partition("/")[0]) for line in output.splitlines() if line.startswith("round ")]
    return max(rounds, default=0)


def whole_files(run_dir: Path) -> None:
    """What is there can be read, by anybody and now."""
    if (run_dir / "results.h5").exists():
        with h5py.File(run_dir / "results.h5") as file:
            lengths = {len(column) for column in file["rounds"].values()}
            assert len(lengths) == 1
            assert list(file["rounds/round"]) == list(range(len(file["rounds/round"])))
    if (run_dir / "status.json").exists():
        assert json.loads((run_dir / "status.json").read_text())["state"] in ("running", "failed", "preempted", "complete")


def recorded(run_dir: Path) -> int:
    """The last round that the checkpoint holds."""
    from fedhpc.rundir import load_checkpoint

    found = load_checkpoint(run_dir)
    return -1 if found is None else int(found[1]["round"])


def same_as(whole: Path, run_dir: Path) -> None:
    """The same bits and rows as the undisturbed run."""
    same_bits(final(whole), final(run_dir))
    for name, unstable in (("rounds", ("seconds", "wire_bytes", "peak_memory")), ("clients", ("worker",))):
        one, other = table(whole, name), table(run_dir, name)
        for column in one:
            if not column.startswith(unstable):
                np.testing.assert_array_equal(one[column], other[column], err_msg=f"/{name}/{column}")


def resumes(whole: Path, path: Path, ranks: int = 1) -> None:
    """The same command goes on, to the same end."""
    run_dir = path.with_suffix("")
    with start(ranks, path, "env") as running:
        assert {result.code for result in running.wait(120)} == {0}, running.output()
    same_as(whole, run_dir)


# ---------------------------------------------------------------- SIGKILL


def kill_somewhere(path: Path, launcher: Launcher, rng: np.random.Generator, delay_s: float, ranks: int) -> tuple[int, bool]:
    """Start, kill a random rank after `delay_s`, see everything end; the last reported round, and whether it was done."""
    run_dir = path.with_suffix("")
    with start(ranks, path, launcher) as running:
        deadline = time.monotonic() + delay_s
        while time.monotonic() < deadline and any(p.poll() is None for p in running.processes):
            time.sleep(0.01)
        victims = running.rank_processes()
        if victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victims[int(rng.choice(sorted(victims)))].kill()
        began = time.monotonic()
        left = running.survivors(GONE_WITHIN_S)
        assert not left, f"{left} live {time.monotonic() - began:.1f} s after the kill:\n{running.output()}"
        output = running.output()
    whole_files(run_dir)
    seen = printed(output)
    assert recorded(run_dir) >= (seen if seen else -1), output
    return seen, "complete: " in output


def test_a_killed_rank(whole: Path, tmp_path: Path) -> None:
    path = write(tmp_path, tmp_path / "run")
    with start(2, path, "env") as running:
        running.wait_for("round 3/")
        running.rank_processes()[1].kill()
        codes = [result.code for result in running.wait(30)]
        assert codes == [1, -signal.SIGKILL]
        assert "fedhpc: error: rank 1 died" in running.output()
        seen = printed(running.output())
    whole_files(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert recorded(tmp_path / "run") >= seen >= 3
    resumes(whole, path)


@pytest.mark.slow
def test_killed_twenty_times_over_and_resumed(whole: Path, tmp_path: Path) -> None:
    """At moments from start-up to the last write; every launch goes on where the one before was killed."""
    rng = np.random.default_rng(7)
    path = write(tmp_path, tmp_path / "run", federation={"rounds": ROUNDS})
    kills = done = 0
    spans = {"torchrun": 8.0, "env": 6.0}
    while kills < 20:
        launcher: Launcher = "torchrun" if kills % 2 else "env"
        # Without a launcher nobody can tell a rank that was killed while it started from one that is late.
        low = 0.0 if launcher == "torchrun" else 4.0
        _, complete = kill_somewhere(path, launcher, rng, low + rng.random() * spans[launcher], 2 + kills % 2)
        kills += 1
        if complete:  # begin again, so that all kills hit something
            done += 1
            same_as(whole, tmp_path / "run")
            (tmp_path / "run").rename(tmp_path / f"done-{done}")
    resumes(whole, path)
