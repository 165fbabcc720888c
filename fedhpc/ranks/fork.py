"""Starts the ranks of one machine as forked children of one process, which imports the libraries once for all.

The children share its memory until they write to it, and need not import again. With three ranks this saves most of the
time to the first round, and half of the memory. Otherwise they are ranks like any others: ranks/liveness.py ends them
together.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing import connection

from fedhpc.errors import UserError
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.startup import FAILED, SIGNALS

_PARTING_S = 20.0  # how long the others may go on once one has failed; liveness ends them sooner


def run(ranks: int, work: Callable[[Launch], None]) -> int:
    """Fork `ranks` processes and call work(launch) in each, which must end its process; returns their exit code.

    Signals of a preemption are passed on to all of them. No other thread may run in this process. UserError where a
    rank cannot be started; the ranks that were started are ended then.
    """
    context = multiprocessing.get_context("fork")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    launches = [Launch("forked", rank, ranks, rank, ranks, "127.0.0.1", port) for rank in range(ranks)]
    processes = [context.Process(target=work, args=(launch,)) for launch in launches]

    def forward(number: int, _: object) -> None:
        for process in processes:
            if process.pid is not None and process.exitcode is None:
                os.kill(process.pid, number)

    # Hold signals back until somebody acts on them: `forward` in this process, startup.guarded in a rank.
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        # Without this, garbage collection in a child would write to every object and so copy all shared memory.
        gc.freeze()
        gc.enable()
        for process in processes:
            process.start()
        for number in SIGNALS:
            signal.signal(number, forward)
    except OSError as error:
        started = [process for process in processes if process.pid is not None]
        for process in started:
            process.kill()
            process.join()
        raise UserError(
            f"command line: --ranks {ranks}: rank {len(started)} cannot be started ({error.strerror})"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    deadline, running = None, {process.sentinel: process for process in processes}
    while running:
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        ended = connection.wait(running, left)
        for sentinel in ended:
            process = running.pop(sentinel)  # type: ignore[arg-type]
            process.join()
            if process.exitcode and deadline is None:
                deadline = time.monotonic() + _PARTING_S
        if not ended:  # too late
            for process in running.values():
                process.kill()
    codes = [process.exitcode or 0 for process in processes]
    failure = next((code for code in codes if code > 0), 0)
    return failure or (FAILED if any(codes) else 0)
