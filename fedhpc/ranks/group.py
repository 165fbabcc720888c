"""The ranks of one worker, which hold a sharded base between them and gather its layers together.

A gather takes part of every rank of the group. When one of them comes to a layer depends on its own rows: another may
have more batches, or may be writing a longer text. So before each gather the ranks agree on which layer it is: the
highest that one of them needs. Whoever needs another one, or none, takes part, lets go of it and asks again. No rank
ever computes for nothing, and ranks that begin a pass together stay together: one that is behind is waited for where
the other begins its next.

While a layer computes, the next one is on its way. Every rank that holds layers takes part in every gather, so all of
them know the same past, expect the same layer next and begin to gather it in the same order, without a word. What comes
is still agreed on: where it is another layer, the expected one was gathered for nothing.

A rank that has nothing left to compute comes to the next collective of all ranks. There it takes part in gathers until
nobody of its group needs any (`serve`), so whatever lies between two collectives can be different on every rank.

The server holds no layers. It is the guest of the first worker's group: it takes part in what is agreed, and is sent a
layer whole where it needs one, as for the first values of a prefix.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fedhpc.ranks.failed_collective import collective

if TYPE_CHECKING:
    from torch import Tensor

_NONE = -1


class Layer(Protocol):
    """A layer of which every rank of a group holds a part, or a guest nothing."""

    #: Bytes of the whole layer.
    size_bytes: int

    def parameters(self) -> Sequence[Tensor]:
        """The parameters of the layer while it is gathered."""

    def unshard(self) -> Any:
        """Make room for the layer; with parts, gather it from them: every rank that holds one calls it."""

    def prefetch(self) -> None:
        """Begin to gather the layer, for `unshard` to wait for: every rank that holds a part of it calls it."""
        return None

    def reshard(self) -> None:
        """Let go of all but this rank's own part."""


class Agreed(NamedTuple):
    """What a group has agreed on: a layer or none, by numbers from 0, or -1."""

    layer: int
    of_guest: int  # the layer that the guest needs


class Account(NamedTuple):
    """What gathering has taken of one rank so far."""

    waited_s: float = 0.0  # while it had something to compute: for others of the group to come to a gather
    served_s: float = 0.0  # while it had nothing to compute
    received_bytes: int = 0  # of layers

    def since(self, before: Account) -> Account:
        """What it has taken since then."""
        return Account(
            self.waited_s - before.waited_s,
            self.served_s - before.served_s,
            self.received_bytes - before.received_bytes,
        )


class OneWhole:
    """Layers of which one is whole at a time."""

    def __init__(self) -> None:
        #: The layers, by their numbers.
        self.layers: list[Layer] = []
        #: What to do before this rank lets go of a layer, by its number.
        self.before_release: dict[int, Callable[[], None]] = {}
        self._gathered = _NONE

    def add(self, layer: Layer) -> int:
        """Take in a layer, on every rank in the same order; the number by which it is needed."""
        self.layers.append(layer)
        return len(self.layers) - 1

    def need(self, number: int) -> None:
        """Have a layer whole, and the one before it no more."""
        if self._gathered != number:
            self._take(number)

    def _release(self) -> None:
        """Let go of the layer that is whole."""
        if self._gathered != _NONE:
            if self._gathered in self.before_release:
                self.before_release[self._gathered]()
            self.layers[self._gathered].reshard()
            self._gathered = _NONE

    def _take(self, number: int) -> None:
        self._release()
        self.layers[number].unshard()
        self._gathered = number


class Succession:
    """Tells which layer is gathered next: the one that followed the last two when they were last gathered in turn.

    Two tell the way forward from the way back. This is wrong only where passes of another sort begin, as evaluation
    after training. In the literature it is a Markov prefetcher (Joseph and Grunwald 1997, doi 10.1145/264107.264207).
    """

    def __init__(self) -> None:
        self._last = (_NONE, _NONE)
        self._followed: dict[tuple[int, int], int] = {}

    def add(self, number: int) -> None:
        """Take in the layer that is gathered now."""
        self._followed[self._last] = number
        self._last = (self._last[1], number)

    def begin(self) -> None:
        """Begin anew: what is gathered next follows on nothing."""
        self._last = (_NONE, _NONE)

    @property
    def expected(self) -> int:
        """The number of the layer that is gathered next; -1 where nothing is known yet."""
        return self._followed.get(self._last, _NONE)


