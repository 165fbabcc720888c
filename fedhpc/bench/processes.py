"""Runs programs of several processes and measures, from outside, the CPU seconds and memory of all of them together."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import subprocess
import sys
import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import connection
from pathlib import Path
from types import TracebackType

from fedhpc.errors import UserError

_TICK_S = 0.05
_EVERY = 12  # ticks between two measurements of memory, for which the kernel walks all pages
LIMIT_S = 900.0  # how long forked ranks may run
PARTING_S = 10.0  # how long the others may go on once one of them has failed
_HERTZ = os.sysconf("SC_CLK_TCK")


class Watched:
    """Starts commands and watches their processes and all of their children; a context manager that ends them all.

    commands: (arguments, environment) of each. on_line is called with the time and the text of each line that the first
    command writes.
    """

    def __init__(
        self,
        commands: Sequence[tuple[Sequence[str], Mapping[str, str]]],
        log: Path,
        on_line: Callable[[float, str], None] | None = None,
        cwd: Path | None = None,
    ) -> None:
        self.began = time.time()
        self._log = log
        self._commands = [" ".join(arguments) for arguments, _ in commands]
        self._seen: dict[int, float] = {}
        self._times, self._cpu = [self.began], [0.0]
        self.peak_pss_bytes = 0
        self._over = threading.Event()
        with log.open("wb") as errors:
            self._processes = [
                subprocess.Popen(
                    list(arguments),
                    env=dict(environment),
                    cwd=cwd,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE if on_line and number == 0 else errors,
                    stderr=errors,
                    text=True,
                    start_new_session=True,
                )
                for number, (arguments, environment) in enumerate(commands)
            ]
        self._threads = [threading.Thread(target=self._watch, daemon=True)]
        if on_line:
            self._threads.append(threading.Thread(target=self._read, args=(on_line,), daemon=True))
        for thread in self._threads:
            thread.start()

    def wait(self, limit_s: float) -> None:
        """Wait until all commands have ended. UserError where one failed or took too long."""
        deadline = self.began + limit_s
        codes: list[int | None] = []
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.0, deadline - time.time()))
            codes.append(process.poll())
        self.close()
        if any(codes) or None in codes:
            last_lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-8:]
            late = None in codes and not any(codes)
            why = f"was not done after {limit_s:.0f} s and was ended" if late else f"ended with {codes}"
            raise UserError(
                ": ".join([f"{self._commands[0]} {why}", *([" | ".join(last_lines)] if last_lines else [])])
            )

    def cpu_at(self, moment: float) -> float:
        """CPU seconds of all processes together, from their start until `moment`."""
        right = min(max(bisect_left(self._times, moment), 1), len(self._times) - 1)
        (a, b), (x, y) = self._times[right - 1 : right + 1], self._cpu[right - 1 : right + 1]
        return x + (y - x) * min(max((moment - a) / max(b - a, 1e-9), 0.0), 1.0)

    def close(self) -> None:
        """Kill the processes that still run."""
        for process in self._processes:
            if process.poll() is None:
                for pid in reversed(_family([process.pid])):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, 9)
                process.wait()
        self._over.set()
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Watched:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, on_line: Callable[[float, str], None]) -> None:
        stream = self._processes[0].stdout
        assert stream is not None
        for line in stream:
            on_line(time.time(), line)

    def _watch(self) -> None:
        number = 0
        while not self._over.wait(_TICK_S):
            pids = _family([process.pid for process in self._processes])
            for pid in pids:
                with contextlib.suppress(OSError, ValueError):
                    self._seen[pid] = _cpu_seconds(pid)
            self._times.append(time.time())
            self._cpu.append(sum(self._seen.values()))
            if number % _EVERY == 0:
                self.peak_pss_bytes = max(self.peak_pss_bytes, sum(map(_pss_bytes, pids)))
            number += 1


def _family(pids: Sequence[int]) -> list[int]:
    """These processes and their descendants, parents first."""
    family = list(pids)
    for pid in family:  # grows while it is read
        with contextlib.suppress(OSError):
            for task in os.listdir(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):
                    family += map(int, Path(f"/proc/{pid}/task/{task}/children").read_text().split())
    return family


def _cpu_seconds(pid: int) -> float:
    text = Path(f"/proc/{pid}/stat").read_text()
    fields = text[text.rindex(")") + 2 :].split()
    return (int(fields[11]) + int(fields[12])) / _HERTZ


def _pss_bytes(pid: int) -> int:
    """The memory of a process, with its equal share of what several processes share; 0 where it has ended."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


def forked(ranks: int, work: Callable[[int], None], why: Path) -> None:
    """Call work(rank) in one forked process per rank; they share the modules that this process has imported.

    UserError where a rank fails or they take too long; all of them are ended then. why: a file into which a rank may
    write the reason why it ends.
    """
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=work, args=(rank,), daemon=True) for rank in range(ranks)]
    deadline, failure = time.monotonic() + LIMIT_S, ""
    try:
        for process in processes:
            process.start()
        running = {process.sentinel: rank for rank, process in enumerate(processes)}
        while running:
            ended = connection.wait(running, max(0.0, deadline - time.monotonic()))
            if not ended:
                failure = failure or f"{len(running)} of {ranks} ranks still ran after {LIMIT_S:.0f} s"
                break
            for rank in [running.pop(sentinel) for sentinel in ended]:  # type: ignore[arg-type]
                processes[rank].join()
                code = processes[rank].exitcode
                if code and not failure:
                    failure = f"rank {rank} " + (f"was killed by signal {-code}" if code < 0 else f"left with {code}")
                    deadline = time.monotonic() + PARTING_S
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()
    if failure:
        raise UserError(f"{failure}: {why.read_text()}" if why.exists() else failure)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Print nothing inside this context."""
    sys.stdout.flush()
    stdout = os.dup(1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(stdout, 1)
        os.close(stdout)
        os.close(nowhere)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
