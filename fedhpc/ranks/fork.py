"""Starts the ranks of one machine as forked children of one process, which imports the libraries once for all.

The children share its memory until they write to it, and need not import again. With three ranks this saves most of the
time to the first round, and half of the memory. Otherwise they are ranks like any others: ranks/liveness.py ends them
together. On several machines a launcher starts one such process on each.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing import connection

from fedhpc.errors import UserError
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.startup import FAILED, SIGNALS

_TICK_S = 0.5
_PARTING_S = 20.0  # how long the others may go on once one has failed; liveness ends them sooner


def launches(ranks: int, launch: Launch) -> list[Launch]:
    """The launches of `ranks` ranks that are forked from this process, which was launched as `launch`.

    Where a launcher has started it, and one like it on every other machine, the ranks of each follow those of the one
    before. UserError where there is not just one of them on each machine.
    """
    if launch.launcher == "single" or launch.world_size == 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        return [Launch("forked", rank, ranks, rank, ranks, "127.0.0.1", port) for rank in range(ranks)]
    if launch.local_world_size != 1 or launch.world_size == 0:
        here = f"{launch.local_world_size or 'an unknown number of'} processes"
        raise UserError(
            f"command line: --ranks-per-node starts the ranks of a node from one process, and {launch.launcher} has "
            f"started {here} here; start one on each node (srun --ntasks-per-node=1, mpiexec -ppn 1, torchrun "
            "--nproc_per_node=1)"
        )
    # Nobody has told MPI of these ranks, so they meet without it.
    launcher = "forked" if launch.launcher == "mpi" else launch.launcher
    first, total = launch.rank * ranks, launch.world_size * ranks
    return [
        replace(launch, launcher=launcher, rank=first + i, world_size=total, local_rank=i, local_world_size=ranks)
        for i in range(ranks)
    ]


def run(launches: Sequence[Launch], work: Callable[[Launch], None], launcher: int | None = None) -> int:
    """Fork a process for each of `launches` and call work(launch) in it, which must end its process.

    Returns their exit code. Signals of a preemption are passed on to all of them. launcher: the process that has
    started this one; if it dies this one ends, and with it the ranks. No other thread may run in this process.
    UserError where a rank cannot be started; the ranks that were started are ended then.
    """
    context = multiprocessing.get_context("fork")
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
            f"command line: of {len(launches)} ranks here, rank {launches[len(started)].rank} cannot be started "
            f"({error.strerror})"
        ) from error
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    deadline, running = None, {process.sentinel: process for process in processes}
    while running:
        for sentinel in connection.wait(running, _TICK_S):
            process = running.pop(sentinel)  # type: ignore[arg-type]
            process.join()
            if process.exitcode and deadline is None:
                deadline = time.monotonic() + _PARTING_S
        if launcher is not None and os.getppid() != launcher:
            os._exit(FAILED)
        if deadline is not None and time.monotonic() > deadline:
            for process in running.values():
                process.kill()
    codes = [process.exitcode or 0 for process in processes]
    failure = next((code for code in codes if code > 0), 0)
    return failure or (FAILED if any(codes) else 0)
