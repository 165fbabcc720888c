"""The lock of a run directory: two runs must not write in one directory."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import time
from pathlib import Path

from fedhpc.errors import UserError

LOCK = ".lock"
LOCK_WAIT_S = 2.0


class InUseError(UserError):
    """Another live process has the run directory."""


class Lock:
    """Holds a run directory until `close` or the end of the process, however it ends.

    `held` is False on a file system without locks (some parallel ones are mounted so): two runs in one
    directory cannot be told apart there, which the caller should say.
    """

    def __init__(self, descriptor: int, held: bool) -> None:
        self._descriptor = descriptor
        self.held = held

    def close(self) -> None:
        os.close(self._descriptor)


def take_lock(directory: Path) -> Lock:
    """Make the directory, and take it for this process. UserError where a live run has it."""
    path = directory / LOCK
    try:
        directory.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise unusable(directory, error.strerror or str(error)) from error
    held = _flock(descriptor, fcntl.LOCK_EX, directory)
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}".encode(), 0)
    return Lock(descriptor, held)


def _flock(descriptor: int, kind: int, directory: Path, wait_s: float = LOCK_WAIT_S) -> bool:
    # A killed predecessor may need a moment to go, and another process's `decide` holds its probe an instant.
    give_up = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
            return True
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                return False
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        if time.monotonic() > give_up:
            owner = os.pread(descriptor, 200, 0).decode(errors="replace") or "unknown"
            raise InUseError(
                f"{directory}: in use by a live run, pid {owner}; wait for it, end it or give another run.dir"
            )
        time.sleep(0.05)


def refuse_live(directory: Path, wait_s: float) -> None:
    """UserError where a live run still has the directory after `wait_s` seconds."""
    try:
        descriptor = os.open(directory / LOCK, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    except OSError as error:
        raise unusable(directory, error.strerror or str(error)) from error
    try:
        _flock(descriptor, fcntl.LOCK_SH, directory, wait_s)
    finally:
        os.close(descriptor)


def unusable(directory: Path, reason: str) -> UserError:
    """The error for a directory that cannot serve as a run directory."""
    return UserError(f"{directory}: cannot be the run directory: {reason}; choose another run.dir")
