"""Killed, signalled, out of memory or disk: nothing reported is lost, nothing is left running, resume is exact."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import psutil
import pytest
import yaml

from fedhpc.main import main
from fedhpc.results.checkpoint import load_checkpoint
from tests.federations import final, table, write_texts
from tests.ranks import Launcher, Ranks

ROUNDS = 12
GONE_WITHIN_S = 10
HANGS_AFTER_S = 120  # where the machine may be so busy that 10 s say nothing; torchrun itself waits for 30 s
STARTS_WITHIN_S = 1800  # the same


def write(folder: Path, run_dir: Path, **changes: Any) -> Path:
    """A configuration whose rounds take a fraction of a second."""
    raw: dict[str, Any] = {
        "run": {"dir": str(run_dir)},
        "model": {"name": str(folder / "texts" / "model")},
        "data": {"source": str(folder / "texts"), "label": "label", "client": "client"},
        "partition": {"name": "iid", "num_clients": 12},
        "method": {"name": "prefix", "num_virtual_tokens": 4},
        "federation": {"rounds": ROUNDS, "cohort_size": 6, "dropout": 0.2},
        "client": {"steps": 2, "batch_size": 4, "lr": 0.05},
        "server": {"optimizer": "adam", "lr": 0.05},
        "evaluation": {"every": 4, "max_examples": 8, "samples": 0},
    }
    for section, value in changes.items():
        raw[section] = {**raw.get(section, {}), **value} if isinstance(value, dict) else value
    if not (folder / "texts").exists():
        (folder / "texts").mkdir()
        write_texts(folder / "texts")
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
        assert json.loads((run_dir / "status.json").read_text())["state"] in (
            "running",
            "failed",
            "preempted",
            "complete",
        )


def recorded(run_dir: Path) -> int:
    """The last round that the checkpoint holds."""
    found = load_checkpoint(run_dir)
    return -1 if found is None else int(found[1]["round"])


_OF_MACHINE = ("seconds", "wire_bytes", "peak_memory", "idle_share", "gathered_bytes")


def same_as(whole: Path, run_dir: Path) -> None:
    """The same bits and rows as the undisturbed run."""
    one, other = final(whole), final(run_dir)
    assert {name: (a.dtype, a.shape, a.tobytes()) for name, a in one.items()} == {
        name: (a.dtype, a.shape, a.tobytes()) for name, a in other.items()
    }
    for name, unstable in (("rounds", _OF_MACHINE), ("clients", ("worker",))):
        one, other = table(whole, name), table(run_dir, name)
        for column in one:
            if not column.startswith(unstable):
                np.testing.assert_array_equal(one[column], other[column], err_msg=f"/{name}/{column}")


def resumes(whole: Path, path: Path) -> None:
    """The same command goes on, in this one process, to the same end."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE"):
            patch.delenv(name, raising=False)
        assert main([str(path)]) == 0
    same_as(whole, path.with_suffix(""))


# ---------------------------------------------------------------- SIGKILL


def kill_somewhere(
    path: Path, launcher: Launcher, rng: np.random.Generator, ranks: int, starting: bool
) -> tuple[bool, float]:
    """Start, kill a random rank, see everything end and nothing lost: whether there was one to kill, and how long the
    others took to end."""
    run_dir = path.with_suffix("")
    with start(ranks, path, launcher) as running:
        if starting:
            until(lambda: len(running.rank_processes()) == ranks, STARTS_WITHIN_S)
        else:
            running.wait_for(" ranks over ", timeout=STARTS_WITHIN_S)  # the first line: about to train
        time.sleep(rng.random() * (4.0 if starting else 1.0))
        victims = running.rank_processes()
        if victims:
            with contextlib.suppress(psutil.NoSuchProcess):
                victims[int(rng.choice(sorted(victims)))].kill()
        began = time.monotonic()
        left = running.survivors(HANGS_AFTER_S)
        assert not left, f"{left} live {HANGS_AFTER_S} s after the kill:\n{running.output()}"
        output = running.output()
    whole_files(run_dir)
    assert recorded(run_dir) >= (printed(output) or -1), output
    return bool(victims), time.monotonic() - began


def complete(run_dir: Path) -> bool:
    return (run_dir / "status.json").exists() and state(run_dir)["state"] == "complete"


