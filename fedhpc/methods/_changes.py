"""What methods change at linear layers, for each row, or in the output layer each token, as its client has trained it.

Experts and routers have their own ways (`_experts`); a method says of a weight of experts what becomes of its tokens.

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
from fedhpc.methods._experts import ChangeOfExperts, changed_experts, changed_router
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

    @property
    def count(self) -> int:
        """K, of how many clients there are values."""
        return max(len(value) for value in (*self.trained.values(), *self.received.values()))

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
ChangeAt = Callable[[str, Rows], Change | ChangeOfExperts]


@contextmanager
def changed(
    layers: Mapping[str, Layer], change_at: ChangeAt, rows: Rows
) -> Iterator[Callable[[Tensor, slice], AbstractContextManager[None]] | None]:
    """Change what `layers` compute, while the context is open; gives `Attached.output`."""
    output = {path: layer.module for path, layer in layers.items() if layer.in_output}
    of_experts: dict[Any, dict[str, ChangeOfExperts]] = {}
    with ExitStack() as open_:
        for path, layer in layers.items():
            if layer.in_output:
                continue
            change = change_at(path, rows)
            if isinstance(change, ChangeOfExperts):
                of_experts.setdefault(layer.module, {})[layer.parameter] = change
            elif layer.parameter:
                open_.enter_context(changed_router(layer.module, *_by_rows(change, len(rows.clients))))
            else:
                _hook(open_, layer.module, change, len(rows.clients))
        for module, changes in of_experts.items():
            open_.enter_context(changed_experts(module, changes, rows.clients, rows.count))
        yield partial(_changed_output, output, change_at, rows) if output else None


@contextmanager
def _changed_output(
    layers: Mapping[str, Any], change_at: ChangeAt, rows: Rows, of_tokens: Tensor, piece: slice
) -> Iterator[None]:
    """Change what the output layer computes of a piece of the tokens, which are of the rows `of_tokens` (S,)."""
    keys = None if rows.keys is None else bits(rows.keys.index_select(0, of_tokens), _numbers(of_tokens))[piece]
    clients = rows.clients.index_select(0, of_tokens[piece])
    order = clients.argsort(stable=True)
    count = rows.count
    sizes = clients.bincount(minlength=count).tolist() if count > 1 else [len(clients)]
    keys_of = [None] * count if keys is None else (keys[order] if count > 1 else keys).split(sizes)
    present = [client for client, size in enumerate(sizes) if size] or [0]
    with ExitStack() as open_:
        for path, module in layers.items():
            changes = [_of_layer(change_at(path, rows.of_client(client, keys_of[client]))) for client in present]
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


def _of_layer(change: Change | ChangeOfExperts) -> Change:
    assert isinstance(change, Change), "no experts stand behind the last layer"
    return change


#: The two functions of a change, or None.
_Both = tuple[Callable[[Tensor], Tensor] | None, Callable[[Tensor, Tensor], Tensor] | None]


def _by_rows(change: Change, rows: int) -> _Both:
    """What a change does to tensors of any shape (..., width). OPT's feed-forward gives its layers (B * T, width)."""

    def by_row(x: Tensor) -> Tensor:
        return x.reshape(rows, -1, x.shape[-1])

    before, behind = change.before, change.behind
    return (
        None if before is None else lambda x: before(by_row(x)).reshape(x.shape),
        None if behind is None else lambda x, y: behind(by_row(x), by_row(y)).reshape(y.shape),
    )


def _hook(open_: ExitStack, module: Any, change: Change, rows: int) -> None:
    """Change what a layer computes until `open_` is closed."""
    before, behind = _by_rows(change, rows)
    if before is not None:
        hook = module.register_forward_pre_hook(lambda _, xs: (before(xs[0]),))
        open_.callback(hook.remove)
    if behind is not None:
        hook = module.register_forward_hook(lambda _, xs, y: behind(xs[0], y))
        open_.callback(hook.remove)
