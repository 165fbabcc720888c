"""The interface of all transports: the collectives of a round on tensors, and of small values as JSON.

Collectives work in place on contiguous tensors, with the same result on every backend. Nothing is pickled: tensors are
sent as their bytes, small values as JSON of bounded size.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fedhpc.errors import UserError
from fedhpc.ranks.failed_collective import collective
from fedhpc.ranks.group import Account, Group
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.placement import Placement
from fedhpc.ranks.round_progress import RoundProgress
from fedhpc.ranks.topology import Topology

JSON_LIMIT_BYTES = 64 * 2**20
MOVABLE = (
    torch.float32,
    torch.float64,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bfloat16,
    torch.float16,
)
REDUCIBLE = (torch.float32, torch.float64, torch.int64, torch.int32)


class Transport(ABC):
    """The ranks of a launch and the collectives between them.

    All ranks call the same methods in the same order, with tensors of the same dtype and size (for all_to_all, sizes
    that match in pairs). Empty tensors are allowed and cost nothing. A collective has no time-out: ranks may be busy
    for hours, and `fedhpc.ranks.liveness` ends the run when one is dead or stuck.

    wire_bytes counts the bytes that this rank sent to or received from others, each buffer once per collective.
    """

    name: str
    aborts_all = False  # whether one rank's abort ends every rank
    forms_groups = False  # whether the ranks of a worker can hold a base between them

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.wire_bytes = 0
        #: How far the round has come, for the screen.
        self.progress = RoundProgress()
        #: The ranks that share an evaluation.
        self.evaluators: tuple[int, ...] = tuple(range(world_size))
        #: The ranks of each machine, ascending; none where the transport does not know.
        self.nodes: list[list[int]] = []
        #: The ranks with which this one holds a sharded base; None where it holds one of its own.
        self.group: Group | None = None

    @property
    def is_server(self) -> bool:
        """Whether this is rank 0, the server's."""
        return self.rank == 0

    def use_placement(self, placement: Placement) -> None:
        """Tell the transport the GPUs of all ranks; that of this rank is torch's current device. Collective, once."""
        self.evaluators = placement.evaluators(self.world_size)

    def form_groups(self, topology: Topology) -> None:
        """Connect the ranks of each worker with each other, where a worker has several. Collective, once."""
        if topology.group_size > 1:
            raise UserError(
                f"workers of several ranks gather layers with torch.distributed, and these ranks talk over {self.name}",
                key="runtime.worker_ranks", remedy="use runtime.transport torch, or take it out",
            )  # fmt: skip

    def evaluator(self, number: int) -> int:
        """The rank that computes piece `number` of an evaluation."""
        return self.evaluators[number % len(self.evaluators)]

    @property
    def account(self) -> Account:
        """What gathering layers has taken of this rank so far."""
        return Account() if self.group is None else self.group.account

    def broadcast(self, tensor: Tensor) -> None:
        """Copy rank 0's tensor into the tensor of every other rank."""
        _check(tensor, MOVABLE)
        self._count(tensor.nbytes)
        if tensor.numel():
            self._staged(self._broadcast, tensor, copy_in=self.rank == 0, copy_out=self.rank != 0)

    def reduce_sum(self, tensor: Tensor) -> None:
        """Add up the tensors of all ranks in that of rank 0; the others are undefined then. Integer sums are exact."""
        _check(tensor, REDUCIBLE)
        self._count(tensor.nbytes)
        if tensor.numel():
            self._staged(self._reduce_sum, tensor, copy_in=True, copy_out=self.rank == 0)

    def all_reduce_max(self, tensor: Tensor) -> None:
        """Take the elementwise maximum over all ranks, on all ranks. Without NaN, which backends treat differently."""
        _check(tensor, REDUCIBLE)
        self._count(tensor.nbytes)
        if tensor.numel():
            self._staged(self._all_reduce_max, tensor, copy_in=True, copy_out=True)

    def all_to_all(self, send: Sequence[Tensor], receive: Sequence[Tensor]) -> None:
        """Copy send[j] into rank j's receive[this rank], for every j. Sizes may differ from pair to pair."""
        if len(send) != self.world_size or len(receive) != self.world_size:
            raise ValueError(f"all_to_all needs {self.world_size} tensors to send and to receive")
        for tensor in (*send, *receive):
            _check(tensor, MOVABLE)
        receive[self.rank].copy_(send[self.rank])
        others = [j for j in range(self.world_size) if j != self.rank]
        self._count(sum(send[j].nbytes + receive[j].nbytes for j in others))
        outgoing = {j: _bytes(self._to_wire(send[j])) for j in others if send[j].numel()}
        incoming = {j: self._wire_like(receive[j]) for j in others if receive[j].numel()}
        with self._together("all_to_all"):
            self._exchange(outgoing, {j: _bytes(buffer) for j, buffer in incoming.items()})
        for j, buffer in incoming.items():
            if buffer is not receive[j]:
                receive[j].copy_(buffer)

    def broadcast_json(self, value: Any) -> Any:
        """Send rank 0's value to every rank as JSON of at most 64 MiB; returns it as JSON gives it back."""
        text = _encode(value) if self.rank == 0 else b""
        size = torch.tensor([len(text)])
        self.broadcast(size)
        # Every rank knows the size, so that all of them raise and none is left waiting.
        _check_size(int(size))
        buffer = _tensor(text) if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        self.broadcast(buffer)
        return _decode(buffer)

    def gather_json(self, value: Any) -> list[Any] | None:
        """Collect the values of all ranks as JSON: a list by rank on rank 0, None elsewhere; at most 64 MiB in all."""
        text = _encode(value)
        sizes = torch.zeros(self.world_size, dtype=torch.int64)
        sizes[self.rank] = len(text)
        self.all_reduce_max(sizes)
        _check_size(int(sizes.sum()))
        nothing = torch.empty(0, dtype=torch.uint8)
        send = [_tensor(text) if j == 0 else nothing for j in range(self.world_size)]
        receive = [torch.empty(int(size) if self.rank == 0 else 0, dtype=torch.uint8) for size in sizes.tolist()]
        if self.rank != 0:
            receive[self.rank] = torch.empty_like(send[self.rank])
        self.all_to_all(send, receive)
        return [_decode(buffer) for buffer in receive] if self.rank == 0 else None

    def barrier(self) -> None:
        """Return once every rank has called it."""
        with self._together("barrier"):
            self._all_reduce_max(torch.zeros(1, dtype=torch.int64))

    @abstractmethod
    def close(self) -> None:
        """Disconnect from the other ranks. Collective, and the last call of every rank."""

    def abort(self, code: int) -> NoReturn:
        """End this process at once with exit code `code`, from any thread, whatever the main thread is doing."""
        os._exit(code)

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # Closing is a collective: after an error the others may never call it, and this rank would wait for ever.
        if kind is None:
            self.close()

    @abstractmethod
    def _broadcast(self, tensor: Tensor) -> None: ...

    @abstractmethod
    def _reduce_sum(self, tensor: Tensor) -> None: ...

    @abstractmethod
    def _all_reduce_max(self, tensor: Tensor) -> None: ...

    @abstractmethod
    def _exchange(self, send: dict[int, Tensor], receive: dict[int, Tensor]) -> None:
        """Exchange uint8 buffers, by rank; two ranks without data for each other are left out on both sides."""

    def _takes(self, tensor: Tensor) -> bool:
        """Whether the backend can work directly on the memory of `tensor`."""
        return tensor.device.type == "cpu"

    def _count(self, size_bytes: int) -> None:
        if self.world_size > 1:
            self.wire_bytes += size_bytes

    def _staged(self, collective: Callable[[Tensor], None], tensor: Tensor, *, copy_in: bool, copy_out: bool) -> None:
        buffer = self._to_wire(tensor) if copy_in else self._wire_like(tensor)
        with self._together(collective.__name__.lstrip("_")):
            collective(buffer)
        if copy_out and buffer is not tensor:
            tensor.copy_(buffer)

    @contextlib.contextmanager
    def _together(self, name: str) -> Iterator[None]:
        """Around a collective: the other ranks of the group may need layers before they come to it."""
        with collective(name):
            if self.group is not None:
                self.group.serve()
            yield

    def _to_wire(self, tensor: Tensor) -> Tensor:
        buffer = self._wire_like(tensor)
        return buffer if buffer is tensor else buffer.copy_(tensor)

    def _wire_like(self, tensor: Tensor) -> Tensor:
        """`tensor` itself, or pinned host memory of its shape where the backend cannot take it."""
        if self._takes(tensor):
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class LoopbackTransport(Transport):
    """The transport of a single process, which has nothing to exchange."""

    name = "loopback"

    def __init__(self) -> None:
        super().__init__(rank=0, world_size=1)

    def close(self) -> None:
        pass

    def _broadcast(self, tensor: Tensor) -> None:
        pass

    def _reduce_sum(self, tensor: Tensor) -> None:
        pass

    def _all_reduce_max(self, tensor: Tensor) -> None:
        pass

    def _exchange(self, send: dict[int, Tensor], receive: dict[int, Tensor]) -> None:
        pass

    def _takes(self, tensor: Tensor) -> bool:
        return True


