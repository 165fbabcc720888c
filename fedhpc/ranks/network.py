"""Finds the addresses of this machine and of rank 0's, and the network interface that has an address."""

from __future__ import annotations

import os
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace

from fedhpc.errors import UserError
from fedhpc.ranks.launch import LOOPBACK, Launch

_LOOK_UP_S = 4.0  # for a name that nobody knows; the record of a host that starts may be seconds late
_SLURM_S = 20.0  # all ranks ask Slurm's one daemon at once


def locate(launch: Launch) -> Launch:
    """The launch with the address of rank 0's host in place of its name. UserError, within seconds, if it has none.

    The name of a Slurm node need not be the name of a host: then Slurm tells its address.
    """
    name = launch.master_addr
    if name is None or launch.world_size == 1:
        return launch
    if launch.single_node:
        return replace(launch, master_addr="127.0.0.1")
    address = _look_up(name, _LOOK_UP_S)
    if address is None and (known := _slurm_address(name)):
        address = _look_up(known, _LOOK_UP_S)
    if address is None:
        raise UserError(
            f"rank 0's host is {name!r}, and no address is known for that name on {socket.gethostname()}",
            key="MASTER_ADDR",
            remedy="export an address of rank 0's host that all hosts reach (torchrun: --local_addr)",
        )
    return replace(launch, master_addr=address)


def _look_up(name: str, limit_s: float) -> str | None:
    """The address of a host, IPv4 if it has one; None where none is found within the limit."""
    addresses: list[str] = []

    def ask() -> None:
        while not addresses and time.monotonic() < deadline:
            try:
                answers = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
                addresses.append(str(min(answers, key=lambda answer: answer[0] != socket.AF_INET)[4][0]))
            except (OSError, UnicodeError):
                time.sleep(0.5)

    deadline = time.monotonic() + limit_s
    thread = threading.Thread(target=ask, name="look_up", daemon=True)  # a name server may be silent for longer
    thread.start()
    thread.join(limit_s)
    return addresses[0] if addresses else None


def _slurm_address(node: str) -> str | None:
    """The address (NodeAddr) of a Slurm node; None outside a job, or where Slurm knows no such node."""
    if "SLURM_JOB_ID" not in os.environ or shutil.which("scontrol") is None:
        return None
    command = ["scontrol", "show", "node", node, "--oneliner"]
    try:
        shown = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_SLURM_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    address = re.search(r"\bNodeAddr=(\S+)", shown.stdout)
    return address[1] if address else None


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


def host_addresses() -> list[str]:
    """The IPv4 addresses of this machine that are not loopback; elsewhere than on Linux that of its name, if any."""
    if sys.platform == "linux":
        return [address for _, address in _interfaces() if not address.startswith("127.")]
    address = _look_up(socket.gethostname(), _LOOK_UP_S)
    return [address] if address and not address.startswith("127.") else []


def reachable_address(hosts: Sequence[Sequence[str]]) -> str:
    """The address of this machine that the other hosts reach; loopback where there are none.

    hosts: the addresses of every rank's machine, this machine's first. Needs no names.
    """
    # Bridges of containers have the same addresses on all machines.
    others = (address for host in hosts for address in host if address not in hosts[0])
    return local_address_for(next(others, "127.0.0.1"))


def interface_of(address: str) -> str:
    """The name of the network interface that holds the IPv4 `address`."""
    if address.startswith("127."):
        return next(name for _, name in socket.if_nameindex() if name in ("lo", "lo0"))
    if sys.platform == "linux":
        for name, held in _interfaces():
            if held == address:
                return name
    raise UserError(f"no network interface found for {address}: set GLOO_SOCKET_IFNAME to its name")


def _interfaces() -> Iterator[tuple[str, str]]:
    """The network interfaces of a Linux machine that have an IPv4 address: name and address."""
    import fcntl

    get_address = 0x8915  # SIOCGIFADDR
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            try:
                reply = fcntl.ioctl(probe.fileno(), get_address, struct.pack("256s", name.encode()[:15]))
            except OSError:  # an interface without an IPv4 address
                continue
            yield name, socket.inet_ntoa(reply[20:24])
