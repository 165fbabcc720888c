"""Operations with gradients of their own, against torch's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fedhpc import kernels
from fedhpc.bench.bed import Clock
from fedhpc.bench.gpu_grouped import RANKS, grouped, grouped_term
from fedhpc.kernels import GroupsAtOnce, GroupsInTurn, add_low_rank, of_rows, product
from tests.fake_gpu import fake_gpu
from tests.test_bench_gpu import SIZES

needs_grouped_mm = pytest.mark.skipif(
    not hasattr(torch.nn.functional, "grouped_mm"), reason="torch has grouped_mm from 2.10 on"
)


def drawn(*shapes: tuple[int, ...]) -> list[Tensor]:
    noise = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=noise, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("columns", [1, 8, 16])
def test_a_product_is_the_product_whatever_its_columns(columns: int) -> None:
    a, b = drawn((3, 7, 5), (3, 5, columns))
    torch.testing.assert_close(product(a, b), a @ b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("rank", [2, 16])
def test_a_low_rank_term_and_its_gradients(rank: int) -> None:
    leaves = drawn((3, 7, 6), (3, 7, 5), (3, rank, 5), (3, 6, rank))
    output, x, a, b = leaves
    ours, theirs = add_low_rank(*leaves, 0.5), output + 0.5 * x @ a.mT @ b.mT
    torch.testing.assert_close(ours, theirs, rtol=1e-13, atol=1e-13)
    (along,) = drawn(tuple(ours.shape))
    for found, wanted in zip(
        torch.autograd.grad(ours, leaves, along), torch.autograd.grad(theirs, leaves, along), strict=True
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_rows_give_their_gradient_to_their_client_alone() -> None:
    (x,) = drawn((4, 2, 3))
    rows = torch.tensor([2, 0, 2, 1, 2])
    found = of_rows(x, rows)
    assert torch.equal(found, x[rows])
    (along,) = drawn(tuple(found.shape))
    along = along.detach()
    along[3] = torch.nan  # of a client that diverged
    (gradient,) = torch.autograd.grad(found, x, along.mT.contiguous().mT)  # laid out as a permuted one
    assert gradient[1].isnan().all()
    torch.testing.assert_close(gradient[2], along[[0, 2, 4]].sum(0), rtol=1e-13, atol=1e-13)
    assert torch.equal(of_rows(x[:1], rows), x[[0] * 5])  # one that all share
    assert torch.equal(gradient[0], along[1]) and torch.equal(gradient[3], torch.zeros(2, 3, dtype=x.dtype))


def test_gradients_of_16_bits_are_added_up_in_32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 1000 ones a GPU's sum in 16 bits is 256; a CPU's is not, so what it is asked for is looked at."""
    dtypes, add = [], torch.Tensor.index_add_
    monkeypatch.setattr(torch.Tensor, "index_add_", lambda x, *about: (dtypes.append(x.dtype), add(x, *about))[1])
    x = torch.zeros(2, 3, dtype=torch.bfloat16, requires_grad=True)
    of_rows(x, torch.zeros(1000, dtype=torch.int64)).sum().backward()
    assert x.grad is not None and dtypes == [torch.float32]
    assert x.grad.dtype == torch.bfloat16 and torch.equal(x.grad[0].float(), torch.full((3,), 1000.0))


def groups_agree(device: str, dtype: torch.dtype, tolerance: float) -> None:
    """Products of groups at once and in turn, and their gradients, are the same; one group has no rows."""
    ends = torch.tensor([3, 3, 10, 11], dtype=torch.int32, device=device)
    x, weights = (leaf.detach().to(device, dtype).requires_grad_() for leaf in drawn((11, 16), (4, 16, 8)))

    def with_gradients(y: Tensor) -> list[Tensor]:
        return [y, *torch.autograd.grad(y.sum(), (x, weights))]  # an expanded gradient, as a sum has

    wanted = with_gradients(torch.cat([x[:3] @ weights[0], x[3:10] @ weights[2], x[10:] @ weights[3]]))
    for way in (GroupsAtOnce, GroupsInTurn):
        for one, other in zip(with_gradients(way.apply(x, weights, kernels.Groups(ends))), wanted, strict=True):
            torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@needs_grouped_mm
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_all_groups_at_once_equal_one_product_for_each(dtype: torch.dtype, tolerance: float) -> None:
    groups_agree("cpu", dtype, tolerance)


def test_the_groups_way_follows_from_the_gpu_and_the_shapes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def at_once(width: int, rank: int, dtype: torch.dtype = torch.bfloat16) -> bool:
        return kernels.groups_at_once(torch.zeros(3, width, dtype=dtype), torch.zeros(2, width, rank, dtype=dtype))

    assert not at_once(16, 8)  # a CPU
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", None, raising=False)
    with fake_gpu(monkeypatch), torch.device("cuda:0"):
        assert at_once(16, 8)
        assert not (at_once(16, 4) or at_once(12, 8) or at_once(16, 8, torch.float32))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
        assert not at_once(16, 8)


@needs_grouped_mm
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 5e-2)])
def test_grouped_terms_equal_those_filled_up_with_zeros(dtype: torch.dtype, tolerance: float) -> None:
    x, a, b = (leaf.detach().to(dtype).requires_grad_() for leaf in drawn((4, 8, 16), (4, 32, 16), (4, 24, 32)))
    real = torch.arange(32) < torch.tensor(RANKS).unsqueeze(1)  # (4, 32)
    packed = a[real], b.mT[real]
    found = grouped_term(x, *packed, torch.tensor(RANKS).cumsum(0, dtype=torch.int32))
    wanted = add_low_rank(torch.zeros_like(found), x, a * real.unsqueeze(2), b * real.unsqueeze(1), 1.0)
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)
    along = drawn(tuple(found.shape))[0].detach().to(dtype)
    for one, other in zip(*(torch.autograd.grad(y, (x, a, b), along) for y in (found, wanted)), strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@needs_grouped_mm
def test_the_bench_compares_products_of_groups() -> None:
    sizes = replace(SIZES, experts=3)
    rows = list(grouped(torch.device("cpu"), sizes, Clock()))
    assert [row.target for row in rows] == [1.0, None, None] and all(row.measured > 0 for row in rows)
    assert rows[0].what.startswith("terms of 3 experts and 2 clients") and "at once" in rows[0].note
    assert all(row.note == "its time was over" for row in grouped(torch.device("cpu"), sizes, Clock(0.0)))
