"""Until liveness watches over a rank: signals, and the death of its launcher, while it imports and connects.

Light, for it is there before torch. The signal is read by a thread (signal.set_wakeup_fd), since the main thread may
be inside a library for long; nothing is on the disk yet, so the process just ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import socket
import sys
import threading
from collections.abc import Iterator

from fedhpc.ranks.launch import Launch

FAILED, PREEMPTED = 1, 75
SIGNALS = {
    signal.SIGTERM: "preempted by SIGTERM",
    signal.SIGUSR2: "preempted by SIGUSR2",
    signal.SIGINT: "interrupted",
}
_TICK_S = 0.5
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
_MADV_HUGEPAGE = 14  # of Linux's madvise(2)
_ADDRESSES = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
_HUGE = 2**21
_HEAP = 2**30 - _HUGE  # below what is mapped by itself


def keep_freed_memory() -> None:
    """Let glibc keep the memory of freed tensors for the next ones.

    Otherwise every large one is mapped, cleared page by page by the kernel and unmapped again in each step, up to a
    tenth of the time of local training on a CPU. Other C libraries have no such call.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        if not mallopt(_M_MMAP_THRESHOLD, 2**30):
            mallopt(_M_MMAP_THRESHOLD, 2**25)  # older versions take no more, and no longer raise it by themselves
        mallopt(_M_TRIM_THRESHOLD, -1)
        _ask_for_huge_pages()


def _ask_for_huge_pages() -> None:
    """Let the kernel back what the heap will grow into by pages of 2 MiB, as it is used.

    The tensors of a step are more than a core's TLB reaches by pages of 4 KiB, and a step takes 2 to 12 % longer. The
    advice holds for mapped memory alone, so the heap is grown at once; what is not used of it takes no memory.
    """
    libc = ctypes.CDLL(None)
    # Where addresses are rationed they are for libraries.
    rationed = any(resource.getrlimit(limit)[0] != resource.RLIM_INFINITY for limit in _ADDRESSES)
    if rationed or not hasattr(libc, "madvise"):
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(_HEAP)
    if start:
        first, end = (start + _HUGE - 1) // _HUGE * _HUGE, (start + _HEAP) // _HUGE * _HUGE
        libc.madvise(first, end - first, _MADV_HUGEPAGE)  # a kernel without them says no, and all stays as it is
        libc.free(start)


@contextlib.contextmanager
def guarded(launch: Launch) -> Iterator[None]:
    """In the block a signal ends this process with 75, and the death of its launcher with 1."""
    parent, over = os.getppid(), threading.Event()
    read, write = socket.socketpair()
    read.settimeout(_TICK_S)
    write.setblocking(False)

    def leave(code: int, reason: str) -> None:
        if launch.rank == 0:
            sys.stderr.write(f"fedhpc: {reason} while starting; nothing was changed\n")
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
