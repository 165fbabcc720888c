"""Measures products of many groups on one GPU: of routed experts, and of low-rank terms of unequal ranks.

The factors of K clients for E experts are E * K groups of few tokens each. kernels.py computes them all at once, or one
after another; the first row says whether its rule is right on this GPU.

Clients of unequal ranks are computed with the largest rank, their factors filled up with zeros. The second row compares
that with products of the ranks alone, which no method computes: the third row says how much of a step they could save.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from fedhpc.bench.bed import Bed, Clock, Sizes
from fedhpc.bench.compute import clock
from fedhpc.bench.table import Row, interleaved, ratio, skipped

RANKS = (4, 8, 16, 32)  # of clients, in turn
_RANK = 8  # of experts
_TOP = 2  # experts of a token


def grouped(device: Any, sizes: Sizes, until: Clock) -> Iterator[Row]:
    """Compare products of groups at once with the way without; rows in the order of their worth."""
    import torch

    if not hasattr(torch.nn.functional, "grouped_mm"):
        yield skipped("products of all groups at once", f"torch {torch.__version__} has no grouped_mm (from 2.10 on)")
        return
    model, (batch, length), clients = list(sizes.models)[-1], sizes.cells[0], sizes.profiled
    width, tokens = sizes.models[model]().hidden_size, batch * length
    compared = {
        f"terms of {sizes.experts} experts and {clients} clients: all groups at once over one after another": (
            _experts(sizes.experts, clients, width, tokens, device), 1.0,
        ),
        f"terms of {clients} clients of ranks {', '.join(map(str, RANKS))}: grouped over filled up with zeros": (
            _unequal(clients, width, tokens, device), None,
        ),
    }  # fmt: skip
    for what, (runs, target) in compared.items():
        if until.over:
            yield skipped(what, "its time was over")
            continue
        seconds = interleaved(runs, sizes.repeats, clock(device))
        note = ", ".join(f"{name} {statistics.median(values) * 1e3:.2f} ms" for name, values in seconds.items())
        without, with_ = seconds.values()
        yield Row(what, ratio(without, with_), target, note=f"{note}, forward and backward")
    what = f"{model} lora, block of {clients}: tokens/s with rank {max(RANKS)} for all over half of it"
    if until.over:
        yield skipped(what, "its time was over")
        return
    each = [
        Bed(model, "lora", device, sizes, rank=rank).blocks([clients], batch, length, until).rate
        for rank in (max(RANKS), max(RANKS) // 2)
    ]
    yield Row(what, each[0] / each[1], note=f"the mean of the ranks above is {statistics.mean(RANKS):.4g}")


def _experts(experts: int, clients: int, width: int, tokens: int, device: Any) -> dict[str, Callable[[], None]]:
    """The low-rank terms of `experts` experts for `clients` clients with `tokens` tokens each, in two ways."""
    import torch

    from fedhpc import kernels

    groups = torch.randint(experts * clients, (clients * tokens * _TOP,), device=device).sort().values
    ends = torch.searchsorted(groups, torch.arange(1, experts * clients + 1, device=device), out_int32=True)
    x, a, b = _drawn(
        [(len(groups), width), (experts * clients, width, _RANK), (experts * clients, _RANK, width)], device
    )

    def term(way: Any) -> Any:
        of_layer = kernels.Groups(ends)  # which a training step reads from the GPU anew
        return way.apply(way.apply(x, a, of_layer), b, of_layer)

    return {
        "in turn": _differentiated(lambda: term(kernels.GroupsInTurn), (x, a, b)),
        "at once": _differentiated(lambda: term(kernels.GroupsAtOnce), (x, a, b)),
    }


def _unequal(clients: int, width: int, tokens: int, device: Any) -> dict[str, Callable[[], None]]:
    """The low-rank terms of `clients` clients of `RANKS`, added to a layer's output, in two ways."""
    import torch

    from fedhpc import kernels

    ranks, rank = [RANKS[client % len(RANKS)] for client in range(clients)], max(RANKS)
    output, x, a, b = _drawn([(clients, tokens, width)] * 2 + [(clients, rank, width), (clients, width, rank)], device)
    packed_a, packed_b = _drawn([(sum(ranks), width)] * 2, device)
    ends = torch.tensor(ranks, device=device).cumsum(0, dtype=torch.int32)
    return {
        "filled up": _differentiated(lambda: kernels.add_low_rank(output, x, a, b, 0.5), (x, a, b)),
        "grouped": _differentiated(
            lambda: output + 0.5 * grouped_term(x, packed_a, packed_b, ends), (x, packed_a, packed_b)
        ),
    }


def grouped_term(x: Any, a: Any, b: Any, ends: Any) -> Any:
    """x A^T B^T of G clients of unequal ranks: (G, M, out).

    x (G, M, in), M times the bytes of a number a multiple of 16. a (R, in) and b (R, out): A and B^T of one client
    after another, R the sum of their ranks; ends int32 (G,): how many rows there are up to the end of each client's.
    """
    import torch

    inner = torch.nn.functional.grouped_mm(a, x.mT, offs=ends)  # (R, M)
    return torch.nn.functional.grouped_mm(inner.mT, b, offs=ends)


def _drawn(shapes: Sequence[tuple[int, ...]], device: Any) -> list[Any]:
    import torch

    return [torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for shape in shapes]


def _differentiated(call: Callable[[], Any], leaves: Sequence[Any]) -> Callable[[], None]:
    """A function that calls `call` and computes the gradients of `leaves`."""
    import torch

    along = torch.ones_like(call().detach())

    def run() -> None:
        torch.autograd.grad(call(), leaves, along)

    return run
