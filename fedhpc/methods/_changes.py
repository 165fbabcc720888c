"""What methods change at linear layers, for each row, or in the output layer each token, as its client has trained it.

Most layers are given the rows of a batch, (B, T, width). The output layer is given the supervised tokens of all rows,
(S, D): there the tokens of each client make one row of their own, so that a method computes both alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.methods._linear import Layer
from fedhpc.methods.base import PerClient
from fedhpc.rng import bits


@dataclass(frozen=True)
class Change:
    """What a method does at a linear layer to B rows of T tokens."""

    before: Callable[[Tensor], Tensor] | None = None  # to the inputs (B, T, in)
    behind: Callable[[Tensor, Tensor], Tensor] | None = None  # to the outputs (B, T, out), the second argument


@dataclass(frozen=True)
class Rows:
    """B rows, and what they are computed with: the arguments of `Method.attach`."""

    trained: PerClient
    received: PerClient
    clients: Tensor  # int64 (B,)
    keys: Tensor | None = None  # int64 (B,), or in the output layer one for each token: of random draws

    def of_client(self, client: int, keys: Tensor | None) -> Rows:
        """One row of a client."""
        trained, received = _OfClient(self.trained, client), _OfClient(self.received, client)
        return Rows(trained, received, self.clients.new_zeros(1), keys)


class _OfClient(Mapping[str, Tensor]):
    """The values of one of K clients, (1, *shape) each, made when they are asked for."""

    def __init__(self, values: PerClient, client: int) -> None:
        self._values, self._client = values, client

    def __getitem__(self, name: str) -> Tensor:
        value = self._values[name]
        return value if len(value) == 1 else value[self._client : self._client + 1]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


#: What a method does at the layer at a path.
ChangeAt = Callable[[str, Rows], Change]


@contextmanager
def changed(
    layers: Mapping[str, Layer], change_at: ChangeAt, rows: Rows
) -> Iterator[Callable[[Tensor, slice], AbstractContextManager[None]] | None]:
    """Change what `layers` compute, while the context is open; gives `Attached.output`."""
    output = {path: layer.module for path, layer in layers.items() if layer.in_output}
    with ExitStack() as open_:
        for path, layer in layers.items():
            if not layer.in_output:
                _hook(open_, layer.module, change_at(path, rows), len(rows.clients))
        yield partial(_changed_output, output, change_at, rows) if output else None


@contextmanager
def _changed_output(
    layers: Mapping[str, Any], change_at: ChangeAt, rows: Rows, of_tokens: Tensor, piece: slice
) -> Iterator[None]:
    """Change what the output layer computes of a piece of the tokens, which are of the rows `of_tokens` (S,)."""
    keys = None if rows.keys is None else bits(rows.keys.index_select(0, of_tokens), _numbers(of_tokens))[piece]
    clients = rows.clients.index_select(0, of_tokens[piece])
    order = clients.argsort(stable=True)
    count = max(len(value) for value in (*rows.trained.values(), *rows.received.values()))
    sizes = clients.bincount(minlength=count).tolist() if count > 1 else [len(clients)]
    keys_of = [None] * count if keys is None else (keys[order] if count > 1 else keys).split(sizes)
    present = [client for client, size in enumerate(sizes) if size] or [0]
    with ExitStack() as open_:
        for path, module in layers.items():
            changes = [change_at(path, rows.of_client(client, keys_of[client])) for client in present]
            if len(changes) > 1:
                changes = [_of_clients(changes, order, [sizes[client] for client in present])]
            _hook(open_, module, changes[0], 1)
        yield


def _of_clients(changes: Sequence[Change], order: Tensor, sizes: Sequence[int]) -> Change:
    """The changes of several clients to one row: in this `order` its tokens are those of one client after another."""
    inverse = order.argsort()

    def each(parts: Sequence[Callable[..., Tensor]], *given: Tensor) -> Tensor:
        of_clients = zip(*(kernels.of_rows(tensor[0], order).split(sizes) for tensor in given), strict=True)
        done = [part(*(x.unsqueeze(0) for x in xs))[0] for part, xs in zip(parts, of_clients, strict=True)]
        return kernels.of_rows(torch.cat(done), inverse).unsqueeze(0)

    before = [change.before for change in changes if change.before is not None]
    behind = [change.behind for change in changes if change.behind is not None]
    return Change(partial(each, before) if before else None, partial(each, behind) if behind else None)


def _numbers(rows: Tensor) -> Tensor:
    """Which of the tokens of its row each token is, counted from 0: int64 (S,) like `rows`."""
    order = rows.argsort(stable=True)
    ordered = rows[order]
    counted = torch.arange(len(rows), device=rows.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(order).scatter_(0, order, counted)


def _hook(open_: ExitStack, module: Any, change: Change, rows: int) -> None:
    """Change what a layer computes until `open_` is closed. OPT's feed-forward gives its layers (B * T, width)."""

    def by_row(x: Tensor) -> Tensor:
        return x.reshape(rows, -1, x.shape[-1])

    if (before := change.before) is not None:
        hook = module.register_forward_pre_hook(lambda _, xs: (before(by_row(xs[0])).reshape(xs[0].shape),))
        open_.callback(hook.remove)
    if (behind := change.behind) is not None:
        hook = module.register_forward_hook(lambda _, xs, y: behind(by_row(xs[0]), by_row(y)).reshape(y.shape))
        open_.callback(hook.remove)