def test_a_killed_rank(whole: Path, tmp_path: Path) -> None:
    path = write(tmp_path, tmp_path / "run")
    with start(2, path, "forked") as running:
        running.wait_for("round 3/")
        running.rank_processes()[1].kill()
        codes = [result.code for result in running.wait(HANGS_AFTER_S)]
        assert codes == [1, -signal.SIGKILL]
        assert "fedhpc: error: rank 1 died" in running.output()
        seen = printed(running.output())
    whole_files(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    assert recorded(tmp_path / "run") >= seen >= 3
    resumes(whole, path)


@pytest.mark.slow
def test_killed_again_and_again_and_resumed(whole: Path, tmp_path: Path) -> None:
    """Under launchers, while it starts and while it trains; many more kills without them: test_failures.py."""
    rng = np.random.default_rng(7)
    path = write(tmp_path, tmp_path / "run")
    # Without a launcher nobody can tell a rank that was killed while it started from one that is late.
    for number, (launcher, starting) in enumerate((("torchrun", True), ("forked", False), ("torchrun", False))):
        kill_somewhere(path, launcher, rng, 2 + number % 2, starting)
    resumes(whole, path)


@pytest.mark.slow
def test_torchrun_starts_killed_ranks_again(whole: Path, tmp_path: Path) -> None:
    """--max-restarts: the server and then a worker die, and one command comes to the end all the same."""
    path = write(tmp_path, tmp_path / "run")
    with Ranks(2, ["-m", "fedhpc.main", str(path)], "torchrun", launcher_args=["--max-restarts=2"]) as running:
        running.wait_for("round 3/")
        running.rank_processes()[0].kill()
        running.wait_for("resuming after round")
        running.wait_for(f"round {recorded(tmp_path / 'run') + 2}/")
        running.rank_processes()[1].kill()
        (result,) = running.wait(120)
        assert result.code == 0, running.output()
        assert running.output().count("resuming after round") == 2
    same_as(whole, tmp_path / "run")


# ---------------------------------------------------------------- launchers, signals, exceptions


def state(run_dir: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / "status.json").read_text())
    return found


@pytest.mark.parametrize(
    ("launcher", "moment"),
    [
        pytest.param("torchrun", "training", marks=pytest.mark.slow),
        pytest.param("mpiexec", "import", marks=pytest.mark.slow),
        pytest.param("torchrun", "import", marks=pytest.mark.soak),
        pytest.param("mpiexec", "training", marks=pytest.mark.soak),
    ],
)
def test_a_killed_launcher_leaves_no_orphans(whole: Path, tmp_path: Path, launcher: Launcher, moment: str) -> None:
    path = write(tmp_path, tmp_path / "run")
    with start(2, path, launcher) as running:
        if moment == "training":
            running.wait_for("round 2/")
        else:
            until(lambda: importing(running))
        running.survivors(0)  # remember them: orphans are no children any more
        running.processes[0].kill()
        left = running.survivors(HANGS_AFTER_S)
        assert not left, running.output()
    whole_files(tmp_path / "run")
    resumes(whole, path)


def importing(running: Ranks, ranks: int = 2) -> bool:
    """Whether all ranks have begun to load torch."""
    try:
        loaded = [any("torch" in part.path for part in p.memory_maps()) for p in running.rank_processes().values()]
    except psutil.Error:
        return False
    return len(loaded) == ranks and all(loaded)


def until(true: Callable[[], bool], timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "who"),
    [
        pytest.param("SIGTERM", [0, 1], marks=pytest.mark.slow),
        pytest.param("SIGUSR2", [1], marks=pytest.mark.slow),
        pytest.param("SIGINT", [0, 1], marks=pytest.mark.soak),
        pytest.param("SIGTERM", [0], marks=pytest.mark.soak),
    ],
)
def test_a_signal_preempts_and_the_same_command_goes_on(
    whole: Path, tmp_path: Path, number: str, who: list[int]
) -> None:
    path = write(tmp_path, tmp_path / "run")
    with start(2, path, "forked") as running:
        running.wait_for("round 2/")
        for rank in who:
            running.rank_processes()[rank].send_signal(signal.Signals[number])
        results = running.wait(HANGS_AFTER_S)
        assert [result.code for result in results] == [75, 75], results
        assert results[0].err.count("\n") == 1 and "rounds are kept" in results[0].err
        assert results[1].err == ""
        seen = printed(running.output())
    assert state(tmp_path / "run")["state"] == "preempted"
    assert state(tmp_path / "run")["round"] == recorded(tmp_path / "run") >= seen
    resumes(whole, path)


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "code"), [("env", 75), ("mpiexec", 75), ("torchrun", 1)])
def test_a_signal_while_starting(tmp_path: Path, launcher: Launcher, code: int) -> None:
    path = write(tmp_path, tmp_path / "run")
    with start(2, path, launcher) as running:
        until(lambda: importing(running))
        for process in running.rank_processes().values():
            process.send_signal(signal.SIGTERM)
        assert {result.code for result in running.wait(HANGS_AFTER_S)} == {code}, running.output()
        assert running.output().count("fedhpc: preempted by SIGTERM while starting") == 1
        assert launcher == "torchrun" or "Traceback" not in running.output()  # its own
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_ctrl_c_on_one_process(whole: Path, tmp_path: Path) -> None:
    path = write(tmp_path, tmp_path / "run")
    with start(1, path, "forked") as running:
        running.wait_for("round 2/")
        running.processes[0].send_signal(signal.SIGINT)
        (result,) = running.wait(HANGS_AFTER_S)
    assert result.code == 75
    assert result.err.startswith("fedhpc: interrupted; ") and result.err.count("\n") == 1
    resumes(whole, path)


