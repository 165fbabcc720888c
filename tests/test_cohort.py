"""The verbs of a cohort against numpy, and their bits on several ranks."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from fedhpc.errors import UserError
from fedhpc.ranks.transport.base import Transport
from fedhpc.updates.cohort import Cohort
from fedhpc.updates.exact_sum import to_grid
from fedhpc.updates.layout import Layout
from tests.federations import on_threads

LAYOUT = Layout({"a": (700_001,), "b": (3, 5), "c": (400_000,)})  # more coordinates than one exchange has
PLANNED = [7, 3, 11, 5, 2, 13]
ACCEPTED = [0, 2, 3, 5]  # positions of those whose updates are used
ASCENDING = [2, 0, 1, 3]  # these clients by their numbers
SHARES = np.array([0.25, 0.125, 0.25, 0.125, 0.0, 0.25])
UPDATES = torch.randn(4, LAYOUT.size, generator=torch.Generator().manual_seed(0))


def on_ranks(ranks: int, verb: Callable[[Cohort], object]) -> list[object]:
    """What `verb` gives on every rank, the updates being dealt out in some order."""
    order = np.random.default_rng(ranks).permutation(len(ACCEPTED))
    dealt = [order[rank::ranks] for rank in range(ranks)]

    def one(transport: Transport) -> object:
        mine = dealt[transport.rank]
        positions = np.array(ACCEPTED)[mine]
        return verb(Cohort(transport, LAYOUT, PLANNED, SHARES, positions, UPDATES[torch.from_numpy(mine)], float))

    return on_threads(ranks, one)


def gram(cohort: Cohort) -> torch.Tensor:
    return cohort.gram()


def largest_sums(cohort: Cohort) -> torch.Tensor:
    return cohort.sum_over_coordinates(lambda values: values.amax(dim=0).sum())


def norms(cohort: Cohort) -> torch.Tensor:
    return cohort.norms()


def weighted_sum(cohort: Cohort) -> torch.Tensor:
    return cohort.weighted_sum(np.array([0.3, 0.5, 0.1, -0.2]))


def largest(cohort: Cohort) -> torch.Tensor:
    return cohort.by_coordinate(lambda values: values.amax(dim=0))


@pytest.mark.parametrize(
    ("verb", "wanted"),
    [
        (weighted_sum, torch.tensor([0.5, 0.1, 0.3, -0.2]).double() @ UPDATES.double()),
        (largest, UPDATES.double().amax(dim=0)),
        (gram, UPDATES[ASCENDING].double() @ UPDATES[ASCENDING].double().T),
        (norms, UPDATES[ASCENDING].double().norm(dim=1)),
        (largest_sums, UPDATES.double().amax(dim=0).sum()),
    ],
    ids=["weighted sum", "by coordinate", "gram", "norms", "sum over coordinates"],
)
def test_a_verb_is_what_it_says_with_the_same_bits_on_any_number_of_ranks(
    verb: Callable[[Cohort], torch.Tensor], wanted: torch.Tensor
) -> None:
    (alone,) = on_ranks(1, verb)
    torch.testing.assert_close(alone, wanted, rtol=1e-6, atol=1e-6)
    for ranks in (2, 3, 5):
        several = on_ranks(ranks, verb)
        assert torch.equal(several[0], alone)
        if verb in (gram, norms, largest_sums):
            assert all(torch.equal(other, alone) for other in several)
        else:
            assert all(other.shape == alone.shape for other in several[1:])


def test_every_rank_knows_who_was_accepted() -> None:
    def known(cohort: Cohort) -> tuple[object, ...]:
        return len(cohort), cohort.num_planned, cohort.clients, cohort.shares.tolist(), cohort.movements.tolist()

    accepted = (4, 6, [5, 7, 11, 13], [0.125, 0.25, 0.25, 0.25], [5.0, 7.0, 11.0, 13.0])
    assert on_ranks(3, known) == [accepted] * 3


def test_the_same_clients_can_have_sent_something_else() -> None:
    def replaced(transport: Transport) -> torch.Tensor:
        positions = np.array(ACCEPTED)[transport.rank :: 2]
        rows = UPDATES[transport.rank :: 2]
        cohort = Cohort(transport, LAYOUT, PLANNED, SHARES, positions, torch.zeros_like(rows))
        return cohort.replaced(rows).weighted_sum(np.ones(4))

    assert torch.equal(on_threads(2, replaced)[0], on_ranks(1, lambda cohort: cohort.weighted_sum(np.ones(4)))[0])


def test_some_mixed_updates_are_chosen_and_none_is_changed_by_itself() -> None:
    """Nobody has a mixed update, so what changes single ones would change nothing."""
    matrix = np.array([[0.5, 0.5, 0.0, 0.0], [0.0, 0.25, 0.0, 0.75]])
    (second,) = on_ranks(1, lambda cohort: cohort.mixed(matrix).selected(np.array([False, True])).gram())
    of_second = torch.from_numpy(matrix[1]) @ UPDATES[ASCENDING].double()
    torch.testing.assert_close(second, (of_second @ of_second).reshape(1, 1))
    (length,) = on_ranks(1, lambda cohort: cohort.mixed(matrix[1:]).norms())
    torch.testing.assert_close(length, of_second.norm().reshape(1))
    (total,) = on_ranks(1, lambda cohort: cohort.mixed(matrix).sum_over_coordinates(lambda values: values.sum(dim=1)))
    torch.testing.assert_close(total, torch.from_numpy(matrix) @ UPDATES[ASCENDING].double().sum(dim=1))
    verbs: list[Callable[[Cohort], object]] = [
        lambda mixed: mixed.mapped(torch.sign),
        lambda mixed: mixed.replaced(UPDATES),
        lambda mixed: mixed.mine,
        lambda mixed: mixed.my_clients,
    ]
    for verb in verbs:
        with pytest.raises(UserError, match="asks for single updates"):
            on_ranks(1, lambda cohort, verb=verb: verb(cohort.mixed(matrix)))


def test_nobody_accepted_is_a_sum_of_zero() -> None:
    def empty(transport: Transport) -> torch.Tensor:
        cohort = Cohort(transport, LAYOUT, PLANNED, SHARES, np.empty(0, np.int64), UPDATES[:0])
        assert len(cohort) == 0
        return cohort.weighted_sum(np.empty(0))

    for total in on_threads(2, empty):
        assert total.shape == (LAYOUT.size,) and not total.any()


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e20])
def test_a_step_for_all_coordinates_gives_the_same_integers_as_one_for_each(scale: float) -> None:
    values = torch.randn(3, 1000, generator=torch.Generator().manual_seed(1)) * scale
    values[:, 500:] *= 1e-12
    weights = torch.tensor([[0.3], [1 / 7], [-2.0]], dtype=torch.float64)
    exponent = int(np.floor(np.log2(float((values.double() * weights).abs().max())))) + 2
    steps = torch.full((1000,), exponent - 60)
    apart = torch.cat([steps, steps[:1] + 1])  # with one other step they are taken coordinate by coordinate
    wider = torch.cat([values, values[:, :1]], dim=1)
    assert torch.equal(to_grid(values, weights, steps), to_grid(wider, weights, apart)[:, :1000])
