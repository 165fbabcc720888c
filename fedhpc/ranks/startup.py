"""Watches a rank while it imports and connects, until liveness does: for signals, and for the death of its launcher.

It works before torch is imported, so this module imports nothing heavy. A thread reads the signals
(signal.set_wakeup_fd), since the main thread may be inside a library for long. Nothing is on the disk yet, so the
process simply ends.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

from fedhpc.ranks.launch import Launch

DONE, FAILED, REFUSED, PREEMPTED = 0, 1, 2, 75  # the exit codes of a rank (fedhpc.main)
SIGNALS = {
    signal.SIGTERM: "preempted by SIGTERM",
    signal.SIGUSR2: "preempted by SIGUSR2",
    signal.SIGINT: "interrupted",
}
_TICK_S = 0.5


def traceback_follows() -> str:
    """What to say of the traceback that torchrun prints whenever its ranks end early; nothing without torchrun."""
    return "; the traceback that follows is torchrun's own" if "TORCHELASTIC_RUN_ID" in os.environ else ""


@contextlib.contextmanager
def guarded(launch: Launch) -> Iterator[None]:
    """Inside this context a signal ends the process with exit code 75, and the death of its launcher with 1."""
    parent, over = os.getppid(), threading.Event()
    read, write = socket.socketpair()
    read.settimeout(_TICK_S)
    write.setblocking(False)

    def leave(code: int, reason: str) -> None:
        if launch.rank == 0:
            sys.stderr.write(f"fedhpc: {reason} while starting; nothing was changed{traceback_follows()}\n")
            sys.stderr.flush()
        os._exit(code)

    def watch() -> None:
        while not over.is_set():
            numbers = b""
            with contextlib.suppress(TimeoutError):
                numbers = read.recv(64)
            for number in numbers:
                if number in SIGNALS:
                    leave(PREEMPTED, SIGNALS[signal.Signals(number)])
            if launch.launcher != "single" and os.getppid() != parent:
                leave(FAILED, "the launcher died")

    wakeup = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    # Without a Python handler the default action would end the process before the thread sees the signal.
    handlers = {number: signal.signal(number, lambda *_: None) for number in SIGNALS}
    thread = threading.Thread(target=watch, name="startup", daemon=True)
    thread.start()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # fedhpc.ranks.fork holds them back while it starts a rank
    try:
        yield
    finally:
        over.set()
        write.send(b"\0")
        thread.join()
        signal.set_wakeup_fd(wakeup)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        read.close()
        write.close()