@pytest.mark.slow
def test_ctrl_c_under_torchrun_says_what_is_kept_before_its_traceback(whole: Path, tmp_path: Path) -> None:
    path = write(tmp_path, tmp_path / "run")
    with start(2, path, "torchrun") as running:
        running.wait_for("round 2/")
        os.killpg(running.processes[0].pid, signal.SIGINT)  # as a terminal does
        (result,) = running.wait(HANGS_AFTER_S)
    rounds = state(tmp_path / "run")["round"]
    kept = f"fedhpc: interrupted; {rounds} rounds are kept in {tmp_path / 'run'}, the same command goes on from there"
    line = f"{kept}; the traceback that follows is torchrun's own\n"
    assert result.code == 1 and result.err.count("fedhpc: ") == 1
    assert 0 <= result.err.index(line) < result.err.index("Traceback")
    resumes(whole, path)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["forked", "mpiexec"])
def test_a_mistake_that_a_worker_finds(tmp_path: Path, launcher: Launcher) -> None:
    path = write(
        tmp_path,
        tmp_path / "run",
        mode="local",
        client={"lr": 1e30, "weight_decay": 1.0, "optimizer": "sgd"},
        federation={"dropout": 0.0},
    )
    with start(2, path, launcher) as running:
        results = running.wait(HANGS_AFTER_S)
        assert {result.code for result in results} == {1}
        said = [line for line in running.output().splitlines() if "fedhpc: " in line]
    assert len(said) == 1 and "rank 1: client" in said[0] and "lower client.lr" in said[0], said
    assert state(tmp_path / "run")["state"] == "failed"
    assert "lower client.lr" in state(tmp_path / "run")["reason"]


@pytest.mark.slow
def test_a_failure_on_a_worker(tmp_path: Path) -> None:
    """Its clients' files vanish while it runs: as any exception, told to all by rank 0."""
    path = write(tmp_path, tmp_path / "run", mode="local", federation={"rounds": 100, "dropout": 0.0})
    with start(2, path, "forked") as running:
        running.wait_for("round 2/")
        while all(process.poll() is None for process in running.processes):
            for file in (tmp_path / "run" / "clients").rglob("*.safetensors"):
                file.unlink(missing_ok=True)
        results = running.wait(HANGS_AFTER_S)
    assert [result.code for result in results] == [1, 1], results
    assert results[0].err.startswith("fedhpc: error: rank 1: ") and results[0].err.count("\n") == 1, results
    assert "state of client" in results[0].err and results[1].err == "", results
    assert state(tmp_path / "run")["state"] == "failed"


# ---------------------------------------------------------------- a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own, in memory; grown with `mount -o remount,size=...`."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and not subprocess.call(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], stderr=subprocess.DEVNULL
    )
    if not mounted:
        pytest.skip("may not mount a small file system here")
    try:
        yield disk
    finally:
        subprocess.check_call(["umount", str(disk)])


@pytest.mark.slow
def test_a_full_disk(whole: Path, tmp_path: Path, small_disk: Path) -> None:
    path = write(tmp_path, small_disk / "run")
    with start(2, path, "forked") as running:
        running.wait_for("round 2/")
        (small_disk / "filler").write_bytes(b"")
        with contextlib.suppress(OSError), open(small_disk / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        results = running.wait(HANGS_AFTER_S)
        assert [result.code for result in results] == [1, 1], results
        assert results[0].err.count("\n") == 1 and results[1].err == "", results
        assert "No space left on device" in results[0].err and "make room" in results[0].err
        seen = printed(running.output())
    whole_files(small_disk / "run")
    assert recorded(small_disk / "run") >= seen >= 2
    subprocess.check_call(["mount", "-o", "remount,size=16m", str(small_disk)])
    with start(2, path, "forked") as running:
        assert {result.code for result in running.wait(HANGS_AFTER_S)} == {0}, running.output()
    same_as(whole, small_disk / "run")
