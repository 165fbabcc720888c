"""Workers as groups of ranks."""

from __future__ import annotations

import pytest

from fedhpc.errors import UserError
from fedhpc.ranks.topology import Topology


def test_a_rank_that_is_alone_serves_and_works() -> None:
    alone = Topology.of(1)
    assert alone.workers == ((0,),)
    assert (alone.worker_of(0), alone.speaker(0), alone.is_speaker(0)) == (0, 0, True)


def test_every_other_rank_is_a_worker() -> None:
    topology = Topology.of(4)
    assert topology.workers == ((1,), (2,), (3,)) and topology.num_workers == 3
    assert [topology.worker_of(rank) for rank in range(5)] == [None, 0, 1, 2, None]
    assert [topology.speaker(worker) for worker in range(3)] == [1, 2, 3]
    assert [topology.is_speaker(rank) for rank in range(4)] == [False, True, True, True]


def test_the_first_rank_of_a_group_speaks_for_it() -> None:
    topology = Topology.of(7, group_size=3)
    assert topology.workers == ((1, 2, 3), (4, 5, 6))
    assert [topology.worker_of(rank) for rank in range(7)] == [None, 0, 0, 0, 1, 1, 1]
    assert [rank for rank in range(7) if topology.is_speaker(rank)] == [1, 4]
    assert topology == Topology(((1, 2, 3), (4, 5, 6)))


@pytest.mark.parametrize(("world_size", "group_size"), [(4, 2), (1, 2)])
def test_ranks_that_do_not_divide_are_refused(world_size: int, group_size: int) -> None:
    with pytest.raises(UserError, match=r"worker"):
        Topology.of(world_size, group_size)


def test_the_ranks_of_a_worker_are_on_one_machine_where_they_can_be() -> None:
    blocks = Topology.of(9, 4, [[0, 1, 2, 3, 4], [5, 6, 7, 8]])
    assert blocks.workers == ((1, 2, 3, 4), (5, 6, 7, 8))
    cyclic = [[0, 2, 4], [1, 3]]
    assert Topology.of(5, 2, cyclic).workers == ((1, 3), (2, 4)) and Topology.of(5, 2, cyclic).spread(cyclic) == []
    uneven = [[0, 1, 2, 3], [4, 5, 6]]
    topology = Topology.of(7, 2, uneven)
    assert topology.workers == ((1, 2), (3, 6), (4, 5)) and topology.spread(uneven) == [(3, 6)]


def test_what_would_divide_is_said() -> None:
    with pytest.raises(UserError) as refused:
        Topology.of(5, 3)
    assert str(refused.value) == (
        "runtime.worker_ranks: 5 ranks are a server and 4 others, which do not divide into workers of 3; "
        "start 4, 7, 10, ... ranks, or give 1 or 2 or 4"
    )


@pytest.mark.parametrize("workers", [((1, 2), (2, 3)), ((1,), ())])
def test_a_rank_has_one_worker_and_a_worker_has_ranks(workers: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="belongs to one worker"):
        Topology(workers)
