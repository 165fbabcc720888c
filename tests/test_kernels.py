"""Operations with gradients of their own, against torch's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedhpc.kernels import add_low_rank, of_rows, product


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
