"""The transports between ranks: loopback, torch.distributed (gloo, NCCL) or MPI, behind one interface."""

from __future__ import annotations

from typing import Literal

from fedhpc.errors import UserError
from fedhpc.ranks.failed_collective import TransportError
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport, Transport

__all__ = ["Transport", "TransportError", "open_transport"]


def open_transport(
    launch: Launch,
    choice: Literal["auto", "torch", "mpi"],
    timeout_s: float,
) -> Transport:
    """Connect all ranks of a launch. Collective.

    choice: `auto` is MPI under an MPI launcher and torch.distributed under torchrun and Slurm. timeout_s: how long the
    ranks may take to find each other (at least 120 s, since they import first); it does not bound the collectives.
    """
    if choice == "mpi" or (choice == "auto" and launch.launcher == "mpi" and launch.world_size != 1):
        from fedhpc.ranks.transport.mpi import MpiTransport

        return MpiTransport(launch, timeout_s)
    if launch.world_size == 1:
        return LoopbackTransport()
    if launch.world_size == 0:
        raise UserError(
            f"the launcher tells this process its rank, {launch.rank}, but not of how many",
            key="runtime.transport",
            remedy="use mpi, or set RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE",
        )
    if launch.master_addr is None or launch.master_port is None:
        missing = "MASTER_ADDR" if launch.master_addr is None else "MASTER_PORT"
        raise UserError(
            f"runtime.transport 'torch' needs {missing} in the environment of every rank: set it to rank 0's "
            "host and a free port, or start with torchrun"
        )
    from fedhpc.ranks.transport.torch_dist import TorchTransport

    return TorchTransport(launch, timeout_s)
