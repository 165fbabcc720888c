"""FedBPT: CMA-ES as functions of its moments, the two exchanges by hand, and runs on any number of ranks."""

from __future__ import annotations

import sys
import threading
from pathlib import Path
from typing import Any

import cma
import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fedhpc.approaches.fedbpt.approach import FedBPT, aggregate, cmaes
from fedhpc.approaches.fedbpt.cmaes import Key, Moments
from fedhpc.approaches.prepare import prepare
from fedhpc.errors import UserError
from fedhpc.methods.prompt import PROMPT
from fedhpc.models.base import Attached
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.rng import generator
from tests.federations import Interrupted, federate, final, items_of, settings, table, tree, write_texts
from tests.test_federation import same_results

Float64 = NDArray[np.float64]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(autouse=True)
def one_strategy_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads here, and `cma` parses text, whose depth CPython 3.11 counts over all threads."""
    lock, make = threading.Lock(), cmaes.strategy_from

    def locked(*arguments: Any, **named: Any) -> Any:
        with lock:
            return make(*arguments, **named)

    monkeypatch.setattr(cmaes, "strategy_from", locked)


def black_box(texts: Path, exchange: str, **changes: Any) -> dict[str, Any]:
    """A short search for a soft prompt."""
    few = {"every": 4, "max_examples": 4}
    raw = tree(texts, federation={"rounds": 2, "cohort_size": 4}, evaluation=few, **changes)
    raw["method"] = {
        "name": "fedbpt", "exchange": exchange, "num_virtual_tokens": 3, "dimension": 6, "popsize": 6, "iterations": 2,
        "examples": 3,
    }  # fmt: skip
    return raw


def made(folder: Path, raw: dict[str, Any]) -> FedBPT:
    approach = prepare(settings(folder, raw), LoopbackTransport(), Launch(), False)
    assert isinstance(approach, FedBPT)
    return approach


class Plain:
    """A `cma.CMAEvolutionStrategy` that lives for all its iterations, with the draws of `cmaes`."""

    def __init__(self, moments: Moments, popsize: int, sigma: float) -> None:
        self.draws = generator(0, "unused")
        options = {
            "verbose": -9, "popsize": popsize, "updatecovwait": 0, "seed": float("nan"),
            "randn": lambda *shape: self.draws.standard_normal(shape),
        }  # fmt: skip
        self.strategy = cma.CMAEvolutionStrategy(moments.mean, sigma, options)
        if not np.array_equal(moments.covariance, np.diag(np.diag(moments.covariance))):
            self.strategy.sm.C = moments.covariance.copy()
            self.strategy.sm.update_now(-1)
        self.strategy.sigma = float(moments.sigma)

    def ask(self, key: Key) -> Float64:
        self.draws = generator(key[0], "cma", *key[1:])
        return np.array(self.strategy.ask())

    def same(self, moments: Moments) -> None:
        s = self.strategy
        wanted = (s.mean, s.sigma, s.sm.C, s.pc, s.adapt_sigma.ps, s.countiter)
        for found, value in zip(moments.tensors().values(), wanted, strict=True):
            np.testing.assert_array_equal(found, value)


# ---------------------------------------------------------------- CMA-ES


@pytest.mark.parametrize(("dimension", "popsize"), [(5, 6), (12, 20)])
def test_iterations_from_moments_are_those_of_one_object(dimension: int, popsize: int) -> None:
    """To the last bit, through arrays as a checkpoint has them."""
    moments = cmaes.initial(dimension, 0.7)
    plain = Plain(moments, popsize, 0.7)
    for i in range(40):
        key = (3, 0, i)
        asked = plain.ask(key)
        np.testing.assert_array_equal(cmaes.ask(moments, popsize, 0.7, key), asked)
        losses = np.array([cma.ff.elli(z - 1) for z in asked])
        plain.strategy.tell(list(asked), losses.tolist())
        moments = Moments.from_tensors(cmaes.tell(moments, losses, 0.7, key).tensors())
        plain.same(moments)
    assert losses.min() < 0.05 * cma.ff.elli(np.ones(dimension))


def test_the_servers_iteration_is_the_formula() -> None:
    """Hansen 2016, equations 9, 24, 43 to 47, with all clients as parents; the step size as in the module."""
    rng, d, clients, popsize = np.random.default_rng(0), 6, 5, 10
    moments, clipped = cmaes.initial(d, 1.0), 0
    for i in range(6):
        numbers = np.column_stack([rng.standard_normal((clients, d)), rng.random(clients), 2 + rng.random(clients)])
        after = aggregate(moments, numbers, popsize, 1.0, (0, 0, i))
        strategy = cmaes.strategy_from(moments, clients, 1.0, (0, 0, i), clients)
        weights = np.array(strategy.sp.weights.positive_weights)
        assert len(weights) == clients and weights.sum() == pytest.approx(1) and (np.diff(weights) < 0).all()
        spread = np.sqrt(numbers[:, -1].sum() / clients / (popsize // 2))
        values, vectors = np.linalg.eigh(moments.covariance)
        root = vectors @ np.diag(1 / np.sqrt(values)) @ vectors.T
        away = (numbers[np.argsort(numbers[:, -2]), :d] - moments.mean) / spread
        far = np.linalg.norm(away @ root, axis=1) / (np.sqrt(d) + 2 * d / (d + 2))
        away /= np.maximum(far, 1)[:, None]
        clipped += int((far > 1).sum())
        mueff, step = 1 / (weights**2).sum(), weights @ away
        mean, whitened = moments.mean + spread * step, root @ step
        np.testing.assert_allclose(after.mean, mean, rtol=1e-9)
        cs = strategy.adapt_sigma.cs
        sigma_path = (1 - cs) * moments.sigma_path + np.sqrt(cs * (2 - cs) * mueff) * whitened
        np.testing.assert_allclose(after.sigma_path, sigma_path, rtol=1e-9, atol=1e-12)
        rates, cc = strategy.sm.parameters(), strategy.sp.cc
        c1, cmu = rates["c1"], rates["cmu"]
        stalled = (sigma_path**2).sum() / (1 - (1 - cs) ** (2 * (i + 1))) / d - 1 >= 1 + 4 / (d + 1)
        path = (1 - cc) * moments.path + (not stalled) * np.sqrt(cc * (2 - cc) * mueff) * step
        np.testing.assert_allclose(after.path, path, rtol=1e-9, atol=1e-12)
        c1a = c1 * (1 - stalled * cc * (2 - cc))
        covariance = (1 - c1a - cmu) * moments.covariance + c1 * np.outer(path, path) + cmu * (weights * away.T) @ away
        np.testing.assert_allclose(after.covariance, covariance, rtol=1e-9, atol=1e-12)
        moments = after
    assert moments.sigma != 1.0
    assert 0 < clipped < 30


# ---------------------------------------------------------------- against one process


def mean_losses(approach: FedBPT, z: Float64, examples: Any) -> Float64:
    """The loss per example of each z (n, d), by the kind of task's own forward."""
    train, base = approach.data.train, approach.base
    prompts = approach.subspace.prompts(z).to(base.dtype)
    batch: Any = base.batch(train, examples)
    found = []
    for prompt in prompts:
        with torch.no_grad():
            losses = approach.objective.losses(base, Attached(embeddings=prompt.expand(len(examples), -1, -1)), batch)
        found.append(float(losses.double().sum()) / len(examples))
    return np.array(found)


