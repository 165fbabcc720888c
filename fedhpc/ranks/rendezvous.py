"""Rank 0 tells the others, at MASTER_PORT, where they find it: the first thing that ranks say to each other.

Whoever connects is sent one line: the name of this start, which every rank can tell by itself, and the message. So a
rank of another run, or of an earlier start, knows that it is wrong here, and nobody waits for a program that is none of
ours.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from fedhpc.errors import UserError

_STRANGERS_S = 5.0  # how long somebody else may have the port: an earlier start may be about to end
_ANSWER_S = 2.0
_LINE_LIMIT = 512
_FREE_PORT = "export a free one on all hosts"


def announce(port: int, start: str, message: str) -> None:
    """Answer at `port` of all addresses until this process ends. UserError where the port is taken."""
    try:
        listener = socket.create_server(("", port), backlog=1024)
    except OSError as error:
        raise UserError(
            f"port {port} of {socket.gethostname()} cannot be used ({os.strerror(error.errno or 0)}), another run or "
            "program may have it",
            key="MASTER_PORT",
            remedy=_FREE_PORT,
        ) from error
    line = f"{start} {message}\n".encode()

    def answer() -> None:
        while True:
            try:
                with listener.accept()[0] as connection:
                    connection.settimeout(_ANSWER_S)
                    connection.sendall(line)
            except OSError:  # whoever it was has left
                time.sleep(0.01)

    threading.Thread(target=answer, name="rendezvous", daemon=True).start()


def ask(address: str, port: int, start: str, limit_s: float) -> str:
    """The message that rank 0 of this start announces. UserError where nobody does within the limit."""
    deadline, pause_s, wrong_since = time.monotonic() + limit_s, 0.05, None
    while (now := time.monotonic()) < deadline:
        try:
            with socket.create_connection((address, port), timeout=_ANSWER_S) as connection:
                name, _, message = _line(connection).partition(" ")
            if name == start:
                return message
            wrong_since = wrong_since or now
            if now >= wrong_since + _STRANGERS_S:
                raise UserError(
                    f"port {port} of {address} is that of another run or program", key="MASTER_PORT", remedy=_FREE_PORT
                )
        except OSError:  # rank 0 is not there yet
            wrong_since = None
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, 1.0)
    raise UserError(f"rank 0 did not answer at {address}:{port} within {limit_s:.0f} s: did rank 0 start?")


def _line(connection: socket.socket) -> str:
    """The first line that is sent; what there is of it where it does not end in time."""
    received = b""
    try:
        while b"\n" not in received and len(received) < _LINE_LIMIT and (data := connection.recv(_LINE_LIMIT)):
            received += data
    except TimeoutError:
        pass
    return received.partition(b"\n")[0].decode(errors="replace")
