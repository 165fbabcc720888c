"""What every transport does: the collectives of a round, and JSON beside them.

Everything works in place on contiguous tensors, with the same result on every backend. Nothing is pickled:
tensors travel as their bytes, small values as JSON of bounded size.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fedhpc.ranks.launch import Launch
from fedhpc.ranks.placement import Placement

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


class TransportError(RuntimeError):
    """A collective broke, most often because a peer died: a symptom, rarely the cause."""


class Transport(ABC):
    """The ranks of a launch and the collectives between them.

    All ranks call the same methods in the same order with tensors of the same dtype and size (all_to_all:
    sizes that match pairwise). Empty tensors are allowed and cost nothing. A collective has no time-out:
    ranks may be busy for hours, and `fedhpc.ranks.liveness` ends the run when one is dead or stuck.

    wire_bytes counts the payload this rank handed to or got from others, each buffer once per collective.
    """

    name: str
    aborts_all = False  # whether one rank's abort ends every rank

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank = rank
        self.world_size = world_size
        self.wire_bytes = 0
        #: The ranks that share an evaluation.
        self.evaluators: tuple[int, ...] = tuple(range(world_size))

    @property
    def is_server(self) -> bool:
        """Whether this is rank 0, the server's."""
        return self.rank == 0

    def place(self, placement: Placement) -> None:
        """Learn the GPUs of all ranks, this one's being torch's current device. Collective, once."""
        self.evaluators = placement.evaluators(self.world_size)

    def evaluator(self, number: int) -> int:
        """The rank that does piece `number` of an evaluation."""
        return self.evaluators[number % len(self.evaluators)]

    def broadcast(self, tensor: Tensor) -> None:
        """Copy rank 0's `tensor` into every other rank's."""
        _check(tensor, MOVABLE)
        self._count(tensor.nbytes)
        if tensor.numel():
            self._staged(self._broadcast, tensor, copy_in=self.rank == 0, copy_out=self.rank != 0)

    def reduce_sum(self, tensor: Tensor) -> None:
        """Add all ranks' tensors up in rank 0's; the others' are undefined then. Integer sums are exact."""
        _check(tensor, REDUCIBLE)
        self._count(tensor.nbytes)
        if tensor.numel():
            self._staged(self._reduce_sum, tensor, copy_in=True, copy_out=self.rank == 0)

    def all_reduce_max(self, tensor: Tensor) -> None:
        """Elementwise maximum over all ranks, on all ranks. No NaN: backends disagree about it."""
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
        with _collective("all_to_all"):
            self._exchange(outgoing, {j: _bytes(buffer) for j, buffer in incoming.items()})
        for j, buffer in incoming.items():
            if buffer is not receive[j]:
                receive[j].copy_(buffer)

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's `value`, as JSON carries it, on every rank; at most 64 MiB."""
        text = _encode(value) if self.rank == 0 else b""
        size = torch.tensor([len(text)])
        self.broadcast(size)
        # Every rank knows the size, so that all of them raise and none is left waiting.
        _check_size(int(size))
        buffer = _tensor(text) if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
        self.broadcast(buffer)
        return _decode(buffer)

    def gather_json(self, value: Any) -> list[Any] | None:
        """All ranks' values in rank order on rank 0, None elsewhere; at most 64 MiB in all."""
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
        with _collective("barrier"):
            self._all_reduce_max(torch.zeros(1, dtype=torch.int64))

    @abstractmethod
    def close(self) -> None:
        """Leave the group; collective, and the last call of every rank."""

    def abort(self, code: int) -> NoReturn:
        """End this process at once with `code`, from any thread and whatever the main thread waits for."""
        os._exit(code)

    def __enter__(self) -> Transport:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        # After an error the peers may be anywhere; closing, a collective, could wait for ever.
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
        """Point-to-point uint8 buffers by peer; pairs with nothing to say are absent on both sides."""

    def _takes(self, tensor: Tensor) -> bool:
        """Whether the backend can work on the memory of `tensor` itself."""
        return tensor.device.type == "cpu"

    def _count(self, size_bytes: int) -> None:
        if self.world_size > 1:
            self.wire_bytes += size_bytes

    def _staged(self, collective: Callable[[Tensor], None], tensor: Tensor, *, copy_in: bool, copy_out: bool) -> None:
        buffer = self._to_wire(tensor) if copy_in else self._wire_like(tensor)
        with _collective(collective.__name__.lstrip("_")):
            collective(buffer)
        if copy_out and buffer is not tensor:
            tensor.copy_(buffer)

    def _to_wire(self, tensor: Tensor) -> Tensor:
        buffer = self._wire_like(tensor)
        return buffer if buffer is tensor else buffer.copy_(tensor)

    def _wire_like(self, tensor: Tensor) -> Tensor:
        """`tensor` itself, or pinned host memory of its shape where the backend cannot take it."""
        if self._takes(tensor):
            return tensor
        return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)


class LoopbackTransport(Transport):
    """One process: nothing to exchange, and nothing on a wire."""

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
    """How long ranks may take to find each other: importing torch in 8 processes takes 40 s on 2 cores."""
    return max(timeout_s, 120.0)


@contextlib.contextmanager
def connect_deadline(launch: Launch, limit_s: float) -> Iterator[None]:
    """End this process with 1 if the block, ranks finding each other, takes longer than `limit_s`.

    Backends hang in C++ when a peer dies half-way, and liveness is not there yet.
    """

    def give_up() -> None:
        sys.stderr.write(
            f"fedhpc: rank {launch.rank} of {launch.world_size} could not connect to the others within "
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


@contextlib.contextmanager
def _collective(name: str) -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Gloo's messages begin with its source file in brackets.
        text = re.sub(r"^\[[^]]*\] *", "", str(error).partition("\n")[0])
        raise TransportError(f"{name} failed: {text}") from error


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
