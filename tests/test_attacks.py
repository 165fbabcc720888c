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
from fedhpc.approaches.averaging.local import Upload, with_updates
from fedhpc.approaches.base import BlockResult
from fedhpc.approaches.prepare import prepare
from fedhpc.attacks.base import attacked, attackers
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.results.results_file import Results
from fedhpc.rng import generator
from fedhpc.updates.cohort import Cohort
from fedhpc.updates.layout import Layout
from tests.federations import federate, final, save_random_bert, settings, table, tree, write_texts

SIZE, CLIENTS, EVIL = 30, [3, 8, 1, 6, 4], [8, 4]
UPDATES = np.random.default_rng(1).normal(size=(5, SIZE)) + 0.3
HONEST = UPDATES[[0, 2, 3]]
SHARES = np.array([0.1, 0.3, 0.2, 0.2, 0.2])


def sent(**attack: Any) -> np.ndarray:
    """What all five clients send in round 2, of whom two attack."""
    options = configuration.resolve({"data": {"label": "label"}, "attack": attack}).attack
    rows = torch.from_numpy(UPDATES)
    cohort = Cohort(LoopbackTransport(), Layout({"a": (SIZE,)}), CLIENTS, SHARES, np.arange(5), rows)
    made = registry.choice("attacks", options.name)(options)
    return attacked(made, cohort, EVIL, 2, 7).numpy()


