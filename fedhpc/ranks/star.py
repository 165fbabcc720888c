"""The TCP connections between the liveness threads of rank 0 and of every other rank: a star.

A connection is accepted only with a token that was sent over the transport; any other is dropped. A message is one line
of JSON, and an empty line is a heartbeat.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import secrets
import selectors
import socket
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fedhpc.errors import UserError
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.network import host_addresses, local_address_for, reachable_address
from fedhpc.ranks.transport.base import Transport, arrival_limit_s, connect_deadline

_HELLO_LIMIT_S = 10.0


@dataclass
class Peer:
    """Another rank, with its connection once there is one."""

    heard: float  # when it was last heard of
    connection: socket.socket | None = None
    received: bytearray = field(default_factory=bytearray)
    done: bool = False  # its main thread has called stop()


class Star:
    """The connections of this rank: on rank 0 to every other rank, elsewhere to rank 0 alone."""

    def __init__(self, transport: Transport, launch: Launch, timeout_s: float) -> None:
        self.peers: dict[int, Peer] = {}
        self._transport, self._launch, self._timeout_s = transport, launch, timeout_s
        self._rank = transport.rank
        self._strangers: dict[socket.socket, Peer] = {}
        self._listener: socket.socket | None = None
        self._token = ""
        self._selector = selectors.DefaultSelector()

    def connect(self) -> None:
        """Connect all ranks. Collective; UserError where rank 0 cannot be reached."""
        if self._transport.world_size > 1:
            with connect_deadline(self._launch, arrival_limit_s(self._timeout_s)):
                self._connect()

    def watch(self, connection: socket.socket) -> None:
        """Let `select` wait for this socket too, which the caller reads."""
        self._selector.register(connection, selectors.EVENT_READ)

    def select(self, limit_s: float) -> list[socket.socket]:
        """Wait until a socket can be read, or until the limit; returns those that can."""
        return [key.fileobj for key, _ in self._selector.select(limit_s)]  # type: ignore[misc]

    def read(self, ready: socket.socket) -> tuple[int, bool] | None:
        """Receive from a socket: returns the rank it belongs to, and whether that is still connected.

        None where it belongs to no rank (yet).
        """
        if ready is self._listener:
            self._accept()
            return None
        if ready in self._strangers:
            return self._greet(ready)
        for rank, peer in self.peers.items():
            if peer.connection is ready:
                return rank, _receive(peer)
        return None

    def lines(self, rank: int) -> list[bytes]:
        """The complete lines that a rank has sent, without heartbeats."""
        peer = self.peers[rank]
        peer.heard = time.monotonic()
        *lines, rest = bytes(peer.received).split(b"\n")
        peer.received = bytearray(rest)
        return [line for line in lines if line]

    def ended(self, rank: int) -> None:
        """Stop waiting for a connection that has ended."""
        connection = self.peers[rank].connection
        assert connection is not None
        self._selector.unregister(connection)

    def send(self, rank: int, message: dict[str, Any]) -> None:
        """Send a message to a rank, without waiting."""
        _send(self.peers[rank], _line(message))

    def beat(self) -> None:
        """Send a heartbeat to every peer."""
        for peer in self.peers.values():
            _send(peer, b"\n")

    def drop_the_silent(self, now: float) -> None:
        """Drop connections that have not sent their first line for too long."""
        for connection, stranger in list(self._strangers.items()):
            if now > stranger.heard + _HELLO_LIMIT_S:
                self._drop(connection)

    def part(self, message: dict[str, Any], grace_s: float) -> None:
        """Tell every peer, and let them close first: closing here could destroy what they have not read yet."""
        line = _line(message)
        for peer in self.peers.values():
            _send(peer, line)
        if self._transport.aborts_all and "exit" in message:
            time.sleep(0.1)
            return
        deadline = time.monotonic() + grace_s
        for peer in self.peers.values():
            if peer.connection is not None:
                with contextlib.suppress(OSError):
                    for left_s in _until(deadline):
                        peer.connection.settimeout(left_s)
                        if not peer.connection.recv(4096):
                            break

    def close(self) -> None:
        """Close all connections."""
        self._selector.close()
        for connection in (
            self._listener,
            *self._strangers,
            *(peer.connection for peer in self.peers.values()),
        ):
            if connection is not None:
                connection.close()

    def _connect(self) -> None:
        hosts = self._transport.gather_json(host_addresses())
        now = time.monotonic()
        if self._rank == 0:
            assert hosts is not None
            listener = socket.create_server((self._listening_address(hosts), 0), backlog=len(hosts) + 16)
            listener.setblocking(False)
            self._listener = listener
            self._token = secrets.token_hex(16)
            address, port = listener.getsockname()[:2]
            self._transport.broadcast_json({"address": address, "port": port, "token": self._token})
            self.peers = {rank: Peer(now) for rank in range(1, self._transport.world_size)}
            self._selector.register(listener, selectors.EVENT_READ)
            return
        server = self._transport.broadcast_json(None)
        try:
            connection = socket.create_connection(
                (server["address"], server["port"]), timeout=max(10.0, self._timeout_s)
            )
        except OSError as error:
            raise UserError(
                f"rank {self._rank} on {socket.gethostname()} cannot reach rank 0 at "
                f"{server['address']}:{server['port']} ({error}): set MASTER_ADDR to an address of rank 0's host "
                "that all hosts reach"
            ) from error
        connection.sendall(_line({"token": server["token"], "rank": self._rank}))
        connection.setblocking(False)
        self.peers = {0: Peer(time.monotonic(), connection)}
        self._selector.register(connection, selectors.EVENT_READ)

    def _listening_address(self, hosts: Sequence[Sequence[str]]) -> str:
        if self._launch.single_node and self._launch.world_size == self._transport.world_size:
            return "127.0.0.1"
        if self._launch.master_addr is not None:
            return local_address_for(self._launch.master_addr)
        return reachable_address(hosts)

    def _accept(self) -> None:
        assert self._listener is not None
        with contextlib.suppress(OSError):  # the stranger may have left already
            connection, _ = self._listener.accept()
            connection.setblocking(False)
            if len(self._strangers) >= self._transport.world_size + 64:
                self._drop(next(iter(self._strangers)))
            self._strangers[connection] = Peer(time.monotonic(), connection)
            self._selector.register(connection, selectors.EVENT_READ)

    def _greet(self, connection: socket.socket) -> tuple[int, bool] | None:
        """Read a stranger's first line, and drop it unless it has the token and the number of a missing rank."""
        stranger = self._strangers[connection]
        alive = _receive(stranger)
        if b"\n" not in stranger.received:
            if not alive or len(stranger.received) > 512:
                self._drop(connection)
            return None
        hello, _, stranger.received = stranger.received.partition(b"\n")
        rank = self._rank_of(bytes(hello))
        if rank is None or self.peers[rank].connection is not None:
            self._drop(connection)
            return None
        del self._strangers[connection]
        self.peers[rank] = stranger
        stranger.heard = time.monotonic()
        if all(peer.connection for peer in self.peers.values()) and self._listener:
            self._selector.unregister(self._listener)
            self._listener.close()
            self._listener = None
        return rank, alive

    def _rank_of(self, hello: bytes) -> int | None:
        try:
            message = json.loads(hello[:512])
            token = str(message["token"]).encode()
        except (ValueError, RecursionError, KeyError, TypeError, IndexError):  # a stranger may send anything
            return None
        if not hmac.compare_digest(token, self._token.encode()):
            return None
        rank = message.get("rank")
        return rank if type(rank) is int and rank in self.peers else None

    def _drop(self, connection: socket.socket) -> None:
        self._selector.unregister(connection)
        del self._strangers[connection]
        connection.close()


def _line(message: dict[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"


def _send(peer: Peer, data: bytes) -> None:
    # A broken connection is noticed when reading, after the last lines of the peer.
    if peer.connection is not None:
        with contextlib.suppress(OSError):
            peer.connection.send(data)


def _receive(peer: Peer) -> bool:
    """Read the bytes that have arrived; False at the end of the connection."""
    assert peer.connection is not None
    try:
        data = peer.connection.recv(65536)
    except BlockingIOError:
        return True
    except OSError:
        return False
    peer.received += data
    return bool(data)


def _until(deadline: float) -> Iterator[float]:
    """Yield the seconds that are left, again and again, until the deadline."""
    while (left_s := deadline - time.monotonic()) > 0:
        yield left_s
