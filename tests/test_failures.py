"""Who fails, how and when: nothing hangs, one line names the rank and the cause, nothing is lost, resume is exact.

The cells that are not here: the death of a launcher, signals and kills at random moments (test_kill.py), hosts that are
cut off (cluster/test_hosts.py), files that are damaged under one process (test_bad_input.py, test_rundir.py,
test_store.py). A server of several ranks does not train, and a worker takes no server step and writes nothing but the
state of its clients.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import numpy as np
import pytest

from fedhpc.main import main
from fedhpc.results.checkpoint import CHECKPOINT
from fedhpc.results.files import load_tensors
from tests.failing_rank import run
from tests.ranks import REPOSITORY, _clean_environ, forks, free_port
from tests.test_kill import HANGS_AFTER_S, complete, kill_somewhere, printed, recorded, same_as, whole_files, write

SERVER, WORKER = 0, 1
TIMEOUT_S = 5
# SCAFFOLD, so that workers write too.
SECTIONS = {
    "client": {"scaffold": True, "optimizer": "sgd", "lr": 2.0},
    "server": {"optimizer": "sgd", "lr": 1.0},
    "federation": {"rounds": 6},
    "runtime": {"timeout_s": TIMEOUT_S},
}


@pytest.fixture(scope="module")
def context() -> ForkServerContext:
    return forks()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert main([str(write(folder, folder / "run", **SECTIONS))]) == 0
    return folder / "run"


class Running:
    """Ranks of one run, most often the server and a worker; nothing of them is left at the end of the block."""

    def __init__(
        self,
        context: ForkServerContext,
        path: Path,
        failing: int | None = None,
        act: str = "",
        moment: str = "",
        ranks: int = 2,
    ) -> None:
        self.logs = [path.with_name(f"rank-{rank}") for rank in range(ranks)]
        for log in path.parent.glob("rank-*.*"):  # of an earlier launch, if this one is killed before it makes its own
            log.unlink()
        common = {
            **_clean_environ(),
            "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
        }  # fmt: skip
        self.processes = []
        for rank, log in enumerate(self.logs):
            environ = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            fails = (act, moment) if rank == failing else ("", "")
            self.processes.append(context.Process(target=run, args=(rank, environ, [str(path)], str(log), *fails)))
        for process in self.processes:
            process.start()

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            process.join()

    def wait(self, rank: int, timeout_s: float) -> int | None:
        """The exit code of `rank`; its end is waited for so long at most."""
        self.processes[rank].join(timeout_s)
        code = self.processes[rank].exitcode
        assert code is not None, f"rank {rank} still runs\n{self.out(0)}{self.err(0)}{self.err(1)}"
        return code

    def out(self, rank: int) -> str:
        path = Path(f"{self.logs[rank]}.out")
        return path.read_text() if path.exists() else ""  # it may have been killed before

    def err(self, rank: int) -> str:
        path = Path(f"{self.logs[rank]}.err")
        return path.read_text() if path.exists() else ""

    def said(self) -> list[str]:
        """The lines of the program on stderr, of all ranks."""
        ranks = range(len(self.logs))
        return [line for rank in ranks for line in self.err(rank).splitlines() if line.startswith("fedhpc: ")]


def resumes(context: ForkServerContext, path: Path, whole: Path) -> None:
    """The same command goes on, to the same end."""
    with Running(context, path) as running:
        assert [running.wait(rank, HANGS_AFTER_S) for rank in (0, 1)] == [0, 0], running.said()
    same_state(whole, path.with_suffix(""))


def same_state(*runs: Path) -> None:
    """The same bits: payload, rows, c and every c_i."""
    same_as(*runs)
    (one, _), (other, _) = (load_tensors(d / CHECKPOINT) for d in runs)
    assert one["control"].any()
    for name in ("theta", "control", "versions"):
        assert one[name].tobytes() == other[name].tobytes(), name
    states = [{str(f.relative_to(d)): f for f in (d / "clients").rglob("*.safetensors")} for d in runs]
    assert states[0].keys() == states[1].keys()
    for name in states[0]:
        one, other = (load_tensors(files[name])[0]["control"] for files in states)
        assert one.tobytes() == other.tobytes(), name


ACTS = ("kill", "stop", "exception", "memory")
MOMENTS = {
    SERVER: ("start-up", "collective", "server step", "checkpoint"),
    WORKER: ("start-up", "local training", "collective", "client state"),
}
# Every failure and every moment once for each of them; all the others by hand.
SOME = {
    SERVER: {"memory": "start-up", "stop": "collective", "exception": "server step", "kill": "checkpoint"},
    WORKER: {"exception": "start-up", "memory": "local training", "stop": "collective", "kill": "client state"},
}


@pytest.mark.parametrize(
    ("who", "act", "moment"),
    [
        pytest.param(
            who,
            act,
            moment,
            marks=pytest.mark.slow if SOME[who][act] == moment else pytest.mark.soak,
            id=f"{'server' if who == SERVER else 'worker'}-{act}-{moment}",
        )
        for who in (SERVER, WORKER)
        for moment in MOMENTS[who]
        for act in ACTS
    ],
)
def test_a_cell(context: ForkServerContext, whole: Path, tmp_path: Path, who: int, act: str, moment: str) -> None:
    path = write(tmp_path, tmp_path / "run", **SECTIONS)
    other = 1 - who
    with Running(context, path, who, act, moment) as running:
        stopped = -signal.SIGKILL if act == "kill" else 1
        assert running.wait(other, HANGS_AFTER_S) == 1, running.said()
        if act == "stop":
            os.kill(running.processes[who].pid, signal.SIGCONT)
        assert running.wait(who, HANGS_AFTER_S) == stopped, running.said()
        said, seen = running.said(), printed(running.out(0))
        cause = {
            "kill": f"rank {who} died",
            "stop": f"rank {who} was silent for {TIMEOUT_S} s",
            "exception": f"rank {who}: ValueError: the sky fell",
            "memory": f"rank {who}: ",
        }[act]
        assert all(line.startswith(f"fedhpc: error: {cause}") for line in said), (cause, said)
        # A stopped server hears of it when it goes on, and says it too.
        assert len(said) == 1 or (len(said) == 2 and (who, act) == (SERVER, "stop")), said
        if act == "memory":
            assert "can't allocate memory" in said[0]
    if moment == "start-up":
        assert not (tmp_path / "run").exists()
    else:
        whole_files(tmp_path / "run")
        status = json.loads((tmp_path / "run" / "status.json").read_text())
        assert status["state"] == "failed" and cause in status["reason"], status
        assert recorded(tmp_path / "run") >= seen >= 1
        assert seen < 6
    resumes(context, path, whole)


def contents(folder: Path) -> dict[Path, bytes]:
    """Every file but the lock, which has the last process in it."""
    return {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["checkpoint", "results"])
def test_a_damaged_file(context: ForkServerContext, whole: Path, tmp_path: Path, name: str) -> None:
    """Refused by all ranks, with one line; nothing is changed. What is whole again goes on."""
    path, run_dir = write(tmp_path, tmp_path / "run", **SECTIONS), tmp_path / "run"
    with Running(context, path, WORKER, "exception", "local training") as running:
        assert [running.wait(rank, HANGS_AFTER_S) for rank in (0, 1)] == [1, 1]
    damaged = run_dir / CHECKPOINT if name == "checkpoint" else run_dir / "results.h5"
    before = damaged.read_bytes()
    damaged.write_bytes(before[: len(before) // 2])
    content = contents(run_dir)
    with Running(context, path) as running:
        assert [running.wait(rank, HANGS_AFTER_S) for rank in (0, 1)] == [2, 2]
        (said,) = running.said()
        assert damaged.name in said and "--fresh" in said
    assert content == contents(run_dir)
    damaged.write_bytes(before)
    resumes(context, path, whole)


@pytest.mark.slow
def test_a_full_disk_where_a_worker_writes(context: ForkServerContext, whole: Path, tmp_path: Path) -> None:
    """The state of the clients, on a file system of its own; what the server writes: test_kill.test_a_full_disk."""
    path, clients = write(tmp_path, tmp_path / "run", **SECTIONS), tmp_path / "run" / "clients"
    with Running(context, path, WORKER, "exception", "local training") as running:
        assert [running.wait(rank, HANGS_AFTER_S) for rank in (0, 1)] == [1, 1]
    shutil.copytree(clients, tmp_path / "copy")
    mounting = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(clients)]
    if os.geteuid() != 0 or subprocess.call(mounting, stderr=subprocess.DEVNULL):
        pytest.skip("may not mount a small file system here")
    try:
        shutil.copytree(tmp_path / "copy", clients, dirs_exist_ok=True)
        with contextlib.suppress(OSError), open(clients / "filler", "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(4096))
        with Running(context, path) as running:
            assert [running.wait(rank, HANGS_AFTER_S) for rank in (0, 1)] == [1, 1]
            (said,) = running.said()
            assert "rank 1: " in said and "No space left on device" in said and "make room" in said
        whole_files(tmp_path / "run")
        (clients / "filler").unlink()
        resumes(context, path, whole)
    finally:
        subprocess.check_call(["umount", str(clients)])


# ---------------------------------------------------------------- at random


def kill_at_random(
    context: ForkServerContext,
    path: Path,
    rng: np.random.Generator,
    lasts_s: float,
    alone: bool,
) -> tuple[bool, float]:
    """Start, kill one of two or three ranks, see all of them end: whether the kill found it running, and how long
    the others took to end.

    Between the fork and the end of the run, which lasts `lasts_s`, with a launcher that sends SIGTERM to the others; or
    `alone`, in the first half of that after the start, and liveness has to notice.
    """
    ranks = int(rng.integers(2, 4))
    with Running(context, path, ranks=ranks) as running:
        while alone and " ranks over " not in running.out(SERVER):
            assert running.processes[SERVER].is_alive(), running.said()
            time.sleep(0.005)
        time.sleep(rng.random() * lasts_s * (0.5 if alone else 1.0))
        victim = running.processes[int(rng.integers(ranks))]
        victim.kill()
        victim.join()
        began = time.monotonic()
        if not alone:
            for process in running.processes:
                process.terminate()
        codes = [running.wait(rank, HANGS_AFTER_S) for rank in range(ranks)]
        took_s = time.monotonic() - began
        # SIGTERM may come before the program can see it.
        expected = {0, 1, 75, -signal.SIGKILL} | (set() if alone else {-signal.SIGTERM})
        assert set(codes) <= expected, (codes, running.said())
        output = running.out(SERVER)
    whole_files(path.with_suffix(""))
    assert recorded(path.with_suffix("")) >= (printed(output) or -1), output
    return -signal.SIGKILL in codes, took_s


@pytest.mark.parametrize("kills", [pytest.param(8, marks=pytest.mark.slow), pytest.param(200, marks=pytest.mark.soak)])
def test_killed_at_random_and_resumed(context: ForkServerContext, whole: Path, tmp_path: Path, kills: int) -> None:
    """Every launch goes on where the one before was killed; every twentieth is a real torchrun."""
    rng = np.random.default_rng(11)
    path = write(tmp_path, tmp_path / "run", **{**SECTIONS, "runtime": {"timeout_s": 60}})
    for _ in range(2):  # the first one pays for the imports
        shutil.rmtree(tmp_path / "run", ignore_errors=True)
        began = time.monotonic()
        with Running(context, path) as running:
            assert [running.wait(rank, HANGS_AFTER_S) for rank in (0, 1)] == [0, 0], running.said()
        lasts_s = time.monotonic() - began
    shutil.rmtree(tmp_path / "run")
    killed = missed = completed = launches = 0
    slowest_s = 0.0
    while killed < kills:
        if complete(tmp_path / "run"):  # begin again: every kill shall hit something
            completed += 1
            same_state(whole, tmp_path / "run")
            shutil.rmtree(tmp_path / "run")
        launches += 1
        if launches % 20 == 0:
            found, took_s = kill_somewhere(path, "torchrun", rng, 2, launches % 40 == 0)
        else:
            found, took_s = kill_at_random(context, path, rng, lasts_s, launches % 2 == 0)
        killed, missed = killed + found, missed + (not found)
        slowest_s = max(slowest_s, took_s)
        lasts_s *= 1.05 if found else 0.8  # as the machine is busy
        # Nothing lost, everything readable, the same bits: or there would be no next line.
        print(
            f"{killed} kills, {missed} too late, {completed} runs complete, others gone within {slowest_s:.1f} s, "
            f"{time.monotonic() - began:.0f} s in all",
            flush=True,
        )  # seen with -s
    resumes(context, path, whole)