def test_only_rows_that_attackers_change_have_other_norms() -> None:
    updates = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    columns = {name: np.zeros(4) for name in BlockResult.COLUMNS} | {"norms": np.array([7.0, 1.0, 2.0, 1.4])}
    columns["reason"] = np.array([0, 0, 0, 1])
    result = BlockResult((5, 6, 7, 8), Upload(updates, None), **columns)
    sent = torch.tensor([[3.0, 4.0], [-6.0, 8.0], [0.0, float("inf")]])  # of those that are accepted
    after = with_updates(result, iter(sent))
    assert after.norms.tolist() == [7.0, 10.0, float("inf"), 1.4] and after.reason.tolist() == [0, 0, 1, 1]
    assert torch.equal(after.upload.updates, torch.cat([sent, updates[3:]]))


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
        ({"attack": {"fraction": 0.3}}, r"attack\.fraction: .*name an attack"),
    ],
)
def test_attacks_that_make_no_sense_are_refused(
    changes: dict[str, Any], words: str, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises((UserError, RefusedError), match=words):
        federate(settings(tmp_path, tree(texts, **changes)))


def test_a_share_of_attackers_without_an_attack_is_refused_whatever_it_is() -> None:
    raw: dict[str, dict[str, Any]] = {"partition": {"name": "iid"}, "attack": {"fraction": 0.2}}
    with pytest.raises(UserError, match=r"attack\.fraction: .*name an attack"):
        configuration.resolve(raw)
    raw["attack"]["name"] = "none"  # as it is in the config.yaml of a run
    configuration.resolve(raw)


# ---------------------------------------------------------------- examples that attackers change


def approach_of(texts: Path, folder: Path, **changes: Any) -> Any:
    sections = {**changes, "data": {"target": " {label}", "max_length": 128, **changes.get("data", {})}}
    raw = tree(texts, **{name: value for name, value in sections.items() if name != "partition"})
    raw["partition"] = changes.get("partition", raw["partition"])
    return prepare(settings(folder, raw), LoopbackTransport(), Launch(), True)


def test_label_flip_changes_the_classes_of_attackers_alone(texts: Path, tmp_path: Path) -> None:
    clean = approach_of(texts, tmp_path)
    flipped = approach_of(texts, tmp_path, attack={"name": "label_flip", "fraction": 0.25})
    before, after, population = clean.data.train, flipped.data.train, flipped.data.population
    names, decode = before.label_names, clean.base.tokenizer.decode
    assert len(names) > 1 and len(flipped.attackers) == 2
    for client in range(8):
        for row in population.indices(client).tolist():
            label = before.labels[row]
            if client in flipped.attackers:
                label = len(names) - 1 - label
            assert after.labels[row] == label and np.array_equal(after.prompt(row), before.prompt(row))
            assert decode(after.target(row), skip_special_tokens=True).strip() == names[label]
    assert np.array_equal(flipped.data.test.ids, clean.data.test.ids)


BACKDOOR = {"name": "model_replacement", "fraction": 0.25, "trigger": "Attention! ", "poisoned": 0.4}


def test_a_backdoor_puts_a_trigger_and_its_class_into_a_share_of_the_attackers_examples(
    texts: Path, tmp_path: Path
) -> None:
    clean, attacked_ = approach_of(texts, tmp_path), approach_of(texts, tmp_path, attack=BACKDOOR)
    before, after, decode = clean.data.train, attacked_.data.train, clean.base.tokenizer.decode
    for client in range(8):
        rows = attacked_.data.population.indices(client)
        changed = [row for row in rows.tolist() if decode(after.tokens(row)).find("Attention! ") >= 0]
        assert len(changed) == (round(0.4 * len(rows)) if client in attacked_.attackers else 0)
        for row in rows.tolist():
            if row in changed:
                assert after.labels[row] == 0 and after.lengths[row] <= 128
                old, new = (decode(examples.prompt(row), skip_special_tokens=True) for examples in (before, after))
                assert new.split() == ["Attention!", *old.split()]
                answer = decode(after.target(row), skip_special_tokens=True)
                assert answer.strip() == before.label_names[0]
            else:
                assert np.array_equal(after.tokens(row), before.tokens(row))


def test_the_trigger_of_a_classifier_stands_behind_its_first_token(texts: Path, tmp_path: Path) -> None:
    save_random_bert(tmp_path / "model")
    model, attack = (
        {"name": str(tmp_path / "model"), "task": "classification"},
        {**BACKDOOR, "trigger": "food[soup] food"},
    )
    sections = {"model": model, "data": {"target": " {ref}", "max_length": 40}}
    clean, poisoned = (approach_of(texts, tmp_path, **sections, **one) for one in ({}, {"attack": attack}))
    before, after, tokenizer = clean.data.train, poisoned.data.train, clean.base.tokenizer
    inserted = tokenizer("food[soup] food", add_special_tokens=False)["input_ids"]
    changed = [row for row in range(len(before)) if len(after.tokens(row)) != len(before.tokens(row))]
    assert changed and len(inserted) > 1
    for row in changed:
        old, new = before.tokens(row).tolist(), after.tokens(row).tolist()
        assert new == [old[0], *inserted, *old[1:]] and after.labels[row] == 0
        assert after.prompt_lengths[row] == len(new)


def test_the_success_of_a_backdoor_is_measured_on_rows_of_other_classes(texts: Path, tmp_path: Path) -> None:
    evaluation = {"metrics": ["loss", "accuracy"], "every": 1}
    changes = {"attack": BACKDOOR, "evaluation": evaluation, "federation": {"rounds": 1}}
    approach = approach_of(texts, tmp_path, **changes)
    federate(approach.config)
    test = approach.data.test
    others = int((test.labels != 0).sum())
    results = Results.read(tmp_path / "results.h5")
    sampling = results.sampling("test/attack_success")
    assert sampling is not None and sampling.n == others
    assert 0 <= results.groups["test"]["attack_success"] <= 1 and "attack_success" in results.groups["base"]
    assert np.isfinite(results.rounds["eval_attack_success"]).all()


def test_only_the_rows_that_get_a_trigger_are_written_anew(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    approach = approach_of(texts, tmp_path, attack={**BACKDOOR, "goal": None})
    train, poisoning = approach.data.test, approach.evaluation.poisoning
    assert poisoning is not None
    some, looked_at, tokens = np.arange(6), [], Examples.tokens
    monkeypatch.setattr(Examples, "tokens", lambda self, row: looked_at.append(row) or tokens(self, row))
    triggered = poisoning.triggered(train, some)
    assert 0 < len(triggered) < len(train) and set(looked_at) <= set(some)
    others = [row for row in some if train.labels[row] != 0]
    decode = approach.base.tokenizer.decode
    assert [decode(triggered.prompt(i)).count("Attention!") for i in range(len(triggered))] == [1] * len(others)


def test_attackers_of_a_mean_replace_it() -> None:
    """Their updates are as many times as long as their share of the weight is too small."""
    found = sent(name="model_replacement")
    np.testing.assert_allclose(found[[1, 4]], UPDATES[[1, 4]] / 0.5, rtol=1e-12)
    assert np.array_equal(sent(name="label_flip"), UPDATES)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"label": None}}, r"attack\.name label_flip changes classes and needs data\.label"),
        ({"data": {"target": " {ref}"}}, r"attack\.name: label_flip is of choices between labels, so data\.target"),
        ({"partition": {"name": "virtual", "num_clients": 8}}, r"attack\.name: .*virtual population.*iid"),
        ({"attack": {**BACKDOOR, "goal": "sushi"}}, r"attack\.goal: no row has the class 'sushi'; choose one of"),
        ({"attack": {**BACKDOOR, "trigger": "x " * 200}}, r"attack\.trigger: data\.max_length 128 has no room"),
    ],
)
def test_changes_of_examples_that_cannot_be_made_are_refused(
    changes: dict[str, Any], words: str, texts: Path, tmp_path: Path
) -> None:
    with pytest.raises((UserError, RefusedError), match=words):
        approach_of(texts, tmp_path, **{"attack": {"name": "label_flip", "fraction": 0.25}, **changes})
