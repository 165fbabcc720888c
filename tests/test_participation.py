"""The plan of a round: pure, covering, balanced, independent of the number of workers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from fedhpc import config as configuration
from fedhpc.data.partitioners.base import Assignment
from fedhpc.data.population import Population
from fedhpc.errors import UserError
from fedhpc.participation.blocks import assign, form_blocks, joined, most_together, resolve_block_size
from fedhpc.participation.plan import Plan
from fedhpc.participation.sampling import cohort_size, num_rounds
from fedhpc.participation.schedules.synchronous import Synchronous
from tests import tiny


def settings(**sections: Any) -> configuration.Config:
    return configuration.resolve({"partition": {"name": "iid"}, **sections})


def population(sizes: list[int]) -> Population:
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    return Population(len(sizes), 0, 0.0, Assignment(np.arange(offsets[-1]), offsets))


def plan_round(
    config: configuration.Config, clients: Population, examples: Any, round_: int, workers: list[int], block_size: int
) -> Plan:
    return Synchronous(config, clients, examples, workers, block_size).plan(round_)


SIZES = [1, 9, 4, 0, 7, 2, 12, 5, 3, 6, 8, 3]
DATA = tiny.examples(sum(SIZES))


def test_every_client_of_the_cohort_is_somewhere_once() -> None:
    config = settings(federation={"rounds": 5, "cohort_size": 10, "dropout": 0.3})
    seen: set[int] = set()
    for t in range(1, 30):
        plan = plan_round(config, population(SIZES), DATA, t, [1, 2, 3], 3)
        assert len(set(plan.cohort)) == 10
        in_blocks = [c for b in plan.blocks for c in b.clients]
        assert sorted(in_blocks) == sorted(plan.training)
        assert set(plan.cohort) == set(in_blocks) | plan.dropped | plan.empty
        assert plan.empty <= {3}
        assert all(b.worker in (1, 2, 3) and 1 <= len(b.clients) <= 3 for b in plan.blocks)
        seen |= set(plan.cohort)
        assert plan == plan_round(config, population(SIZES), DATA, t, [1, 2, 3], 3)
    assert seen == set(range(12))


def test_blocks_do_not_depend_on_the_workers() -> None:
    config = settings(federation={"rounds": 5, "cohort_size": 10})
    for t in range(1, 6):
        blocks = [
            {b.clients for b in plan_round(config, population(SIZES), DATA, t, w, 2).blocks}
            for w in ([0], [1], [1, 2], list(range(1, 8)))
        ]
        assert all(b == blocks[0] for b in blocks)


def test_rounds_differ_and_seeds_differ() -> None:
    one = settings(federation={"cohort_size": 6})
    two = settings(federation={"cohort_size": 6}, run={"seed": 1})
    cohorts = {plan_round(c, population(SIZES), DATA, t, [0], 2).cohort for c in (one, two) for t in (1, 2, 3)}
    assert len(cohorts) == 6


def test_dropout_has_its_rate() -> None:
    config = settings(federation={"cohort_size": 10, "dropout": 0.3})
    dropped = sum(len(plan_round(config, population(SIZES), DATA, t, [0], 2).dropped) for t in range(1, 301))
    assert 0.26 < dropped / 3000 < 0.34


def test_placement_is_longest_first() -> None:
    blocks = assign([(0,), (1,), (2,), (3,), (4,)], [5, 4, 3, 3, 3], [1, 2])
    load = {w: sum(b.cost for b in blocks if b.worker == w) for w in (1, 2)}
    assert sorted(load.values()) == [8, 10]  # 5+3 and 4+3+3
    assert [b.worker for b in assign([(0,), (1,), (2,)], [3, 3, 3], [1, 2, 0])] == [1, 2, 0]
    # Of ranks that train together a worker's load is one, and they take what its blocks give in turn.
    placed = [(b.worker, b.member) for b in assign([(0,), (1,), (2,), (3,)], [5, 4, 3, 3], [0, 1], 2, together=True)]
    assert placed == [(0, 0), (1, 0), (1, 1), (0, 1)]


@pytest.mark.parametrize(
    ("size", "workers", "device", "block"),
    [
        (1, 8, "cpu", 1),
        (2, 8, "cpu", 2),
        (10, 8, "cpu", 2),
        (64, 8, "cpu", 8),
        (1000, 8, "cpu", 8),
        (1000, 8, "cuda", 32),
        (10, 2, "cpu", 5),
        (10, 1, "cpu", 8),
        (64, 16, "cpu", 4),
        (10, 100, "cpu", 2),
    ],
)
def test_automatic_block_size(size: int, workers: int, device: str, block: int) -> None:
    assert resolve_block_size(settings(runtime={"workers": workers}), size, device) == block
    assert resolve_block_size(settings(runtime={"block_size": 5, "workers": workers}), size, device) == 5


@pytest.mark.parametrize(("changes", "most"), [({}, 32), ({"block_size": 5}, 5), ({"deterministic": True}, 8)])
def test_a_gpu_takes_more_than_one_block_of_auto(changes: dict[str, Any], most: int) -> None:
    config = settings(runtime=changes)
    size = resolve_block_size(config, 64, "cuda")
    assert most_together(config, size, "cuda") == most
    assert most_together(config, size, "cpu") == size


def test_joined_blocks_have_the_same_clients() -> None:
    plan = plan_round(settings(federation={"cohort_size": 11}), population(SIZES), DATA, 1, [0], 2)
    clients = [c for block in plan.blocks for c in block.clients]
    for most, sizes in ((4, [4, 4, 2]), (32, [10])):  # one has no data
        together = joined(plan.blocks, most)
        assert [len(block.clients) for block in together] == sizes
        assert [c for block in together for c in block.clients] == clients
        assert sum(block.cost for block in together) == pytest.approx(sum(block.cost for block in plan.blocks))


def test_blocks_are_even_and_of_like_cost() -> None:
    costs = {c: 20.0 + 0.01 * (c % 7) for c in range(11)}
    blocks = form_blocks(costs, 4, 8)
    assert [len(b) for b in blocks] == [4, 4, 3]
    assert [len(b) for b in form_blocks(costs, 4, 2)] == [3, 3, 3, 2]  # two for each of the workers
    means = [np.mean([costs[c] for c in b]) for b in blocks]
    assert means == sorted(means, reverse=True)
    assert form_blocks({}, 4, 8) == []


def test_one_block_for_each_worker_costs_what_the_others_cost() -> None:
    for costs in ([8.0, 8.0, 4.0, 4.0], [21.0, 15.0, 12.0, 9.0, 8.0, 6.0, 5.0, 3.0, 2.0, 1.0]):
        one, other = form_blocks(dict(enumerate(costs)), len(costs) // 2, 2)
        assert len(one) == len(other) and not set(one) & set(other)
        assert sum(costs[c] for c in one) == sum(costs[c] for c in other)
    large = form_blocks({0: 90.0, **dict.fromkeys(range(1, 10), 1.0)}, 5, 2)
    assert [len(block) for block in large] == [5, 5]  # who waits for the large one would do so anyway


def test_large_clients_do_not_share_a_block_that_others_wait_for() -> None:
    costs = dict.fromkeys(range(12), 1.0) | {12: 30.0, 13: 10.0, 14: 10.0, 15: 2.0}
    blocks = form_blocks(costs, 4, 8)
    assert sorted(c for block in blocks for c in block) == list(range(16))
    assert (12,) in blocks  # alone more than a worker's share: the others keep their company
    assert [len(block) for block in blocks if 12 not in block] == [1, 2, 4, 4, 4]


@pytest.mark.parametrize(("clients", "blocks"), [(9, 5), (36, 8), (50, 8), (64, 8), (65, 16), (72, 16), (200, 32)])
def test_clients_that_cost_the_same_stay_together(clients: int, blocks: int) -> None:
    """Where 50 clients are on 8 workers, one has 7 of them, in whatever blocks."""
    size = resolve_block_size(settings(), clients, "cpu")
    assert len(form_blocks(dict.fromkeys(range(clients), 1.0), size, 8)) == blocks
    noise = np.random.default_rng(0)
    assert len(form_blocks({c: noise.normal(1.0, 0.02) for c in range(clients)}, size, 8)) <= blocks + 2


@pytest.mark.parametrize("clients", [64, 200, 1000])
def test_the_busiest_of_eight_workers_is_within_a_tenth_of_the_mean(clients: int) -> None:
    sizes = np.random.default_rng(0).dirichlet(np.full(clients, 3.0)) * 1e5
    costs = {c: float(size) for c, size in enumerate(sizes)}
    load: dict[int, float] = {}
    blocks = form_blocks(costs, max(2, min(8, clients // 8)), 8)
    for block in assign(blocks, [sum(costs[c] for c in b) for b in blocks], range(8)):
        load[block.worker] = load.get(block.worker, 0.0) + block.cost
    assert sorted(c for block in blocks for c in block) == list(range(clients))
    assert max(load.values()) <= 1.1 * sum(costs.values()) / 8


def test_a_cohort_larger_than_the_population_is_refused() -> None:
    with pytest.raises(UserError, match="population has 12"):
        cohort_size(settings(federation={"cohort_size": 13}), population(SIZES))
    assert cohort_size(settings(federation={"cohort_fraction": 0.5}), population(SIZES)) == 6


def test_a_cohort_that_nobody_asked_for_is_ten_clients_or_all() -> None:
    assert cohort_size(settings(), population(SIZES)) == 10
    assert cohort_size(settings(), population(SIZES[:6])) == 6
    assert sorted(plan_round(settings(), population(SIZES[:6]), DATA, 1, [0], 2).cohort) == list(range(6))
    assert plan_round(settings(), population(SIZES), DATA, 1, [0], 2).cohort == (
        plan_round(settings(federation={"cohort_size": 10}), population(SIZES), DATA, 1, [0], 2).cohort
    )
    assert num_rounds(settings(mode="local", federation={"rounds": 20}), population(SIZES[:6])) == 20


def test_local_clients_train_as_often_as_they_would_be_sampled() -> None:
    config = settings(mode="local", federation={"rounds": 20, "cohort_size": 3})
    assert num_rounds(config, population(SIZES)) == 5
    plan = plan_round(config, population(SIZES), DATA, 1, [0], 4)
    assert plan.cohort == tuple(range(12))
    few = settings(mode="local", local={"max_clients": 4})
    assert len(plan_round(few, population(SIZES), DATA, 1, [0], 4).cohort) == 4
    assert (
        plan_round(few, population(SIZES), DATA, 1, [0], 4).cohort
        == plan_round(few, population(SIZES), DATA, 2, [0], 4).cohort
    )


def test_a_round_of_a_million_virtual_clients_touches_only_its_cohort() -> None:
    config = settings(partition={"name": "virtual", "num_clients": 1_000_000, "examples_per_client": 5})
    drawn: list[int] = []

    def draw(client: int) -> np.ndarray:
        drawn.append(client)
        return np.arange(5)

    plan = plan_round(config, Population(1_000_000, 0, 0.0, draw=draw, drawn=5), DATA, 1, [0], 2)
    assert set(drawn) == set(plan.cohort)