def arrival_limit_s(timeout_s: float) -> float:
    """How long ranks may take to find each other; importing torch in 8 processes takes 40 s on 2 cores."""
    return max(timeout_s, 120.0)


@contextlib.contextmanager
def connect_deadline(launch: Launch, limit_s: float) -> Iterator[None]:
    """End this process with exit code 1 if connecting, inside this context, takes longer than `limit_s`.

    Backends hang in C++ when a peer dies while they connect, and liveness does not watch yet.
    """

    def give_up() -> None:
        sys.stderr.write(
            f"fedhpc: rank {launch.rank} of {launch.world_size or 'all'} could not connect to the others within "
            f"{limit_s:.0f} s: check that all ranks were started and that their hosts reach each other\n"
        )
        sys.stderr.flush()
        os._exit(1)

    timer = threading.Timer(limit_s, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _check(tensor: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if tensor.dtype not in dtypes:
        raise TypeError(f"{tensor.dtype} cannot be exchanged here; valid: {', '.join(map(str, dtypes))}")
    if not tensor.is_contiguous():
        raise ValueError("only contiguous tensors can be exchanged")
    if tensor.requires_grad:
        raise ValueError("a tensor that requires grad cannot be exchanged: detach it")


def _check_size(size_bytes: int) -> None:
    if size_bytes > JSON_LIMIT_BYTES:
        raise ValueError(f"{size_bytes} bytes of JSON exceed the limit of {JSON_LIMIT_BYTES}")


def _encode(value: Any) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _decode(buffer: Tensor) -> Any:
    return json.loads(buffer.numpy().tobytes())


def _tensor(text: bytes) -> Tensor:
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
