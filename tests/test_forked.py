"""Ranks that are forked from one process: a run like any other, and one that leaves nothing behind."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest

from fedhpc.errors import UserError
from fedhpc.ranks import fork, startup
from fedhpc.ranks.launch import Launch
from fedhpc.results.status import read_status
from tests.federations import federate, settings, write_texts
from tests.ranks import free_port

REPOSITORY = Path(__file__).resolve().parent.parent


def tree(folder: Path, rounds: int) -> dict[str, dict[str, object]]:
    return {
        "model": {"name": str(folder / "model")},
        "data": {"source": str(folder), "max_length": 96},
        "partition": {"name": "iid", "num_clients": 6},
        "method": {"name": "prefix", "num_virtual_tokens": 2},
        "federation": {"rounds": rounds, "cohort_size": 4},
        "client": {"optimizer": "sgd", "lr": 0.1, "batch_size": 4, "steps": 2},
        "evaluation": {"every": 2, "metrics": ["loss"], "max_examples": 4, "samples": 0},
    }


def started(folder: Path, run: Path, rounds: int, *more: str) -> subprocess.Popen[str]:
    run.mkdir()
    path = run / "given.yaml"
    path.write_text(settings(run / "run", tree(folder, rounds)).to_yaml())
    command = [sys.executable, "-m", "fedhpc.main", str(path), "--ranks", "3", *more]
    environment = {name: v for name, v in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def final(run: Path) -> np.ndarray:
    with h5py.File(run / "results.h5") as file:
        assert file.attrs["complete"]
        return np.asarray(file["final/prompt_embeddings"])


def test_forked_ranks_end_with_the_bits_of_one(tmp_path: Path) -> None:
    folder = write_texts(tmp_path)
    with started(folder, tmp_path / "forked", 2) as process:
        out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, ""), out
    assert "3 ranks over gloo" in out and out.count("round 2/2") == 1
    federate(settings(tmp_path / "one", tree(folder, 2)))
    assert np.array_equal(final(tmp_path / "forked" / "run"), final(tmp_path / "one"))


def nodes(folder: Path, run: Path, rounds: int, *more: str) -> list[subprocess.Popen[str]]:
    """One process for each of two nodes, as a launcher starts them, with two ranks each."""
    run.mkdir()
    path = run / "given.yaml"
    path.write_text(settings(run / "run", tree(folder, rounds)).to_yaml())
    command = [sys.executable, "-m", "fedhpc.main", str(path), "--ranks-per-node", "2", *more]
    environment = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1"}
    environment |= {"LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, **environment, "RANK": str(node)},
        )
        for node in range(2)
    ]  # fmt: skip


@pytest.mark.slow
def test_one_process_a_node_forks_its_ranks(tmp_path: Path) -> None:
    """The bits are those of one process; a killed process takes its ranks and those of the other node along."""
    folder = write_texts(tmp_path)
    ended = [(one.communicate(timeout=120), one.returncode) for one in nodes(folder, tmp_path / "nodes", 2)]
    assert [(err, code) for (_, err), code in ended] == [("", 0), ("", 0)], ended
    assert "4 ranks over gloo" in ended[0][0][0] and not ended[1][0][0]
    federate(settings(tmp_path / "one", tree(folder, 2)))
    assert np.array_equal(final(tmp_path / "nodes" / "run"), final(tmp_path / "one"))
    first, second = nodes(folder, tmp_path / "killed", 100_000)
    ranks = [*ranks_after_two_rounds(first), *psutil.Process(second.pid).children()]
    assert len(ranks) == 4
    second.kill()
    err = first.communicate(timeout=60)[1]
    assert (first.returncode, err) == (1, "fedhpc: error: the launcher died\n")
    assert not psutil.wait_procs(ranks, timeout=10)[1]
    second.communicate()


@pytest.mark.usefixtures("unchanged")
def test_the_death_of_the_launcher_ends_the_one_that_waits() -> None:
    """Its ranks end by that: liveness watches over the process that has forked them."""
    if (pid := os.fork()) == 0:
        fork.run(fork.launches(2, Launch()), lambda _: time.sleep(4), launcher=1 + os.getppid())
        os._exit(77)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == startup.FAILED


def test_ranks_of_several_nodes_follow_each_other() -> None:
    of_second = fork.launches(3, Launch("slurm", 1, 2, 0, 1, "n0", 20001, job="7.0.0"))
    assert [(one.rank, one.world_size, one.local_rank, one.local_world_size) for one in of_second] == [
        (3, 6, 0, 3), (4, 6, 1, 3), (5, 6, 2, 3),
    ]  # fmt: skip
    assert {(one.launcher, one.master_addr, one.master_port, one.job) for one in of_second} == {
        ("slurm", "n0", 20001, "7.0.0")
    }
    assert {one.launcher for one in fork.launches(2, Launch("mpi", 0, 1, 0, 1))} == {"forked"}


def ranks_after_two_rounds(process: subprocess.Popen[str]) -> list[psutil.Process]:
    for line in process.stdout or ():
        if line.startswith("round 2/"):
            break
    return psutil.Process(process.pid).children()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "state"), [(signal.SIGTERM, 75, "preempted"), (signal.SIGKILL, 1, "failed")]
)
def test_what_ends_one_ends_all(tmp_path: Path, number: signal.Signals, code: int, state: str) -> None:
    """SIGTERM to the process that was started, SIGKILL to one of the ranks."""
    folder = write_texts(tmp_path)
    with started(folder, tmp_path / "forked", 100_000) as process:
        ranks = ranks_after_two_rounds(process)
        os.kill(process.pid if number == signal.SIGTERM else ranks[2].pid, number)
        process.communicate(timeout=300)
    assert process.returncode == code
    assert not psutil.wait_procs(ranks, timeout=10)[1]
    status = read_status(tmp_path / "forked" / "run")
    assert status is not None and status.state == state


@pytest.mark.slow
def test_the_death_of_the_one_that_waits_ends_all(tmp_path: Path) -> None:
    folder = write_texts(tmp_path)
    with started(folder, tmp_path / "forked", 100_000) as process:
        ranks = ranks_after_two_rounds(process)
        process.kill()
        process.wait()
        assert not psutil.wait_procs(ranks, timeout=10)[1]


def leave(launch: Launch) -> None:
    """Rank 1 goes at once, before there is any liveness; the others would wait for long."""
    if launch.rank == 1:
        os._exit(3)
    time.sleep(60)


@pytest.fixture
def unchanged() -> Iterator[None]:
    """`fork.run` leaves no process behind; what else it changes in this one is put back."""
    handlers = {number: signal.getsignal(number) for number in fork.SIGNALS}
    before = set(psutil.Process().children())
    yield
    gc.unfreeze()
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert set(psutil.Process().children()) == before


@pytest.mark.usefixtures("unchanged")
def test_a_rank_that_leaves_early_takes_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fork, "_PARTING_S", 0.2)
    assert fork.run(fork.launches(3, Launch()), leave) == 3


def starting(launch: Launch) -> None:
    with startup.guarded(launch):
        time.sleep(20)
    os._exit(0)


@pytest.mark.usefixtures("unchanged")
def test_a_signal_between_two_forks_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    real_fork = os.fork

    def forked_and_ended() -> int:
        if pid := real_fork():
            signal.pthread_kill(threading.get_ident(), signal.SIGTERM)  # libraries have threads in a test
        return pid

    monkeypatch.setattr(os, "fork", forked_and_ended)
    signal.signal(signal.SIGTERM, lambda *_: None)  # lost, not the death of the tests
    assert fork.run(fork.launches(3, Launch()), starting) == startup.PREEMPTED
    assert capfd.readouterr().err == "fedhpc: preempted by SIGTERM while starting; nothing was changed\n"


@pytest.mark.usefixtures("unchanged")
def test_a_rank_that_cannot_be_started_takes_the_others_along(monkeypatch: pytest.MonkeyPatch) -> None:
    real_fork, forks = os.fork, 0

    def forked_once() -> int:
        nonlocal forks
        forks += 1
        if forks == 2:
            raise BlockingIOError(errno.EAGAIN, "no more processes")
        return real_fork()

    monkeypatch.setattr(os, "fork", forked_once)
    with pytest.raises(UserError, match=r"of 3 ranks here, rank 1 cannot be started \(no more processes\)"):
        fork.run(fork.launches(3, Launch()), starting)


@pytest.mark.parametrize(
    ("words", "environment", "said"),
    [
        (["--ranks", "0"], {}, "--ranks 0: at least one is needed"),
        (["--ranks", "3"], {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, "torchrun has started this one"),
        (["--ranks", "3", "runtime.transport=mpi"], {}, "runtime.transport: mpi: ranks that are forked have no MPI"),
        (["--ranks-per-node", "0"], {}, "--ranks-per-node 0: at least one is needed"),
        (["--ranks", "3", "--ranks-per-node", "3"], {}, "give one"),
        (
            ["--ranks-per-node", "3"],
            {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"},
            "torchrun has started 2 processes here; start one on each node",
        ),
        (
            ["--ranks-per-node", "3"],
            {"PMIX_RANK": "0"},
            "mpi has started an unknown number of processes here; start one on each",
        ),
        (["--ranks", "3", "model.name=./none"], {}, "'./none' is not a model folder"),
    ],
)
def test_what_is_refused(words: list[str], environment: dict[str, str], said: str) -> None:
    command = [sys.executable, "-m", "fedhpc.main", *words]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment}, check=False)
    assert done.returncode == 2
    assert said in done.stderr and len(done.stderr.splitlines()) == 1