def moments_of(folder: Path) -> Moments:
    return Moments.from_tensors({n.removeprefix("cma/"): t for n, t in final(folder).items() if n.startswith("cma/")})


def test_scores_of_all_clients_make_the_iterations_of_a_single_process(tmp_path: Path, texts: Path) -> None:
    """On three ranks; by hand one `cma` object and all the examples in one place."""
    raw = black_box(texts, "scores", model={"dtype": "float64"}, partition={"max_examples": 5})
    raw["federation"] |= {"cohort_size": 8, "rounds": 3}
    raw["method"]["examples"] = None
    federate(settings(tmp_path / "run", raw), ranks=3)
    approach = made(tmp_path / "again", raw)
    plain = Plain(approach.first, 6, 1.0)
    everything = np.concatenate([approach.data.population.indices(c) for c in range(8)])
    for t in (1, 2, 3):
        z = plain.ask((0, 0, t))
        plain.strategy.tell(list(z), mean_losses(approach, z, everything).tolist())
    plain.same(moments_of(tmp_path / "run"))


def test_moments_of_clients_are_their_own_searches_and_the_servers_formula(tmp_path: Path, texts: Path) -> None:
    raw = black_box(texts, "moments", model={"dtype": "float64"})
    federate(settings(tmp_path / "run", raw), ranks=3)
    approach = made(tmp_path / "again", raw)
    now = approach.first
    for t in (1, 2):
        numbers = []
        for client in approach.plan(t).training:
            examples, plain, squares = approach.scored(t, client, 3)[0], Plain(now, 6, 1.0), 0.0
            for i in range(2):
                squares += plain.strategy.sigma**2
                z = plain.ask((0, 1, t, client, i))
                plain.strategy.tell(list(z), mean_losses(approach, z, examples).tolist())
            mean = plain.strategy.mean
            numbers.append([*mean, mean_losses(approach, mean[None], examples)[0], squares])
        now = aggregate(now, np.array(numbers), 6, 1.0, (0, 0, t))
    found = moments_of(tmp_path / "run")
    for name, value in now.tensors().items():
        np.testing.assert_allclose(found.tensors()[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("exchange", ["scores", "moments"])
@pytest.mark.parametrize("counts", [(3,), pytest.param((2, 4), marks=pytest.mark.slow)], ids=["quick", "many"])
def test_the_number_of_ranks_does_not_change_a_bit(
    tmp_path: Path, texts: Path, exchange: str, counts: tuple[int, ...]
) -> None:
    raw = black_box(texts, exchange)
    federate(settings(tmp_path / "1", raw))
    for ranks in counts:
        federate(settings(tmp_path / str(ranks), raw), ranks)
        same_results(tmp_path / "1", tmp_path / str(ranks))


@pytest.mark.parametrize("exchange", [pytest.param("scores", marks=pytest.mark.slow), "moments"])
def test_a_run_stopped_anywhere_and_resumed_equals_one_that_was_not(tmp_path: Path, texts: Path, exchange: str) -> None:
    raw = black_box(texts, exchange)
    whole = federate(settings(tmp_path / "whole", raw), ranks=2)
    config = settings(tmp_path / "stopped", raw)
    with pytest.raises(Interrupted):
        federate(config, 2, stop_at=int(0.6 * whole))
    federate(config, ranks=3)
    same_results(tmp_path / "whole", tmp_path / "stopped", ("rounds", "clients"))


# ---------------------------------------------------------------- what comes out, and mistakes


def test_the_adapter_is_the_prompt_that_was_tested(tmp_path: Path, texts: Path) -> None:
    from safetensors.numpy import load_file

    raw = black_box(texts, "scores")
    federate(settings(tmp_path / "run", raw))
    found = final(tmp_path / "run")
    exported = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    np.testing.assert_array_equal(exported[PROMPT], found[PROMPT])
    approach = made(tmp_path / "again", raw)
    wanted = approach.subspace.prompts(found["cma/mean"]).float().numpy()
    np.testing.assert_array_equal(found[PROMPT], wanted)
    words = approach.base.model.get_input_embeddings().weight.double()
    spread = approach.subspace.prompts(generator(0, "z").standard_normal((400, 6))) - approach.subspace.origin
    assert float(spread.std()) == pytest.approx(float(words.std()), rel=0.1)
    assert set(items_of(tmp_path / "run").values()) == {f"{len(approach.data.test)} examples"}
    search = table(tmp_path / "run", "tables/search")
    assert (search["evaluations"] > 0).all() and (search["tokens"] > 0).all()
    sent = table(tmp_path / "run", "rounds")
    assert (sent["bytes_down"][1], sent["bytes_up"][1]) == (4 * 8 * 6 * 6, 4 * 8 * 6)


def test_prompts_that_overflow_are_rejected_and_change_nothing(tmp_path: Path, texts: Path) -> None:
    for exchange in ("scores", "moments"):
        raw = black_box(texts, exchange)
        raw["method"] |= {"alpha": 1e300}
        raw["federation"]["rounds"] = 1
        federate(settings(tmp_path / exchange, raw), ranks=2)
        events = table(tmp_path / exchange, "events")
        assert list(events["kind"]).count("rejected") == 4
        assert "its scores are not finite" in events["message"][0]
        assert not final(tmp_path / exchange)["cma/mean"].any()


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        ({}, {"federation": {"cohort_size": 2}}, r"needs 3 distributions in a round and federation\.cohort_size is 2"),
        ({}, {"mode": "centralized"}, r"method\.exchange moments is between clients, and mode centralized"),
        ({"dimension": 97}, {}, r"method\.dimension: 97 is more than the 96 numbers of 3 virtual tokens"),
        ({"objective": "accuracy"}, {}, r"method\.objective: accuracy .*data\.target must be made of the label"),
    ],
)
def test_mistakes_are_one_line(
    tmp_path: Path, texts: Path, method: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    raw = black_box(texts, "moments")
    raw["method"] |= method
    for section, value in changes.items():
        raw[section] = {**raw[section], **value} if isinstance(value, dict) else value
    with pytest.raises((UserError, RefusedError), match=message):
        made(tmp_path / "run", raw)


def test_an_encoder_with_a_head_is_refused(tmp_path: Path, texts: Path) -> None:
    from tests.federations import save_random_bert

    save_random_bert(tmp_path / "bert")
    raw = black_box(texts, "scores", model={"name": str(tmp_path / "bert")}, data={"max_length": 40})
    with pytest.raises((UserError, RefusedError), match="fedbpt scores answers of a decoder-only model"):
        made(tmp_path / "run", raw)


def test_without_cma_the_extra_is_named(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cma", None)
    monkeypatch.setattr(cmaes, "cma", cmaes.lazy("cma", "search"))
    with pytest.raises((UserError, RefusedError), match=r"pip install 'fedhpc\[search\]'"):
        made(tmp_path / "run", black_box(texts, "scores"))


def test_a_round_that_nobody_completes_says_so(tmp_path: Path, texts: Path) -> None:
    raw = black_box(texts, "scores")
    raw["federation"] |= {"rounds": 1, "dropout": 0.999}
    federate(settings(tmp_path, raw))
    assert list(table(tmp_path, "events")["kind"]) == ["void"]
