"""Finds the address of this machine that another machine can reach, and the network interface that has it."""

from __future__ import annotations

import socket
import struct
import sys

from fedhpc.errors import UserError
from fedhpc.ranks.launch import LOOPBACK


def local_address_for(peer: str) -> str:
    """The IPv4 address of this machine that the host `peer` reaches; loopback only where `peer` is given as that."""
    if peer in LOOPBACK:
        return "127.0.0.1"
    address = _source_address(peer)
    if address.startswith("127."):
        # `peer` is this machine, and its name resolves to loopback: take the address of the route to other networks.
        address = _source_address("192.0.2.1")
    return address


def _source_address(peer: str) -> str:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            # Connecting a datagram socket sends nothing; it only asks the kernel for the route.
            probe.connect((peer, 9))
        except OSError as error:
            raise UserError(
                f"no way to the host {peer!r} ({error}): set MASTER_ADDR to an address that all hosts reach"
            ) from error
        return str(probe.getsockname()[0])


def interface_of(address: str) -> str:
    """The name of the network interface that holds the IPv4 `address`."""
    names = [name for _, name in socket.if_nameindex()]
    if address.startswith("127."):
        return next(name for name in names if name in ("lo", "lo0"))
    if sys.platform == "linux":
        import fcntl

        get_address = 0x8915  # SIOCGIFADDR
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            for name in names:
                request = struct.pack("256s", name.encode()[:15])
                try:
                    reply = fcntl.ioctl(probe.fileno(), get_address, request)
                except OSError:  # an interface without an IPv4 address
                    continue
                if socket.inet_ntoa(reply[20:24]) == address:
                    return name
    raise UserError(f"no network interface found for {address}: set GLOO_SOCKET_IFNAME to its name")
