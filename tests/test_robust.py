"""The robust aggregators and pre-aggregators against their formulas in plain numpy, and what they withstand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhpc import config as configuration
from fedhpc.approaches.averaging.root import Root
from fedhpc.approaches.prepare import prepare
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import subset
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.server.aggregation import Aggregation
from fedhpc.server.aggregators.foundationfl import FoundationFL
from fedhpc.training.block import train_block
from fedhpc.training.local import LocalTraining
from fedhpc.updates.cohort import Cohort
from fedhpc.updates.layout import Layout
from tests.federations import federate, final, settings, table, tree, write_texts

CLIENTS, SIZE = 11, 40
UPDATES = np.random.default_rng(0).normal(size=(CLIENTS, SIZE)) + 0.5
UPDATES[[2, 5]] *= 30  # two that lead astray


def cohort_of(updates: np.ndarray, memory: dict[str, torch.Tensor] | None = None, planned: int = 0) -> Cohort:
    """A cohort of these clients and of so many planned ones, who did not report back."""
    count, planned = len(updates), planned or len(updates)
    shares = np.full(planned, 1 / planned)
    layout = Layout({"a": (SIZE - 9,), "b": (3, 3)})
    rows = torch.from_numpy(updates)
    return Cohort(
        LoopbackTransport(), layout, range(planned), shares, np.arange(count), rows, lambda client: 1.0, memory
    )


def aggregation(planned: int = CLIENTS, seed: int = 0, **server: Any) -> Aggregation:
    return Aggregation(configuration.resolve({"partition": {"name": "iid"}, "server": server}).server, seed, planned)


def aggregated(updates: np.ndarray = UPDATES, **server: Any) -> np.ndarray:
    made = aggregation(len(updates), **server)
    cohort = cohort_of(updates, made.initial_memory(SIZE))
    result: np.ndarray = made.combine(cohort, 1).numpy()
    return result


# ---------------------------------------------------------------- formulas of the papers


def trimmed_mean(x: np.ndarray, f: int) -> np.ndarray:
    return np.sort(x, axis=0)[f : len(x) - f].mean(axis=0)


def meamed(x: np.ndarray, f: int) -> np.ndarray:
    columns = [column[np.argsort(abs(column - np.median(column)))[: len(x) - f]].mean() for column in x.T]
    return np.array(columns)


def krum_scores(x: np.ndarray, f: int) -> list[float]:
    return [sum(np.sort([((a - b) ** 2).sum() for b in x])[: len(x) - f]) for a in x]


def krum(x: np.ndarray, f: int) -> np.ndarray:
    return x[np.argmin(krum_scores(x, f))]


def multi_krum(x: np.ndarray, f: int) -> np.ndarray:
    return x[np.argsort(krum_scores(x, f))[: len(x) - f]].mean(axis=0)


def geometric_median(x: np.ndarray, iterations: int, nu: float) -> np.ndarray:
    z = np.zeros(SIZE)
    for _ in range(iterations):
        weights = 1 / np.maximum([np.linalg.norm(one - z) for one in x], nu)
        z = weights @ x / weights.sum()
    return z


def centered_clipping(x: np.ndarray, center: np.ndarray, radius: float, iterations: int) -> np.ndarray:
    for _ in range(iterations):
        differences = [one - center for one in x]
        center = center + np.mean([d * min(1, radius / np.linalg.norm(d)) for d in differences], axis=0)
    return center


def norm_bounding(x: np.ndarray, norm: float) -> np.ndarray:
    return np.mean([one * min(1, norm / np.linalg.norm(one)) for one in x], axis=0)


def foundationfl(x: np.ndarray, copies: int, rule: Callable[[np.ndarray], np.ndarray]) -> np.ndarray:
    extremes = x.max(axis=0), x.min(axis=0)
    scores = [min(np.linalg.norm(one - extreme) for extreme in extremes) for one in x]
    return rule(np.vstack([x, *[x[np.argmax(scores)]] * copies]))


def median(x: np.ndarray) -> np.ndarray:
    result: np.ndarray = np.median(x, axis=0)
    return result


def nearest_neighbours(x: np.ndarray, f: int) -> np.ndarray:
    distances = [[np.linalg.norm(a - b) for b in x] for a in x]
    return np.array([x[np.argsort(row)[: len(x) - f]].mean(axis=0) for row in distances])


MEDIAN_NORM = float(np.median(np.linalg.norm(UPDATES, axis=1)))
RULES: list[tuple[dict[str, Any], Callable[[np.ndarray], np.ndarray]]] = [
    ({"aggregator": "median"}, median),
    ({"aggregator": "trimmed_mean"}, lambda x: trimmed_mean(x, 2)),
    ({"aggregator": "trimmed_mean", "byzantine": 0.0}, lambda x: x.mean(axis=0)),
    ({"aggregator": "trimmed_mean", "byzantine": 0.49}, median),
    ({"aggregator": "meamed"}, lambda x: meamed(x, 2)),
    ({"aggregator": "meamed", "byzantine": 0.4}, lambda x: meamed(x, 4)),
    ({"aggregator": "krum", "byzantine": 0.3}, lambda x: krum(x, 3)),
    ({"aggregator": "multi_krum"}, lambda x: multi_krum(x, 2)),
    ({"aggregator": "geometric_median"}, lambda x: geometric_median(x, 8, 1e-6)),
    ({"aggregator": "geometric_median", "iterations": 3, "smoothing": 0.1}, lambda x: geometric_median(x, 3, 0.1)),
    ({"aggregator": "norm_bounding", "norm": 2.0}, lambda x: norm_bounding(x, 2.0)),
    ({"aggregator": "norm_bounding"}, lambda x: norm_bounding(x, MEDIAN_NORM)),
    (
        {"aggregator": "centered_clipping", "radius": 3.0, "iterations": 4},
        lambda x: centered_clipping(x, np.zeros(SIZE), 3.0, 4),
    ),
    ({"aggregator": "foundationfl"}, lambda x: foundationfl(x, 5, median)),
    ({"aggregator": "foundationfl", "synthetic": 1.0}, lambda x: foundationfl(x, 11, median)),
    ({"aggregator": "foundationfl", "synthetic": 0.0}, median),
    (
        {"aggregator": "foundationfl", "rule": "trimmed_mean"},
        lambda x: foundationfl(x, 5, lambda y: trimmed_mean(y, 2)),
    ),
    (
        {"aggregator": "foundationfl", "rule": "trimmed_mean", "synthetic": 0.3, "byzantine": 0.3},
        lambda x: foundationfl(x, 3, lambda y: trimmed_mean(y, 3)),
    ),
    (
        {"aggregator": "foundationfl", "preaggregator": {"name": "nearest_neighbours"}},
        lambda x: foundationfl(nearest_neighbours(x, 2), 5, median),
    ),
    (
        {"aggregator": "mean", "preaggregator": {"name": "nearest_neighbours"}},
        lambda x: nearest_neighbours(x, 2).mean(0),
    ),
    (
        {"aggregator": "trimmed_mean", "preaggregator": {"name": "nearest_neighbours"}},
        lambda x: trimmed_mean(nearest_neighbours(x, 2), 2),
    ),
    (
        {"aggregator": "krum", "preaggregator": {"name": "nearest_neighbours"}},
        lambda x: krum(nearest_neighbours(x, 2), 2),
    ),
]


@pytest.mark.parametrize(("server", "wanted"), RULES, ids=lambda one: str(one) if isinstance(one, dict) else "")
def test_a_rule_is_the_formula_of_its_paper(server: dict[str, Any], wanted: Callable[[np.ndarray], np.ndarray]) -> None:
    np.testing.assert_allclose(aggregated(**server), wanted(UPDATES), rtol=1e-10, atol=1e-12)


def test_centered_clipping_goes_on_from_its_last_aggregate() -> None:
    made = aggregation(aggregator="centered_clipping", radius=3.0)
    memory, center = made.initial_memory(SIZE), np.zeros(SIZE)
    for seed in range(3):
        updates = np.random.default_rng(seed).normal(size=(CLIENTS, SIZE)) + 2
        total = made.combine(cohort_of(updates, memory), seed)
        center = centered_clipping(updates, center, 3.0, 1)
        np.testing.assert_allclose(total.numpy(), center, rtol=1e-10, atol=1e-12)
        assert torch.equal(memory["center"], total)


def test_buckets_are_drawn_anew_in_every_round_and_hold_every_update_once() -> None:
    made = aggregation(aggregator="mean", preaggregator={"name": "bucketing", "size": 3})
    updates = np.eye(SIZE)[:CLIENTS]
    assert not torch.equal(made.combine(cohort_of(updates), 1), made.combine(cohort_of(updates), 2))
    total = made.combine(cohort_of(updates), 1).numpy()[:CLIENTS]
    assert sorted(np.round(1 / total / 4).astype(int)) == [2] * 2 + [3] * 9  # three buckets of three, one of two


def test_clients_that_drop_out_may_be_the_right_ones() -> None:
    """f follows from who was sampled, so as many values are cut off as before."""
    made = aggregation(10, aggregator="trimmed_mean", byzantine=0.2)
    found = made.combine(cohort_of(UPDATES[:6], planned=10), 1).numpy()
    np.testing.assert_allclose(found, trimmed_mean(UPDATES[:6], 2), rtol=1e-12)
    assert made.fewest == 5


@pytest.mark.parametrize(
    ("planned", "server", "fewest"),
    [
        (10, {"aggregator": "krum"}, 7),
        (10, {"aggregator": "krum", "byzantine": 0.0}, 1),
        (10, {"aggregator": "median"}, 1),
        (12, {"aggregator": "trimmed_mean", "preaggregator": {"name": "bucketing"}}, 9),
    ],
)
def test_so_few_updates_are_enough(planned: int, server: dict[str, Any], fewest: int) -> None:
    assert aggregation(planned, **server).fewest == fewest


@pytest.mark.parametrize(
    ("planned", "server", "words"),
    [
        (
            6,
            {"aggregator": "krum", "byzantine": 0.4},
            "krum with these options needs 7 updates, and 6 clients are sampled",
        ),
        (
            10,
            {"aggregator": "krum", "byzantine": 0.3, "preaggregator": {"name": "bucketing"}},
            "needs 9 updates, and server.preaggregator bucketing makes 5 of 10 clients",
        ),
    ],
)
def test_too_few_clients_are_refused(planned: int, server: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=rf"server\.aggregator .*{words}.*; let fewer of them be wrong, or raise"):
        aggregation(planned, **server)


@pytest.mark.parametrize(
    "aggregator", ["krum", "multi_krum", "geometric_median", "norm_bounding", "centered_clipping", "foundationfl"]
)
@pytest.mark.parametrize("scale", [1e30, 1e160, 1e300])
def test_one_enormous_update_does_not_win(aggregator: str, scale: float) -> None:
    updates = UPDATES.copy()
    updates[[2, 5]] = 0.1
    updates[5] = scale
    assert np.abs(aggregated(updates, aggregator=aggregator)).max() < 10


def test_foundationfl_withstands_what_the_mean_does_not() -> None:
    draws = np.random.default_rng(3)
    center = draws.normal(size=SIZE)
    honest = center + 0.3 * draws.normal(size=(8, SIZE))

    def far(attack: np.ndarray, aggregator: str) -> float:
        total = aggregated(np.vstack([honest, attack]), aggregator=aggregator)
        return float(np.linalg.norm(total - honest.mean(axis=0)) / np.linalg.norm(center))

    alike = -5 * (center + 0.3 * draws.normal(size=(2, SIZE)))  # they are the extremes of every coordinate
    assert far(alike, "foundationfl") < 0.4 < 1 < far(alike, "mean")
    noise = 200 * draws.normal(size=(2, SIZE))  # one of them has the largest score
    assert far(noise, "foundationfl") < 1 < 10 < far(noise, "mean")
    total = aggregated(np.vstack([honest, noise]), aggregator="foundationfl")
    assert (total > honest.min(axis=0)).all() and (total < honest.max(axis=0)).all()


def test_fltrust_weighs_by_the_angle_to_the_server_s_update() -> None:
    root = np.random.default_rng(9).normal(size=SIZE) + 0.5
    norms, length = np.linalg.norm(UPDATES, axis=1), np.linalg.norm(root)
    trust = np.maximum(UPDATES @ root / norms / length, 0)
    wanted = (trust * length / norms) @ UPDATES / trust.sum()
    made = aggregation(aggregator="fltrust")
    cohort = cohort_of(UPDATES)
    cohort.root = torch.from_numpy(root)
    np.testing.assert_allclose(made.combine(cohort, 1).numpy(), wanted, rtol=1e-10, atol=1e-12)
    against = cohort_of(-abs(UPDATES))  # nobody goes where the server goes
    against.root = torch.from_numpy(abs(root))
    assert not made.combine(against, 1).any()
    assert np.abs(trusted_with_an_enormous_update()).max() < 10


def trusted_with_an_enormous_update() -> np.ndarray:
    cohort = cohort_of(np.vstack([UPDATES[:4], np.full((1, SIZE), 1e200)]))
    cohort.root = torch.from_numpy(UPDATES[0])
    total: np.ndarray = aggregation(5, aggregator="fltrust").combine(cohort, 1).numpy()
    return total


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.mark.parametrize("aggregator", ["centered_clipping", "foundationfl"])
def test_a_run_is_the_same_on_three_ranks_and_after_a_resume(aggregator: str, texts: Path, tmp_path: Path) -> None:
    server = {"aggregator": aggregator, "preaggregator": {"name": "bucketing"}}
    raw = tree(texts, server=server, federation={"rounds": 3}, evaluation={"max_examples": 4, "test_max_examples": 4})
    for folder, ranks, rounds in (("one", 1, 3), ("three", 3, 3), ("resumed", 1, 2), ("resumed", 2, 3)):
        raw["federation"]["rounds"] = rounds
        federate(settings(tmp_path / folder, raw), ranks)
    one = final(tmp_path / "one")
    for folder in ("three", "resumed"):
        assert all(np.array_equal(one[name], other) for name, other in final(tmp_path / folder).items())


def test_a_run_takes_the_steps_of_the_formula(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = {"aggregator": "foundationfl", "rule": "trimmed_mean", "byzantine": 0.3}
    small = {"max_examples": 4, "test_max_examples": 4}
    raw = tree(texts, model={"dtype": "float64"}, server=server, federation={"rounds": 3}, evaluation=small)
    sent: list[np.ndarray] = []

    def spied(self: FoundationFL, cohort: Cohort) -> torch.Tensor:
        sent.append(cohort.mine.numpy().copy())
        return combine(self, cohort)

    combine = FoundationFL.combine
    monkeypatch.setattr(FoundationFL, "combine", spied)
    config = settings(tmp_path, raw)
    federate(config)
    steps = [foundationfl(x, 3, lambda y: trimmed_mean(y, 1)) for x in sent]
    assert len(steps) == 3 and sent[0].dtype == np.float64
    np.testing.assert_allclose(table(tmp_path, "rounds")["update_norm"][1:], np.linalg.norm(steps, axis=1), rtol=1e-9)
    approach = prepare(config, LoopbackTransport(), Launch(), True)
    wanted = approach.initial_payload().numpy() - np.sum(steps, axis=0)
    payload = approach.method.payload.flatten(
        {name: torch.from_numpy(value) for name, value in final(tmp_path).items()}
    )
    np.testing.assert_allclose(payload.numpy(), wanted, rtol=1e-9, atol=1e-9 * np.linalg.norm(steps))


def test_the_server_s_own_training_is_the_same_on_three_ranks_and_after_a_resume(texts: Path, tmp_path: Path) -> None:
    small = {"max_examples": 4, "test_max_examples": 4}
    raw = tree(texts, server={"aggregator": "fltrust", "root_examples": 5}, federation={"rounds": 2}, evaluation=small)
    for folder, ranks, rounds in (("one", 1, 2), ("three", 3, 2), ("resumed", 1, 1), ("resumed", 2, 2)):
        raw["federation"]["rounds"] = rounds
        federate(settings(tmp_path / folder, raw), ranks)
    one = final(tmp_path / "one")
    for folder in ("three", "resumed"):
        assert all(np.array_equal(one[name], other) for name, other in final(tmp_path / folder).items())
    config = settings(tmp_path / "one", raw)
    root = Root(config, prepare(config, LoopbackTransport(), Launch(), True).data, 2)
    assert len(root.indices) == 5 and not set(root.indices) & set(subset(10, 4))


def test_the_server_s_own_training_has_the_learning_rates_of_the_clients(texts: Path, tmp_path: Path) -> None:
    # A budget may end a run before federation.rounds, and their learning rates with it.
    server, client = {"aggregator": "fltrust", "root_examples": 5}, {"schedule": "linear"}
    small = {"max_examples": 4, "test_max_examples": 4}
    raw = tree(texts, server=server, federation={"rounds": 8}, evaluation=small, client=client)
    config = settings(tmp_path, raw)
    approach = prepare(config, LoopbackTransport(), Launch(), True)
    trained = approach.base, approach.method, approach.objective, approach.personal

    def norm(rounds: int, round_: int) -> float:
        theta = approach.split.apart(approach.initial_payload())[0]
        return float(Root(config, approach.data, rounds).update(*trained, theta, round_).norm())

    assert norm(2, 2) < 0.5 * norm(8, 2)


def test_the_server_s_own_training_packs_and_goes_on_with_smaller_forwards(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []

    def train(
        base: Any, method: Any, objective: Any, start: Any, works: Any, examples: Any, local: LocalTraining
    ) -> Any:
        tried.append((local.packing, local.examples_at_once))
        if local.examples_at_once > fits:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return train_block(base, method, objective, start, works, examples, local)

    monkeypatch.setattr("fedhpc.approaches.averaging.root.train_block", train)
    server, client = {"aggregator": "fltrust", "root_examples": 5}, {"packing": True, "batch_size": 5}
    small = {"max_examples": 4, "test_max_examples": 4}
    raw = tree(texts, server=server, federation={"rounds": 1}, evaluation=small, client=client)
    for fits in (2, 0):
        approach = prepare(settings(tmp_path, raw), LoopbackTransport(), Launch(), True)
        if fits:
            update = approach._root_update(approach.initial_state(), approach.plan(1))
            assert update.norm() > 0 and approach.examples_that_fit == 2
            assert tried == [(True, 5), (True, 3), (True, 2)]
        else:
            with pytest.raises(UserError, match="one example of the server takes more memory than the GPU has"):
                approach._root_update(approach.initial_state(), approach.plan(1))


def test_a_rule_that_nobody_uses_needs_no_updates(texts: Path, tmp_path: Path) -> None:
    raw = tree(texts, server={"aggregator": "krum"}, mode="local", local={"max_clients": 4})
    assert prepare(settings(tmp_path, raw), LoopbackTransport(), Launch(), True).min_cohort == 1


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"server": {"aggregator": "fltrust", "root_examples": 7}}, r"root_examples: 7 of 10 validation examples.* 4"),
        (
            {"server": {"aggregator": "fltrust"}, "mode": "centralized"},
            r"server\.aggregator fltrust .*mode centralized",
        ),
        ({"server": {"aggregator": "krum", "byzantine": 0.5}}, r"server\.byzantine: .*less than 0\.5"),
        (
            {"server": {"aggregator": "krum", "byzantine": 0.4}},
            r"krum with these options needs 7 updates, and 6 clients",
        ),
        ({"server": {"aggregator": "foundationfl", "rule": "krum"}}, r"server\.rule: .*median.*trimmed_mean"),
        ({"server": {"aggregator": "foundationfl", "synthetic": 2}}, r"server\.synthetic: .*less than or equal to 1"),
        (
            {"server": {"aggregator": "foundationfl", "byzantine": 0.4, "preaggregator": {"name": "bucketing"}}},
            r"foundationfl with these options needs 5 updates, and server.preaggregator bucketing makes 3 of 6 clients",
        ),
        ({"server": {"aggregator": "median", "byzantine": 0.2}}, r"unknown key 'server\.byzantine'"),
        (
            {"server": {"aggregator": "fednova", "preaggregator": {"name": "bucketing"}}},
            r"server\.preaggregator: .*fednova weighs",
        ),
        (
            {"server": {"aggregator": "fedexp"}, "method": {"name": "fedbpt", "exchange": "scores"}},
            r"fedexp is of updates of parameters, and fedbpt sends scores",
        ),
    ],
)
def test_rules_that_cannot_be_kept_are_refused(
    changes: dict[str, Any], words: str, texts: Path, tmp_path: Path
) -> None:
    small = {"evaluation": {"max_examples": 4, "test_max_examples": 4}}
    with pytest.raises((UserError, RefusedError), match=words):
        prepare(settings(tmp_path, tree(texts, **small, **changes)), LoopbackTransport(), Launch(), True)


def test_a_round_with_too_few_clients_for_the_rule_changes_nothing(texts: Path, tmp_path: Path) -> None:
    federation = {"rounds": 2, "cohort_size": 6, "dropout": 0.6}
    raw = tree(texts, federation=federation, server={"aggregator": "krum"}, evaluation={"test_max_examples": 4})
    federate(settings(tmp_path, raw))
    rounds, events = table(tmp_path, "rounds"), table(tmp_path, "events")
    assert (rounds["completed"][1:] < 5).all() and not rounds["update_norm"].any()
    assert [text for kind, text in zip(events["kind"], events["message"], strict=True) if kind == "void"] == [
        f"{n} of 5 needed clients completed" for n in rounds["completed"][1:]
    ]
