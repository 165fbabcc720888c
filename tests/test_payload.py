"""Exact sums: order-free to the bit, accurate, and safe from overflow."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch

from fedhpc.updates.exact_sum import from_grid, grid_exponents, largest_exponents, to_grid
from fedhpc.updates.layout import Layout

LAYOUT = Layout({"a": (3, 4), "b": (), "tiny": (5,), "zero": (2,)})


def updates(clients: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(clients, LAYOUT.size))
    values[:, 13:18] *= 1e-30  # one scale for all tensors would lose these
    values[:, 18:] = 0
    weights = rng.random(clients)
    return torch.from_numpy(values).float(), torch.from_numpy(weights / weights.sum())


def total(values: torch.Tensor, weights: torch.Tensor, order: list[int], split: int) -> torch.Tensor:
    """The sum as `split` workers make it: each adds its own, then the partial sums are added."""
    highest = torch.stack(
        [largest_exponents(values[order[w::split]], weights[order[w::split]], LAYOUT) for w in range(split)]
    ).amax(0)
    steps = grid_exponents(highest, len(values), LAYOUT)
    parts = []
    for w in range(split):
        acc = torch.zeros(LAYOUT.size, dtype=torch.int64)
        for i in order[w::split]:
            acc += to_grid(values[i], float(weights[i]), steps)
        parts.append(acc)
    return from_grid(torch.stack(parts).sum(0), steps)


def test_layout_views_and_flatten_are_inverse() -> None:
    flat = torch.arange(2.0 * LAYOUT.size).view(2, LAYOUT.size)
    views = LAYOUT.views(flat)
    assert {n: tuple(v.shape) for n, v in views.items()} == {n: (2, *s) for n, s in LAYOUT.shapes.items()}
    assert torch.equal(LAYOUT.flatten(views), flat)
    views["b"][1] = -1  # views, not copies
    assert flat[1, 12] == -1


@pytest.mark.parametrize("clients", [1, 2, 7, 64])
def test_the_sum_has_the_same_bits_in_any_order_on_any_number_of_workers(clients: int) -> None:
    values, weights = updates(clients)
    reference = total(values, weights, list(range(clients)), 1)
    for seed, split in [(1, 1), (2, 2), (3, 3), (4, 8)]:
        order = np.random.default_rng(seed).permutation(clients).tolist()
        assert torch.equal(total(values, weights, order, min(split, clients)), reference)


def test_values_are_brought_to_the_grid_to_the_last_bit() -> None:
    """As ldexp does it, at either end of what float64 can hold, and zeros at any exponent."""
    steps = torch.arange(-1130, 960)
    values = torch.randn(3, len(steps), dtype=torch.float64).clamp(-1.9, 1.9)
    values = torch.ldexp(torch.ldexp(values, steps // 2), steps - steps // 2 + 40)
    half = (-steps) // 2
    wanted = torch.ldexp(torch.ldexp(values * 0.75, half), -steps - half).round_().to(torch.int64)
    found = to_grid(values, 0.75, steps)
    assert torch.equal(found, wanted) and found.abs().max() > 2**40
    back = torch.ldexp(torch.ldexp(wanted.double(), steps // 2), steps - steps // 2)
    assert torch.equal(from_grid(found, steps), back)
    beyond = torch.tensor([-(2**20), 2**20])
    assert not to_grid(torch.zeros(2, 2), 1.0, beyond).any() and not from_grid(torch.zeros(2), beyond).any()


def test_the_sum_is_accurate_for_every_tensor() -> None:
    values, weights = updates(50)
    found = total(values, weights, list(range(50)), 3)
    for begin, end in [(0, 12), (12, 13), (13, 18)]:
        exact = [
            sum(Fraction(float(v)) * Fraction(float(w)) for v, w in zip(values[:, j], weights, strict=True))
            for j in range(begin, end)
        ]
        scale = float((values[:, begin:end].abs().amax(1).double() * weights).max())
        error = max(abs(float(Fraction(float(found[j])) - e)) for j, e in zip(range(begin, end), exact, strict=True))
        assert error < 1e-15 * scale
    assert not found[18:].any()


def test_equal_largest_updates_do_not_overflow() -> None:
    for clients in (1, 2, 3, 1000):
        values = torch.full((clients, LAYOUT.size), 1.9999)
        weights = torch.ones(clients, dtype=torch.float64)
        found = total(values, weights, list(range(clients)), min(clients, 4))
        torch.testing.assert_close(found, torch.full_like(found, clients * float(values[0, 0])), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-44, 1e-300, 1e300])
def test_extreme_scales(scale: float) -> None:
    values = torch.randn(4, LAYOUT.size, dtype=torch.float64) * scale
    weights = torch.full((4,), 0.25, dtype=torch.float64)
    found = total(values, weights, [0, 1, 2, 3], 2)
    torch.testing.assert_close(found / scale, values.mean(0) / scale, rtol=1e-9, atol=1e-9)


def test_a_worker_without_clients_agrees_to_anything() -> None:
    none = largest_exponents(torch.empty(0, LAYOUT.size), torch.empty(0, dtype=torch.float64), LAYOUT)
    some = largest_exponents(*updates(3), LAYOUT)
    assert torch.equal(torch.maximum(none, some), some)
