"""Every way a run can end early, with real processes; and the side thread's rules, in this process."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil
import pytest

from fedhpc.ranks.launch import Launch
from fedhpc.ranks.liveness import Liveness
from fedhpc.ranks.transport.base import LoopbackTransport
from tests.ranks import Launcher, Ranks

# The recorder's abort ends the side thread with SystemExit, where a real one ends the process.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Exception in thread liveness:pytest.PytestUnhandledThreadExceptionWarning"
)
RANK = str(Path(__file__).with_name("liveness_rank.py"))
Action = Callable[[Ranks], None]


def send(number: signal.Signals, *ranks: int) -> Action:
    def act(running: Ranks) -> None:
        processes = running.rank_processes()
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):  # the first may have ended them all by then
                processes[rank].send_signal(number)

    return act


def send_launcher(number: signal.Signals) -> Action:
    return lambda running: running.processes[0].send_signal(number)


def nothing(running: Ranks) -> None:
    pass


def run(
    tmp_path: Path,
    launcher: Launcher,
    scenario: str,
    action: Action = nothing,
    timeout_s: float = 60,
    n: int = 3,
    within_s: float = 60,
) -> tuple[list[int], str]:
    """The exit codes and the status written, of ranks that all ended within `within_s` of `action`."""
    status = tmp_path / "status"
    status.touch()
    with Ranks(n, [RANK, scenario, str(timeout_s), str(status)], launcher) as running:
        running.wait_for("ready", n)
        time.sleep(0.3)
        action(running)
        results = running.wait(within_s)
        assert not running.survivors(0)
    return [result.code for result in results], status.read_text().strip()


# ---- the quick representatives


def test_a_killed_rank_ends_the_others(tmp_path: Path) -> None:
    codes, status = run(tmp_path, "env", "sleep_on_last", send(signal.SIGKILL, 1))
    assert codes == [1, -9, 1]
    assert status == "0 1 rank 1 died (connection closed)"


def test_sigterm_to_one_rank_preempts_all_while_they_are_blocked(tmp_path: Path) -> None:
    codes, status = run(tmp_path, "env", "sleep_on_last", send(signal.SIGTERM, 1))
    assert codes == [75, 75, 75]
    assert status == "0 75 preempted by SIGTERM"


# ---- all of them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "scenario", "timeout_s"),
    [
        ("forked", "clean", 60),
        ("forked", "long_work", 2),
        ("mpiexec", "long_work", 2),
        ("forked", "uneven_end", 1),
        ("forked", "hold_lock", 10),
    ],
)
def test_what_must_not_end_a_run(tmp_path: Path, launcher: Launcher, scenario: str, timeout_s: float) -> None:
    codes, status = run(tmp_path, launcher, scenario, timeout_s=timeout_s, within_s=30)
    assert set(codes) == {0}
    assert status == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scenario", "action", "codes", "status"),
    [
        ("raise", nothing, [1, 1, 1], "0 1 rank 1: the model does not fit"),
        ("raise_on_0", nothing, [1, 1, 1], "0 1 the disk is full"),
        ("sleep_on_last", send(signal.SIGKILL, 0), [-9, 1, 1], "1 1 rank 0 died (connection closed)"),
        ("sleep_on_last", send(signal.SIGUSR2, 0, 1, 2), [75, 75, 75], "0 75 preempted by SIGUSR2"),
        ("sleep_on_last", send(signal.SIGINT, 0, 1, 2), [75, 75, 75], "0 75 interrupted"),
    ],
)
def test_one_code_on_all_ranks(tmp_path: Path, scenario: str, action: Action, codes: list[int], status: str) -> None:
    assert run(tmp_path, "forked", scenario, action) == (codes, status)


@pytest.mark.slow
def test_a_stopped_rank_ends_the_others(tmp_path: Path) -> None:
    status = tmp_path / "status"
    with Ranks(3, [RANK, "sleep_on_last", "2", str(status)], "forked") as running:
        running.wait_for("ready", 3)
        stopped = running.rank_processes()[1]
        stopped.suspend()
        assert [running.processes[rank].wait(60) for rank in (0, 2)] == [1, 1]
        stopped.resume()  # it has the verdict in its socket
        assert [result.code for result in running.wait(60)] == [1, 1, 1]
    assert "rank 1 was silent for 2 s" in status.read_text()


@pytest.mark.slow
def test_a_suspended_job_goes_on(tmp_path: Path) -> None:
    """Slurm suspends whole jobs: nobody heard the others, and nobody is to blame."""
    status = tmp_path / "status"
    status.touch()
    with Ranks(3, [RANK, "long_work", "2", str(status)], "forked") as running:
        running.wait_for("ready", 3)
        processes = running.rank_processes().values()
        for process in processes:
            process.suspend()
        time.sleep(4)
        for process in processes:
            process.resume()
        assert [result.code for result in running.wait(30)] == [0, 0, 0]
    assert status.read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "scenario", "action"),
    [
        pytest.param(launcher, scenario, action, id=f"{case}-{launcher}")
        for case, scenario, action, launchers in [
            ("raise", "raise", nothing, ("torchrun", "mpiexec")),
            # Of torchrun: test_kill.py, with the whole program.
            ("kill_0", "sleep_on_last", send(signal.SIGKILL, 0), ("mpiexec",)),
            ("kill_1", "sleep_on_last", send(signal.SIGKILL, 1), ("mpiexec",)),
            ("kill_launcher", "sleep_on_last", send_launcher(signal.SIGKILL), ("torchrun", "mpiexec")),
            ("term_launcher", "sleep_on_last", send_launcher(signal.SIGTERM), ("torchrun", "mpiexec")),
        ]
        for launcher in launchers
    ],
)
def test_under_a_launcher(
    tmp_path: Path, launcher: Launcher, scenario: str, action: Action, request: pytest.FixtureRequest
) -> None:
    case = request.node.callspec.id
    (code,), status = run(tmp_path, launcher, scenario, action, n=3 if "kill_1" in case else 2)
    assert code != 0
    if "raise" in case:
        assert (code, status) == (1, "0 1 rank 1: the model does not fit")
    if "term_launcher" in case:
        # torchrun turns every code into 1
        assert (code, status) == (1 if launcher == "torchrun" else 75, "0 75 preempted by SIGTERM")
    if case == "kill_launcher-torchrun":  # mpiexec's proxies kill the ranks themselves
        assert status == "0 1 the launcher died"


# ---- the side thread's rules


class Recorder(LoopbackTransport):
    """A transport whose peers are played by the test, and whose abort can be looked at."""

    def __init__(self, world_size: int) -> None:
        super().__init__()
        self.world_size = world_size
        self.code: int | None = None
        self.said: dict[str, Any] = {}
        self.aborted = threading.Event()

    def broadcast_json(self, value: Any) -> Any:
        self.said = value
        return value

    def gather_json(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def abort(self, code: int) -> NoReturn:
        self.code = code
        self.aborted.set()
        raise SystemExit(code)


class Watched:
    """Rank 0 under liveness in this process."""

    def __init__(self, world_size: int, timeout_s: float = 5) -> None:
        self.transport = Recorder(world_size)
        self.exits: list[tuple[int, str]] = []
        self.blamed: list[str] = []  # the run of each
        self.peers: list[socket.socket] = []
        launch = Launch(world_size=world_size, local_world_size=world_size)
        self.liveness = Liveness(self.transport, launch, timeout_s, self.on_exit)

    def on_exit(self, code: int, reason: str, run: str) -> None:
        self.exits.append((code, reason))
        self.blamed.append(run)

    def connect(self, line: bytes | None = None) -> socket.socket:
        """A connection that has said `line`, by default the next rank's hello."""
        said = self.transport.said
        peer = socket.create_connection((said["address"], said["port"]), timeout=5)
        hello = {"token": said["token"], "rank": 1 + len(self.peers)}
        peer.sendall(json.dumps(hello).encode() + b"\n" if line is None else line)
        if line is None:
            self.peers.append(peer)
        return peer

    def verdict(self) -> tuple[int, str]:
        assert self.transport.aborted.wait(10)
        (verdict,) = self.exits
        assert verdict[0] == self.transport.code
        return verdict


