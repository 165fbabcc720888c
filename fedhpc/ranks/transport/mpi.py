"""The transport over MPI; the only module that imports mpi4py.

Collectives are started and then tested, with short sleeps in between: a blocking call would use a whole core that
another rank may need.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from fedhpc.errors import UserError
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import Transport, arrival_limit_s, connect_deadline

if TYPE_CHECKING:
    from mpi4py import MPI

_LONGEST_PAUSE_S = 2e-4
_PIECE_BYTES = 2**30  # of one call: Open MPI counts in 32 bits, and takes no more than 2^31 - 1 of anything


class MpiTransport(Transport):
    """Exchanges tensors over MPI.COMM_WORLD; those of a GPU go through pinned host memory."""

    name = "mpi"
    aborts_all = True

    def __init__(self, launch: Launch, timeout_s: float) -> None:
        with connect_deadline(launch, arrival_limit_s(timeout_s)):
            self._mpi = _initialize()
            self._comm = self._mpi.COMM_WORLD.Dup()
        super().__init__(self._comm.rank, self._comm.size)
        # Under a launcher whose variables we do not know, rank and size are those that MPI says.
        told = (launch.rank, launch.world_size or self.world_size)
        if launch.launcher != "single" and told != (self.rank, self.world_size):
            of = f" of {launch.world_size}" if launch.world_size else ""
            raise UserError(
                f"the launcher says rank {launch.rank}{of}, MPI says rank {self.rank} of {self.world_size}: start with "
                "the mpiexec (under Slurm: srun --mpi=...) of the MPI library that mpi4py loads"
            )
        self._types: dict[torch.dtype, Any] = {
            torch.uint8: self._mpi.BYTE,
            torch.int32: self._mpi.INT32_T,
            torch.int64: self._mpi.INT64_T,
            torch.float32: self._mpi.FLOAT,
            torch.float64: self._mpi.DOUBLE,
        }

    def close(self) -> None:
        if not self._mpi.Is_finalized():
            self._comm.Free()
            self._mpi.Finalize()

    def abort(self, code: int) -> NoReturn:
        # Abort ends all ranks with this code; a rank that merely exits looks killed to mpiexec.
        self._mpi.COMM_WORLD.Abort(code)
        os._exit(code)

    def _broadcast(self, tensor: Tensor) -> None:
        for piece in _pieces(tensor.view(-1).view(torch.uint8)):
            self._wait(self._comm.Ibcast(self._buffer(piece), root=0))

    def _reduce_sum(self, tensor: Tensor) -> None:
        sum_ = self._mpi.SUM
        for piece in _pieces(tensor):
            if self.rank == 0:
                self._wait(self._comm.Ireduce(self._mpi.IN_PLACE, self._buffer(piece), op=sum_, root=0))
            else:
                self._wait(self._comm.Ireduce(self._buffer(piece), None, op=sum_, root=0))

    def _all_reduce_max(self, tensor: Tensor) -> None:
        for piece in _pieces(tensor):
            self._wait(self._comm.Iallreduce(self._mpi.IN_PLACE, self._buffer(piece), op=self._mpi.MAX))

    def _exchange(self, send: dict[int, Tensor], receive: dict[int, Tensor]) -> None:
        # MPI keeps the order of the pieces between two ranks.
        requests = [self._comm.Irecv(self._buffer(part), j) for j, t in receive.items() for part in _pieces(t)]
        requests += [self._comm.Isend(self._buffer(part), j) for j, t in send.items() for part in _pieces(t)]
        self._wait(*requests)

    def _buffer(self, tensor: Tensor) -> list[Any]:
        memory = self._mpi.memory.fromaddress(tensor.data_ptr(), tensor.nbytes)
        return [memory, tensor.numel(), self._types[tensor.dtype]]

    def _wait(self, *requests: MPI.Request) -> None:
        pending = list(requests)
        pause_s = 0.0
        while not self._mpi.Request.Testall(pending):
            time.sleep(pause_s)
            pause_s = min(2 * pause_s + 1e-6, _LONGEST_PAUSE_S)


def _pieces(tensor: Tensor) -> tuple[Tensor, ...]:
    """The tensor, flat, in pieces that one call of MPI can take."""
    return tensor.view(-1).split(_PIECE_BYTES // tensor.element_size())


def _initialize() -> Any:
    """Import and initialise MPI, with threads: the liveness thread may call Abort at any moment."""
    try:
        import mpi4py
    except ModuleNotFoundError as error:
        raise UserError("runtime.transport 'mpi' needs mpi4py: pip install 'fedhpc[mpi]'") from error
    mpi4py.rc.initialize = False
    # Finalize waits for every rank, so it would hang when a failed rank exits. `close` calls it.
    mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"mpi4py finds no MPI library ({str(error).splitlines()[0]}): install one, for instance "
            "'pip install mpich' or your cluster's MPI module"
        ) from error
    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise UserError("this MPI library lacks THREAD_MULTIPLE: use runtime.transport 'torch' or another MPI")
    return MPI