class Group(OneWhole, ABC):
    """The ranks of one worker, as one of them sees it. One layer is whole at a time, and one is on its way."""

    def __init__(self, size: int, member: int | None) -> None:
        """size: how many ranks hold the layers. member: which of them this rank is, from 0; None: their guest."""
        super().__init__()
        self.size, self.member = size, member
        self.account = Account()
        #: What tells which layer to gather while another one computes, on all that hold layers the same.
        self.succession = Succession()
        self._coming = _NONE  # the layer that is on its way

    @property
    def is_guest(self) -> bool:
        """Whether this rank holds no part of the layers."""
        return self.member is None

    @property
    @abstractmethod
    def process_group(self) -> Any:
        """The torch.distributed.ProcessGroup of those that hold the layers."""

    @abstractmethod
    def _agree(self, number: int) -> Agreed:
        """The highest of the numbers that the ranks of the group and its guest give. Collective between them."""

    @abstractmethod
    def _send(self, tensors: Sequence[Tensor]) -> None:
        """Send these tensors to the guest, where this rank speaks for the group."""

    @abstractmethod
    def _receive(self, tensors: Sequence[Tensor]) -> None:
        """Fill these tensors with what the guest is sent."""

    @abstractmethod
    def gathered(self, tensor: Tensor) -> Tensor:
        """The tensors (n,) of those that hold the layers, one after the other: (G n,). Collective between them."""

    @abstractmethod
    def reduced(self, tensor: Tensor) -> Tensor:
        """The n of this rank in the sum of tensors (G n,) of those that hold the layers: (n,). Collective."""

    @abstractmethod
    def add_up(self, tensor: Tensor) -> Tensor:
        """Take the sum of the tensors of those that hold the layers, in place, and return it. Collective."""

    def need(self, number: int) -> None:
        """Have a layer whole, and the one before it no more."""
        if self._gathered == number:
            return
        began = time.perf_counter()
        with collective("gathering a layer"):
            while (agreed := self._agree(number)).layer != number:
                self._gather(agreed)
            waited = time.perf_counter() - began
            self._gather(agreed)
        self.account = self.account._replace(waited_s=self.account.waited_s + waited)

    def serve(self) -> None:
        """Take part in gathers until no rank of the group needs any."""
        if not self.layers:
            return
        began = time.perf_counter()
        while (agreed := self._agree(_NONE)).layer != _NONE:
            self._gather(agreed)
        self.release()
        self.account = self.account._replace(served_s=self.account.served_s + time.perf_counter() - began)

    def release(self) -> None:
        """Let go of the layer that is whole and of the one on its way. All that hold layers do so at the same point."""
        self._release_all()
        self.succession.begin()

    def _release_all(self) -> None:
        self._release()
        if self._coming != _NONE:
            with collective("gathering a layer"):
                self.layers[self._coming].unshard()
            self.layers[self._coming].reshard()
            self._coming = _NONE

    def _gather(self, agreed: Agreed) -> None:
        number, wanted = agreed.layer, agreed.layer == agreed.of_guest
        if self.is_guest:
            if wanted:
                self._take(number)
                self._receive(self.layers[number].parameters())
                self._count(self.layers[number].size_bytes)
            return
        if self._coming != number:
            self._release_all()
            self._count_gather(number)
        self._coming = _NONE
        self._take(number)
        if wanted:
            self._send(self.layers[number].parameters())
        self.succession.add(number)
        self._prefetch(self.succession.expected)

    def _prefetch(self, number: int) -> None:
        """Begin to gather a layer, now that the one before it has its final memory: of two there is never more."""
        if number not in (_NONE, self._gathered):
            self._count_gather(number)
            self.layers[number].prefetch()
            self._coming = number

    def _count_gather(self, number: int) -> None:
        size_bytes = self.layers[number].size_bytes
        self._count(size_bytes - size_bytes // self.size)

    def _count(self, received_bytes: int) -> None:
        self.account = self.account._replace(received_bytes=self.account.received_bytes + received_bytes)