@contextlib.contextmanager
def watched(world_size: int, timeout_s: float = 5) -> Iterator[Watched]:
    watch = Watched(world_size, timeout_s)
    watch.liveness.start()
    try:
        yield watch
    finally:
        for peer in watch.peers:
            with contextlib.suppress(OSError):
                peer.sendall(b'{"done": true}\n')
                peer.shutdown(socket.SHUT_WR)
        watch.liveness.stop()
        for peer in watch.peers:
            peer.close()


def tell(peer: socket.socket, code: int, reason: str, symptom: bool = False, run: str = "") -> None:
    peer.sendall(json.dumps({"fail": [code, reason, symptom, run]}).encode() + b"\n")


def test_a_rank_tells_which_of_several_runs_has_failed() -> None:
    with watched(2) as watch:
        tell(watch.connect(), 1, "rank 1: no room", run="b-s0")
        assert watch.verdict() == (1, "rank 1: no room") and watch.blamed == ["b-s0"]


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (signal.SIGTERM, "preempted by SIGTERM"),
        (signal.SIGUSR2, "preempted by SIGUSR2"),
        (signal.SIGINT, "interrupted"),
    ],
)
def test_signals_of_a_single_process(number: signal.Signals, reason: str) -> None:
    before = signal.getsignal(number)
    with watched(1) as watch:
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # Slurm and torchrun both send it
        assert watch.verdict() == (75, reason)
    assert signal.getsignal(number) is before


