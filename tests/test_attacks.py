"""Attacks against their formulas in plain numpy, and what they do to runs with and without a robust rule."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.attacks.base import attacked, attackers
from fedhpc.errors import UserError
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.rng import generator
from fedhpc.updates.cohort import Cohort
from fedhpc.updates.layout import Layout
from tests.federations import federate, final, settings, table, tree, write_texts

SIZE, CLIENTS, EVIL = 30, [3, 8, 1, 6, 4], [8, 4]
UPDATES = np.random.default_rng(1).normal(size=(5, SIZE)) + 0.3
HONEST = UPDATES[[0, 2, 3]]
SHARES = np.array([0.1, 0.3, 0.2, 0.2, 0.2])


def sent(**attack: Any) -> np.ndarray:
    """What all five clients send in round 2, of whom two attack."""
    options = configuration.resolve({"partition": {"name": "iid"}, "attack": attack}).attack
    rows = torch.from_numpy(UPDATES)
    cohort = Cohort(LoopbackTransport(), Layout({"a": (SIZE,)}), CLIENTS, SHARES, np.arange(5), rows)
    made = registry.choice("attacks", options.name)(options)
    return attacked(made, cohort, EVIL, 2, 7).numpy()


def noise(client: int) -> np.ndarray:
    return generator(7, "attack", 2, client).normal(scale=0.5, size=SIZE)


@pytest.mark.parametrize(
    ("attack", "wanted"),
    [
        ({"name": "sign_flip"}, lambda: -UPDATES[[1, 4]]),
        ({"name": "sign_flip", "scale": 3.0}, lambda: -3 * UPDATES[[1, 4]]),
        ({"name": "ipm", "epsilon": 0.5}, lambda: [-0.5 * HONEST.mean(axis=0)] * 2),
        ({"name": "alie", "z": 1.2}, lambda: [HONEST.mean(axis=0) + 1.2 * HONEST.std(axis=0, ddof=1)] * 2),
        ({"name": "gaussian", "std": 0.5}, lambda: [noise(8), noise(4)]),
    ],
    ids=lambda one: str(one) if isinstance(one, dict) else "",
)
def test_an_attack_is_the_formula_of_its_paper(attack: dict[str, Any], wanted: Callable[[], Any]) -> None:
    found = sent(**attack)
    np.testing.assert_allclose(found[[1, 4]], wanted(), rtol=1e-10, atol=1e-12)
    assert np.array_equal(found[[0, 2, 3]], HONEST)


def test_attackers_are_drawn_over_the_population_once() -> None:
    some = attackers(0.3, 50, 3)
    assert len(some) == 15 and (np.diff(some) > 0).all() and some[-1] < 50
    assert np.array_equal(attackers(0.3, 50, 3), some) and not np.array_equal(attackers(0.3, 50, 4), some)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


SMALL = {"evaluation": {"max_examples": 4, "test_max_examples": 4}}


def test_a_run_that_is_attacked_has_the_same_bits_on_three_ranks_and_after_a_resume(
    texts: Path, tmp_path: Path
) -> None:
    raw = tree(texts, attack={"name": "alie", "fraction": 0.4}, federation={"rounds": 3, "cohort_size": 5}, **SMALL)
    for folder, ranks, rounds in (("one", 1, 3), ("three", 3, 3), ("resumed", 1, 2), ("resumed", 2, 3)):
        raw["federation"]["rounds"] = rounds
        federate(settings(tmp_path / folder, raw), ranks)
    one, clients = final(tmp_path / "one"), table(tmp_path / "one", "clients")
    for folder in ("three", "resumed"):
        assert all(np.array_equal(one[name], other) for name, other in final(tmp_path / folder).items())
        assert np.array_equal(table(tmp_path / folder, "clients")["attacker"], clients["attacker"])
    some = attackers(0.4, 8, 0)
    assert np.array_equal(clients["attacker"], np.isin(clients["client_id"], some)) and clients["attacker"].any()
    for round_ in (1, 2, 3):  # they send one and the same
        norms = clients["update_norm"][(clients["round"] == round_) & (clients["attacker"] == 1)]
        assert len(set(norms)) == 1


def test_updates_of_attackers_that_are_not_finite_are_rejected(texts: Path, tmp_path: Path) -> None:
    raw = tree(texts, attack={"name": "sign_flip", "fraction": 0.4, "scale": 1e308}, **SMALL)
    federate(settings(tmp_path, raw))
    clients = table(tmp_path, "clients")
    assert clients["attacker"].any() and np.array_equal(clients["status"] == 2, clients["attacker"] == 1)


def test_a_run_without_attackers_has_no_column_of_them(texts: Path, tmp_path: Path) -> None:
    federate(settings(tmp_path, tree(texts, **SMALL)))
    assert "attacker" not in table(tmp_path, "clients")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"attack": {"name": "ipm", "fraction": 0.01}}, r"attack\.fraction: 0\.01 of 8 clients is nobody"),
        ({"attack": {"name": "ipm", "fraction": 0.99}}, r"attack\.fraction: 0\.99 of 8 clients is everybody"),
        ({"attack": {"name": "ipm", "fraction": 1.0}}, r"attack\.fraction: .*less than 1"),
        ({"attack": {"name": "ipm"}, "mode": "centralized"}, r"attack\.name: .*mode centralized.*take it out"),
        ({"attack": {"name": "none", "z": 1.0}}, r"unknown key 'attack\.z'"),
    ],
)
def test_attacks_that_make_no_sense_are_refused(
    changes: dict[str, Any], words: str, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises((UserError, RefusedError), match=words):
        federate(settings(tmp_path, tree(texts, **changes)))
