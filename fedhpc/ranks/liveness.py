"""Liveness: a failing, killed, stopped or signalled rank ends every rank, soon and with the same code.

One mechanism for all transports. A daemon thread per rank talks to rank 0's over plain TCP (a star): one byte
every second, so that silence means trouble however long the main threads train, and one line of JSON when a
run must end. Rank 0 alone decides: it collects the evidence, calls `on_exit`, tells the others, leaves last.

The thread also reads signals (through signal.set_wakeup_fd) and watches the launcher, so both work while the
main thread is blocked inside a collective. fedhpc.ranks.star has the connections.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from fedhpc.ranks.launch import Launch
from fedhpc.ranks.star import Star
from fedhpc.ranks.startup import FAILED, PREEMPTED, SIGNALS
from fedhpc.ranks.transport.base import Transport

_SYMPTOM_WAIT_S = 0.5  # how long to wait for the cause after a symptom, like a broken collective
_VERDICT_WAIT_S = 3.5  # how long a rank with evidence waits for rank 0's verdict before it leaves alone
_ON_EXIT_LIMIT_S = 2.0  # a hanging file system must not keep the ranks from ending
_GRACE_S = 1.0  # rank 0 leaves when the others have left, at the latest after this time
_REASON_LIMIT = 4000


@dataclass(frozen=True)
class _Evidence:
    """Why the run should end, and with which exit code. A cause that becomes known replaces a `symptom`."""

    code: int
    reason: str
    symptom: bool = False
    run: str = ""  # of several runs in these processes the one whose failure it is; empty: it is everybody's


class Liveness:
    """Watches over the ranks of `transport` between `start` and `stop`.

    on_exit(code, reason, run) is called once, before any rank leaves: by rank 0, or by rank 1 if rank 0 is the one that
    was lost. It runs in its own thread and has two seconds. Then every rank ends with exit code `code` through
    transport.abort, whatever its main thread does.

    timeout_s bounds the silence of a rank's liveness thread, which is silent when its process is stopped, cut off, or
    kept from Python's lock (by an import, up to 20 s). Long work in the main thread is not silence.
    """

    def __init__(
        self,
        transport: Transport,
        launch: Launch,
        timeout_s: float,
        on_exit: Callable[[int, str, str], None],
    ) -> None:
        self._transport = transport
        self._launch = launch
        self._rank = transport.rank
        self._timeout_s = timeout_s
        self._on_exit = on_exit
        self._interval_s = min(1.0, timeout_s / 10)
        self._tick_s = min(0.25, self._interval_s)
        self._star = Star(transport, launch, timeout_s)
        self._failures: queue.SimpleQueue[_Evidence] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._evidence: _Evidence | None = None
        self._decide_at = 0.0
        self._beat_at = 0.0
        self._reported: list[float] = []  # what rank 0 was told last of this rank's progress
        self._done_sent = False
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Connect all ranks and begin to watch. Collective, to be called in the main thread."""
        self._parent = os.getppid()
        self._wake_read, self._wake_write = socket.socketpair()
        self._wake_read.setblocking(False)
        self._wake_write.setblocking(False)
        self._star.connect()
        self._star.watch(self._wake_read)
        self._wakeup = signal.set_wakeup_fd(self._wake_write.fileno(), warn_on_full_buffer=False)
        # Without a Python handler the default action would end the process before the thread sees the signal.
        self._handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)
        self._thread.start()

    def fail(self, code: int, reason: str, *, symptom: bool = False, run: str = "") -> NoReturn:
        """End every rank with exit code `code`; the main thread's last call after an exception.

        symptom: marks a failed collective (TransportError). The death of the peer that caused it, or that peer's own
        explanation, is reported in its place if it becomes known within half a second. run: the name of the one whose
        failure it is, of several in these processes.
        """
        reason = " ".join(reason.split())[:_REASON_LIMIT]
        if self._rank > 0:
            reason = f"rank {self._rank}: {reason}"
        evidence = _Evidence(code, reason, symptom, run)
        if self._thread is None or not self._thread.is_alive():
            self._leave(evidence)
        self._failures.put(evidence)
        self._wake()
        self._thread.join()
        self._transport.abort(code)

    def stop(self) -> None:
        """End the watch. Collective: it returns once every rank has called it."""
        if self._thread is None:
            return
        self._stopping.set()
        self._wake()
        self._thread.join()
        self._thread = None
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._star.close()
        self._wake_read.close()
        self._wake_write.close()

    # ---- watching

    def _watch(self) -> None:
        self._stepped_at = time.monotonic()
        try:
            while not self._finished():
                self._step()
        except Exception:
            traceback.print_exc()
            self._transport.abort(FAILED)

    def _step(self) -> None:
        ready = self._star.select(self._tick_s)
        now = time.monotonic()
        # While this process was stopped, or could not get Python's lock, it heard nobody: the others were not silent.
        overslept = now - self._stepped_at - self._tick_s
        self._stepped_at = now
        if overslept > self._tick_s:
            for peer in self._star.peers.values():
                peer.heard += overslept
        # Connections before signals: a launcher that sees a rank die sends SIGTERM to the others.
        for connection in sorted(ready, key=lambda connection: connection is self._wake_read):
            if connection is self._wake_read:
                self._read_wakeups()
            elif (heard := self._star.read(connection)) is not None:
                self._read(*heard)
        self._check(now)
        if self._evidence is not None and now >= self._decide_at:
            self._leave(self._evidence)

    def _read(self, rank: int, alive: bool) -> None:
        """Act on the lines that a rank has sent, and on the end of its connection."""
        peer = self._star.peers[rank]
        for line in self._star.lines(rank):
            message = json.loads(line)
            if "fail" in message:
                self._accuse(_Evidence(*message["fail"]))
            elif "exit" in message:
                self._obey(_Evidence(*message["exit"]))
            elif "progress" in message:
                self._transport.progress.hear(rank, message["progress"])
            else:
                peer.done = True
        if alive:
            return
        self._star.ended(rank)
        if self._rank == 0 or not peer.done:
            self._lose(rank, f"rank {rank} died (connection closed)")

    def _read_wakeups(self) -> None:
        # A byte is a signal's number, or 0 from the main thread.
        for number in self._wake_read.recv(4096):
            if number in SIGNALS:
                self._accuse(_Evidence(PREEMPTED, SIGNALS[signal.Signals(number)]))
        with contextlib.suppress(queue.Empty):
            while True:
                self._accuse(self._failures.get_nowait())

    def _check(self, now: float) -> None:
        self._star.drop_the_silent(now)
        if now >= self._beat_at:
            self._beat_at = now + self._interval_s
            self._star.beat()
            report = self._transport.progress.report()
            if self._rank > 0 and report != self._reported:
                self._reported = report
                self._star.send(0, {"progress": report})
        for rank, peer in self._star.peers.items():
            if now > peer.heard + self._timeout_s:
                self._lose(rank, f"rank {rank} was silent for {self._timeout_s:g} s: stopped or cut off", silent=True)
        if self._launch.launcher != "single" and os.getppid() != self._parent:
            self._accuse(_Evidence(FAILED, "the launcher died"))

    def _finished(self) -> bool:
        """Whether every rank has called stop()."""
        if self._stopping.is_set() and not self._done_sent and self._rank > 0:
            self._done_sent = True
            self._star.send(0, {"done": True})
        if self._rank > 0:
            return self._star.peers[0].done
        if not self._stopping.is_set() or not all(peer.done for peer in self._star.peers.values()):
            return False
        self._star.part({"done": True}, _GRACE_S)
        return True

    # ---- ending

    def _accuse(self, evidence: _Evidence) -> None:
        """Take note of evidence: the first cause, or else the first symptom. Rank 0 is told, and decides."""
        if self._evidence is not None and (evidence.symptom or not self._evidence.symptom):
            return
        now = time.monotonic()
        if self._rank == 0:
            self._decide_at = now + (_SYMPTOM_WAIT_S if evidence.symptom else 0.0)
        else:
            self._decide_at = self._decide_at if self._evidence else now + _VERDICT_WAIT_S
            self._star.send(0, {"fail": [evidence.code, evidence.reason, evidence.symptom, evidence.run]})
        self._evidence = evidence

    def _lose(self, rank: int, reason: str, *, silent: bool = False) -> None:
        """Handle the loss of a rank. If it is rank 0, there is no verdict to wait for, and rank 1 calls on_exit."""
        self._accuse(_Evidence(FAILED, reason))
        if rank == 0:
            assert self._evidence is not None
            if self._rank == 1:
                self._report(self._evidence)
            elif silent and self._launch.local_rank == 0:
                # This host may be the one that is cut off: then the message of another host is not in its log.
                sys.stderr.write(f"fedhpc: error: rank {self._rank}: {self._evidence.reason}\n")
                sys.stderr.flush()
            self._transport.abort(self._evidence.code)

    def _obey(self, verdict: _Evidence) -> NoReturn:
        if self._transport.aborts_all:
            time.sleep(_GRACE_S)  # rank 0's abort ends this process too, with one message instead of many
        self._transport.abort(verdict.code)

    def _leave(self, verdict: _Evidence) -> NoReturn:
        if self._rank == 0:
            self._report(verdict)
            self._star.part({"exit": [verdict.code, verdict.reason]}, _GRACE_S)
        self._transport.abort(verdict.code)

    def _report(self, verdict: _Evidence) -> None:
        def report() -> None:
            self._on_exit(verdict.code, verdict.reason, verdict.run)
            # The process ends without Python's clean-up, which would flush the streams.
            sys.stdout.flush()
            sys.stderr.flush()

        thread = threading.Thread(target=report, name="on_exit", daemon=True)
        thread.start()
        thread.join(_ON_EXIT_LIMIT_S)

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # a full buffer wakes as well
            self._wake_write.send(b"\0")