def test_stop_without_trouble() -> None:
    with watched(1) as watch:
        pass
    assert watch.exits == []
    watch.liveness.stop()


def test_fail_reports_and_ends() -> None:
    with watched(1) as watch:
        with pytest.raises(SystemExit):
            watch.liveness.fail(1, "out of memory")
        assert watch.verdict() == (1, "out of memory")
    unstarted = Watched(1)
    with pytest.raises(SystemExit):
        unstarted.liveness.fail(2, "no data")
    assert unstarted.verdict() == (2, "no data")


@pytest.mark.parametrize(
    "line",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"token": "0123", "rank": 1}\n',
        b'{"rank": 1}\n',
        b"[" * 400 + b"\n",
        b"x" * 4000,
        b"\xff\xfe\n",
        b'{"token": "\\ud800", "rank": 1}\n',
        b'{"token": ["a"], "rank": 1}\n',
        b'["token"]\n',
        b"1\n",
    ],
)
def test_strangers_are_dropped(line: bytes) -> None:
    with watched(2) as watch:
        stranger = watch.connect(line)
        with contextlib.suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
        stranger.close()
        silent = watch.connect(b"")
        watch.connect()
        assert watch.peers[0].recv(1) == b"\n"  # a heartbeat: let in, whatever else is connected
        assert watch.exits == []
        silent.close()


def test_a_token_lets_in_only_ranks_that_are_missing() -> None:
    with watched(3) as watch:
        token = watch.transport.said["token"]
        watch.connect()
        assert watch.peers[0].recv(1) == b"\n"
        for rank in (1, 0, 3, -1, True, "1", None):
            stranger = watch.connect(json.dumps({"token": token, "rank": rank}).encode() + b"\n")
            assert stranger.recv(1) == b"", rank
            stranger.close()
        watch.connect()
        assert watch.exits == []


def test_a_cause_is_preferred_to_a_symptom() -> None:
    with watched(3) as watch:
        first, second = watch.connect(), watch.connect()
        tell(second, 1, "rank 2: reduce failed: connection closed", symptom=True)
        time.sleep(0.1)
        first.close()
        assert watch.verdict() == (1, "rank 1 died (connection closed)")
        assert b'"exit": [1, "rank 1 died' in second.recv(4096)


def test_a_symptom_alone_is_reported_soon() -> None:
    with watched(2) as watch:
        watch.connect()
        began = time.monotonic()
        with pytest.raises(SystemExit):
            watch.liveness.fail(1, "reduce failed", symptom=True)
        assert watch.verdict() == (1, "reduce failed")
        assert 0.4 < time.monotonic() - began < 60


def test_a_peers_explanation_comes_before_its_end() -> None:
    with watched(2) as watch:
        peer = watch.connect()
        tell(peer, 1, "rank 1: out of memory")
        peer.close()
        assert watch.verdict() == (1, "rank 1: out of memory")


def test_silence_is_bounded_and_heartbeats_break_it() -> None:
    with watched(3, timeout_s=1) as watch:
        alive, _silent = watch.connect(), watch.connect()
        while not watch.transport.aborted.wait(0.2):
            with contextlib.suppress(OSError):
                alive.sendall(b"\n")
        code, reason = watch.verdict()
        assert code == 1
        assert "rank 2 was silent for 1 s" in reason


def test_a_rank_that_never_connects_is_silent() -> None:
    with watched(2, timeout_s=0.5) as watch:
        assert "rank 1 was silent" in watch.verdict()[1]


def test_a_hanging_on_exit_does_not_keep_the_ranks() -> None:
    transport = Recorder(1)
    release = threading.Event()
    liveness = Liveness(transport, Launch(), 30, lambda code, reason, run: release.wait(20) and None)
    liveness.start()
    os.kill(os.getpid(), signal.SIGTERM)
    assert transport.aborted.wait(4)
    release.set()
    liveness.stop()
