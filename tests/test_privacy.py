"""Differential privacy of clients: noise, clipping, what one client changes, and what the rounds spend."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import NeighboringRelation, pld, rdp
from scipy import stats

from fedhpc import config as configuration
from fedhpc import rng
from fedhpc.approaches.averaging import local
from fedhpc.approaches.prepare import prepare
from fedhpc.data.population import Population
from fedhpc.errors import UserError
from fedhpc.participation.sampling import draw_by_poisson
from fedhpc.participation.schedules import synchronous
from fedhpc.privacy import _banded_noise
from fedhpc.privacy import client as client_level
from fedhpc.privacy._accountant import Accountant, Fixed, Poisson
from fedhpc.privacy._banded_noise import BandedNoise, square_root_of_sums
from fedhpc.privacy._discrete_gaussian import discrete_gaussian
from fedhpc.privacy.base import Releases
from fedhpc.privacy.client import Client, clipped
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport, Transport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.results.results_file import Results
from fedhpc.results.resume import decide
from fedhpc.updates.cohort import Cohort
from fedhpc.updates.layout import Layout
from tests.federations import Interrupted, federate, final, on_threads, settings, table, tree, write_texts

PRIVACY = {"name": "client", "clip_norm": 0.5, "delta": 0.01, "noise_multiplier": 1.0, "accountant": "rdp"}
CHANGES: dict[str, Any] = {"server": {"weighting": "uniform"}, "partition": {"name": "iid", "num_clients": 8}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def private(texts: Path, folder: Path, privacy: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A small private federation."""
    raw = tree(texts, **{**CHANGES, **changes, "privacy": {**PRIVACY, **(privacy or {})}})
    raw["partition"] = {**CHANGES["partition"]}
    return settings(folder, raw)


# ---------------------------------------------------------------- noise


@pytest.mark.parametrize("sigma", [0.4, 1.0, 3.7, 50.0])
def test_noise_is_discrete_gaussian(sigma: float) -> None:
    """Chi-square against the exact probabilities, over seeds: the p-values of ten of them are not all small."""
    most = int(6 * sigma) + 2
    x = np.arange(-most, most + 1)
    p = np.exp(-(x**2) / (2 * sigma**2))
    p /= p.sum()
    values = []
    for seed in range(10):
        draws = discrete_gaussian(sigma, 20_000, rng.generator(seed, "test"))
        assert draws.dtype == np.int64 and draws.shape == (20_000,)
        counts = np.bincount(np.clip(draws, -most, most) + most, minlength=2 * most + 1)
        inner = p * len(draws) >= 5
        observed = [*counts[inner], counts[~inner].sum()]
        values.append(stats.chisquare(observed, np.append(p[inner], p[~inner].sum()) * len(draws)).pvalue)
    assert stats.kstest(values, "uniform").pvalue > 1e-3


def test_noise_of_a_fine_grid_is_normal() -> None:
    sigma = 1.3 * 2.0**30
    draws = np.concatenate([discrete_gaussian(sigma, 50_001, rng.generator(seed, "test")) for seed in range(4)])
    assert stats.kstest(draws / sigma, "norm").pvalue > 1e-3
    assert abs(np.corrcoef(draws[:-1], draws[1:])[0, 1]) < 0.01
    assert 0.45 < (draws % 2).mean() < 0.55  # the last bit too


# ---------------------------------------------------------------- accountants


@pytest.mark.parametrize("method", ["pld", "rdp"])
def test_epsilon_is_that_of_the_library_for_the_same_event(method: str) -> None:
    event = dp_accounting.PoissonSampledDpEvent(0.1, dp_accounting.GaussianDpEvent(0.9))
    reference: Any = pld.PLDAccountant() if method == "pld" else rdp.RdpAccountant()
    for _ in range(2):
        reference.compose(event)
    accountant = Accountant(method, 1e-3, Poisson(0.1))  # type: ignore[arg-type]
    assert accountant.epsilon(0.9, 2) == pytest.approx(reference.get_epsilon(1e-3), rel=1e-6)
    assert accountant.epsilon(0.9, 0) == 0


def test_a_fixed_cohort_is_accounted_for_with_twice_the_sensitivity() -> None:
    accountant = Accountant("rdp", 1e-3, Fixed(10, 100))
    event = dp_accounting.SampledWithoutReplacementDpEvent(100, 10, dp_accounting.GaussianDpEvent(1.5))
    reference = rdp.RdpAccountant(neighboring_relation=NeighboringRelation.REPLACE_ONE).compose(event, 20)
    assert accountant.epsilon(3.0, 20) == pytest.approx(reference.get_epsilon(1e-3), rel=1e-9)
    # A cohort of all clients is the Gaussian mechanism of sensitivity 2 C: alpha / (2 (z / 2)^2) of order alpha.
    everybody = Accountant("rdp", 1e-3, Fixed(100, 100))
    assert everybody.epsilon(4.0, 1) == pytest.approx(Accountant("rdp", 1e-3, Poisson(1.0)).epsilon(2.0, 1), rel=0.02)


@pytest.mark.parametrize("sampling", [Poisson(0.05), pytest.param(Fixed(5, 100), marks=pytest.mark.slow)])
def test_noise_for_a_budget_spends_it_and_no_more(sampling: Any) -> None:
    accountant = Accountant("rdp", 1e-3, sampling)
    noise = accountant.noise_multiplier(2.0, 12)
    assert accountant.epsilon(noise, 12) <= 2.0 < accountant.epsilon(noise - 5e-4, 12)
    assert accountant.affordable(noise, 2.0, 20) == 12
    assert accountant.noise_multiplier(1e6, 1) == 0.05
    with pytest.raises(UserError, match="needs noise of more than"):
        Accountant("rdp", 1e-12, Poisson(0.05)).noise_multiplier(1e-9, 10_000)


# ---------------------------------------------------------------- clipping, and what one client changes

LAYOUT = Layout({"a": (40,), "b": (3, 5)})


def level(clip_norm: float = 0.5, **options: Any) -> Client:
    """Client-level privacy of 20 clients of whom 5 are expected in a cohort."""
    privacy = {**PRIVACY, "clip_norm": clip_norm, **options}
    raw = {"server": {"weighting": "uniform"}, "partition": {"name": "iid", "num_clients": 20}, "privacy": privacy}
    return Client(configuration.resolve(raw), Releases(Population(20, 0, 0.0), LAYOUT.size, 5, lambda round_: range(5)))


def pseudo_gradient(
    client: Client,
    updates: torch.Tensor,
    ranks: int = 1,
    spent: dict[str, torch.Tensor] | None = None,
    round_: int = 1,
) -> torch.Tensor:
    """What a round of a cohort with these updates gives."""

    def one(transport: Transport) -> torch.Tensor:
        mine = np.arange(len(updates))[transport.rank :: ranks]
        shares = np.ones(len(updates)) / max(len(updates), 1)
        cohort = Cohort(transport, LAYOUT, list(range(len(updates))), shares, mine, updates[mine])
        here = spent if spent is not None and transport.is_server else {}
        return client.combine(transport, cohort, round_, lambda cohort, round_: pytest.fail("without privacy"), here)

    return on_threads(ranks, one)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("clip_norm", [0.3, 1.0, 7e-4])
def test_updates_are_clipped_to_the_norm_and_never_beyond(clip_norm: float, dtype: torch.dtype) -> None:
    rows = torch.randn(200, LAYOUT.size, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows[:100] *= clip_norm / 100
    sent = clipped(rows, level(clip_norm).bound(clip_norm))
    norms = torch.linalg.vector_norm(sent.double(), dim=1)
    assert torch.equal(sent[:100], rows[:100]) and sent.dtype == dtype
    assert (norms <= clip_norm).all() and norms[100:].min() > clip_norm * (1 - 1e-5)
    wanted = rows[100:].double() * clip_norm / torch.linalg.vector_norm(rows[100:].double(), dim=1, keepdim=True)
    torch.testing.assert_close(sent[100:].double(), wanted, rtol=1e-5, atol=0)


def test_one_client_changes_the_sum_by_the_clip_norm_and_one_replaced_by_twice_that(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(client_level, "discrete_gaussian", lambda sigma, count, generator: np.zeros(count, np.int64))
    client, generator = level(), torch.Generator().manual_seed(2)
    least, step = 0.0, 0.5 / 2**30
    for trial in range(30):
        updates = 10.0 ** float(trial % 5 - 3) * torch.randn(6, LAYOUT.size, generator=generator)
        if trial % 2:
            updates[5] = -updates[4]
        whole = pseudo_gradient(client, updates) * client.releases.cohort_size
        for out in range(len(updates)):
            without = pseudo_gradient(client, updates[torch.arange(6) != out]) * client.releases.cohort_size
            assert torch.linalg.vector_norm(whole - without) <= 0.5 + step / 1e3
        replaced = updates.clone()
        replaced[4] = -updates[4]
        changed = torch.linalg.vector_norm(pseudo_gradient(client, replaced) * client.releases.cohort_size - whole)
        assert changed <= 1.0 + step / 1e3
        least = max(least, float(changed))
    assert least > 1.0 - 1e-5  # the bound is attained


def test_the_sum_is_that_of_numpy_over_the_expected_cohort_and_has_noise_where_nobody_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = level()
    updates = torch.randn(7, LAYOUT.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    noise = pseudo_gradient(client, updates[:0])
    assert noise.shape == (LAYOUT.size,) and 0.05 < noise.std() < 0.2  # z C / 5
    rows = updates.numpy() * np.minimum(1, 0.5 / np.linalg.norm(updates.numpy(), axis=1, keepdims=True))
    total = pseudo_gradient(client, updates)
    np.testing.assert_allclose((total - noise).numpy(), rows.sum(axis=0) / 5, atol=1e-6)
    assert torch.equal(pseudo_gradient(client, updates, ranks=3), total)
    assert torch.equal(pseudo_gradient(client, updates[:0], ranks=2), noise)


def test_an_adaptive_clip_norm_follows_the_quantile_of_the_norms(monkeypatch: pytest.MonkeyPatch) -> None:
    """Equations of Andrew et al. 2021, section 2.1 and theorem 1, in numpy; the same on three ranks."""
    client = level(0.1, adaptive={"quantile": 0.7, "lr": 0.3, "count_noise": 2.0})
    assert client.noise_of_updates**-2 + 4.0**-2 == pytest.approx(1.0)  # z^-2
    with pytest.raises(UserError, match="leaves nothing for the updates"):
        level(adaptive={})  # a twentieth of 5 clients
    updates = torch.randn(60, LAYOUT.size, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    updates *= torch.linspace(0.1, 3, 60).unsqueeze(1)
    norms = np.linalg.norm(updates.numpy(), axis=1)
    after = {}
    for ranks in (1, 3):
        spent = client.initial()
        pseudo_gradient(client, updates, ranks, spent)
        after[ranks] = spent["clip_norm"]
    assert torch.equal(after[1], after[3]) and int(spent["rounds"]) == 0
    count = (norms <= 0.1).sum() - 30  # of b - 1/2
    noise = (np.log(0.1 / float(after[1])) / 0.3 + 0.7 - 0.5) * 5 - count
    assert 0 < abs(noise) < 4 * 2.0
    monkeypatch.setattr(client_level, "discrete_gaussian", lambda sigma, count, generator: np.zeros(count, np.int64))
    client = Client(client.config, Releases(Population(80, 0, 0.0), LAYOUT.size, 60, lambda round_: range(60)))
    spent = client.initial()
    for _ in range(60):
        pseudo_gradient(client, updates, 1, spent)
    assert abs((norms <= float(spent["clip_norm"])).mean() - 0.7) < 0.05


@pytest.mark.parametrize(("share", "limit"), [(1.0, 1e-9), (0.0, 1e9)])
def test_an_adaptive_clip_norm_stays_within_the_limits_of_clip_norm(share: float, limit: float) -> None:
    client = level(0.1, adaptive={"quantile": 0.5, "lr": 1e6, "count_noise": 2.0})
    assert client._next(0.1, share) == limit
    assert client._next(limit, share) == limit


def test_banded_noise_is_a_factorization_of_sums_that_a_client_changes_by_one() -> None:
    """The noise of all rounds is C^-1 z: C times it is independent and normal, of standard deviation z C."""
    rounds, bands = 12, 4
    client = level(bands=bands)
    column = square_root_of_sums(bands)
    np.testing.assert_allclose(column / column[0], [1, 1 / 2, 3 / 8, 5 / 16])
    C = sum(np.diag(np.full(rounds - k, column[k]), -k) for k in range(bands))
    norms = np.linalg.norm(C, axis=0)
    assert norms.max() == pytest.approx(1) and (C.T @ C)[0, bands:].max() == 0
    whole = square_root_of_sums(9)
    toeplitz = sum(np.diag(np.full(9 - k, whole[k] / whole[0]), -k) for k in range(9))
    np.testing.assert_allclose(toeplitz @ toeplitz, np.tril(np.ones((9, 9))), atol=1e-12)  # the square root
    spent, noise = client.initial(), []
    nobody = torch.empty(0, LAYOUT.size, dtype=torch.float64)
    for round_ in range(1, rounds + 1):
        noise.append(pseudo_gradient(client, nobody, 1, spent, round_).numpy() * client.releases.cohort_size)
    z = C @ np.stack(noise) / 0.5
    assert stats.kstest(z.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(z)[~np.eye(rounds, dtype=bool)]).max() < 0.5  # of 55 numbers each
    sums = np.stack(noise).cumsum(axis=0) / 0.5
    assert sums[-1].std() < 0.8 * np.sqrt(rounds)  # than that of independent noise of the same z
    once = Accountant("rdp", 0.01, Poisson(1.0))
    assert client.accountant.sampling == once.sampling
    assert client.epsilon({"rounds": torch.tensor([rounds])}) == once.epsilon(1.0, 3)
    with pytest.raises(UserError, match="is more than one in privacy"):
        level(bands=5)


def test_banded_noise_is_put_together_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And not again for each of its chunks, which would take a time that grows with the square of their number."""
    copied: list[int] = []

    def cat(parts: list[torch.Tensor]) -> torch.Tensor:
        copied.append(len(parts))
        return torch.cat(parts)

    monkeypatch.setattr(_banded_noise, "torch", SimpleNamespace(cat=cat, int64=torch.int64))
    chunks = iter(torch.arange(200).split(5))
    noise = BandedNoise(lambda count: next(chunks), 2, torch.zeros(1, 200, dtype=torch.float64))
    for _ in range(40):
        noise(5)
    latest = noise.latest()
    assert len(copied) == 2
    np.testing.assert_allclose(latest[0], np.arange(200) / square_root_of_sums(2)[0])


def test_a_promise_says_that_the_adapter_that_a_run_went_on_from_is_not_part_of_it() -> None:
    client = level()
    alone = client.promise(client.initial())
    method = client.config.method.model_copy(update={"from": "runs/before/adapter"})
    client.config = client.config.model_copy(update={"method": method})
    assert client.promise(client.initial()) == (
        f"{alone} What the adapter that this run went on from (method.from) tells of the same data comes on top."
    )


# ---------------------------------------------------------------- runs


def test_a_private_run_has_the_same_bits_on_several_ranks_and_resumed(texts: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "federation": {"rounds": 4, "cohort_size": 2},  # of 8: with this seed one cohort is empty
        "evaluation": {"every": 4, "max_examples": 4, "test_max_examples": 4},
        "run": {"seed": 3},
    }
    adaptive = {"adaptive": {"lr": 0.5, "count_noise": 1.0}}
    runs = {}
    for name, ranks in (("one", 1), ("three", 3)):
        config = private(texts, tmp_path / name, adaptive, **changes)
        collectives = federate(config, ranks)
        runs[name] = final(tmp_path / name)
    config = private(texts, tmp_path / "resumed", adaptive, **changes)
    with pytest.raises(Interrupted):
        federate(config, 3, stop_at=collectives // 2)
    federate(config, 3)
    runs["resumed"] = final(tmp_path / "resumed")
    for name, tensors in runs.items():
        rounds = table(tmp_path / name, "rounds")
        accountant = Accountant("rdp", 0.01, Poisson(0.25))
        assert rounds["epsilon"].tolist() == [accountant.epsilon(1.0, t) for t in range(5)]
        assert 0 in rounds["cohort_size"][1:] and len(set(rounds["cohort_size"])) > 2
        assert (rounds["update_norm"][1:] > 0).all()  # of noise at least
        assert (rounds["clip_norm"][1:] > 0).all() and len(set(rounds["clip_norm"][1:])) == 4
        assert all(np.array_equal(tensors[key], runs["one"][key]) for key in tensors)
    attributes = Results.read(tmp_path / "one" / "results.h5").attributes
    assert attributes["epsilon"] == accountant.epsilon(1.0, 4)
    assert (attributes["delta"], attributes["neighbouring_relation"]) == (0.01, "add-or-remove-one")
    card = (tmp_path / "one" / "adapter" / "README.md").read_text()
    assert f"every client is protected with epsilon {attributes['epsilon']:.4g} at delta 0.01" in card


def test_a_client_that_is_not_there_moves_the_state_by_no_more_than_it_may(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two whole rounds of neighbours, without noise: the state after them is C / (q N) apart, for every client."""
    monkeypatch.setattr(client_level, "discrete_gaussian", lambda sigma, count, generator: np.zeros(count, np.int64))
    few = {"every": 9, "max_examples": 4, "test_max_examples": 4}
    states = {}
    for absent in (None, 1, 4):
        cohort = tuple(c for c in (4, 1, 6) if c != absent)
        monkeypatch.setattr(synchronous, "draw_by_poisson", lambda *_, cohort=cohort: cohort)
        folder = tmp_path / f"{absent}"
        once = {"rounds": 1, "cohort_size": 2}
        federate(private(texts, folder, {"clip_norm": 0.1}, federation=once, evaluation=few))
        states[absent] = np.concatenate([tensor.ravel() for tensor in final(folder).values()])
    for absent in (1, 4):
        moved = np.linalg.norm(states[None] - states[absent])
        assert moved == pytest.approx(0.1 / 2, rel=1e-4)  # their updates are longer than C; the state is float32


def test_correlated_noise_goes_on_after_a_resume(texts: Path, tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "federation": {"rounds": 4, "cohort_size": 2},
        "evaluation": {"every": 9, "max_examples": 4, "test_max_examples": 4},
    }
    whole = private(texts, tmp_path / "whole", {"bands": 3}, **changes)
    collectives = federate(whole)
    half = private(texts, tmp_path / "half", {"bands": 3}, **changes)
    with pytest.raises(Interrupted):
        federate(half, stop_at=collectives // 2)
    federate(half, 2)
    assert "resumed" in table(tmp_path / "half", "events")["kind"]
    one, other = final(tmp_path / "whole"), final(tmp_path / "half")
    assert all(np.array_equal(one[name], other[name]) for name in one)


def test_a_secure_sum_of_private_updates_is_that_sum(texts: Path, tmp_path: Path) -> None:
    found, options = [], {"sampling": "fixed", "adaptive": {"count_noise": 2.0}}
    for name in ("none", "pairwise"):
        changes = {"federation": {"rounds": 2, "cohort_size": 5}, "secure": {"name": name}}
        few = {"every": 9, "max_examples": 4, "test_max_examples": 4}
        federate(private(texts, tmp_path / name, options, evaluation=few, **changes))
        found.append(final(tmp_path / name))
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_an_update_that_is_not_finite_is_sent_as_a_masked_zero(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether a round is void must not tell of one client's data, so it counts among those that recover the masks."""
    wrong, train_block = 3, local.train_block

    def diverging(base: Any, method: Any, objective: Any, starts: Any, works: Any, *args: Any) -> Any:
        trained = train_block(base, method, objective, starts, works, *args)
        trained.updates[[work.client_id == wrong for work in works]] = torch.nan
        return trained

    monkeypatch.setattr(local, "train_block", diverging)
    found, options = [], {"sampling": "fixed", "adaptive": {"count_noise": 2.0}}
    for name, secure in (("plain", {"name": "none"}), ("masked", {"name": "pairwise", "threshold": 8})):
        changes = {"federation": {"rounds": 2, "cohort_size": 8}, "secure": secure}
        few = {"every": 9, "max_examples": 4, "test_max_examples": 4}
        federate(private(texts, tmp_path / name, options, evaluation=few, **changes), ranks=3)
        rounds, clients = table(tmp_path / name, "rounds"), table(tmp_path / name, "clients")
        assert rounds["rejected"].tolist() == [0, 1, 1] and (rounds["update_norm"][1:] > 0).all()
        assert set(clients["client_id"][clients["status"] == 2]) == {wrong}
        assert "void" not in table(tmp_path / name, "events")["kind"]
        found.append(final(tmp_path / name))
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_a_run_ends_with_its_budget_and_cannot_be_extended_beyond(texts: Path, tmp_path: Path) -> None:
    spent = Accountant("rdp", 0.01, Poisson(0.25)).epsilon(1.0, 2)
    small: dict[str, Any] = {"evaluation": {"every": 9, "max_examples": 4, "test_max_examples": 4}}
    for rounds in (3, 5):
        few = {"rounds": rounds, "cohort_size": 2}
        config = private(texts, tmp_path / "run", {"epsilon": spent + 1e-9}, federation=few, **small)
        federate(config)
        found = table(tmp_path / "run", "rounds")
        assert found["epsilon"].tolist() == [0, Accountant("rdp", 0.01, Poisson(0.25)).epsilon(1.0, 1), spent]
        assert np.isfinite(found["eval_loss"][-1])
    for change in ({"clip_norm": 0.6}, {"delta": 0.02}, {"noise_multiplier": 2.0}, {"sampling": "fixed"}):
        budget = {"epsilon": spent + 1e-9, **change}
        with pytest.raises(UserError, match=r"another configuration: privacy\."):
            decide(private(texts, tmp_path / "run", budget, federation=few, **small), tmp_path / "run", fresh=False)


@pytest.mark.parametrize("level", ["client", "example"])
def test_all_ranks_take_the_noise_and_the_rounds_that_rank_0_found(
    level: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Told(LoopbackTransport):
        def __init__(self) -> None:
            super().__init__()
            self.rank, self.world_size = 1, 2

        def broadcast_json(self, value: Any) -> Any:
            return {"value": {"noise_multiplier": 1.25, "rounds": 3}}

    budget = {"name": level, "noise_multiplier": None, "epsilon": 4.0}
    config = private(texts, tmp_path, budget, federation={"rounds": 4, "cohort_size": 2})
    first = prepare(config, LoopbackTransport(), Launch(), write_cache=False)
    assert first.decisions == {"noise_multiplier": first.privacy.noise_multiplier, "rounds": 4}
    monkeypatch.setattr(Accountant, "noise_multiplier", lambda *_: pytest.fail("looked for again"))
    other = prepare(config, Told(), Launch(), write_cache=False)
    assert (other.privacy.noise_multiplier, other.rounds) == (1.25, 3)


def test_rounds_for_which_the_noise_was_chosen_cannot_change(texts: Path, tmp_path: Path) -> None:
    few, budget = {"every": 9, "max_examples": 4, "test_max_examples": 4}, {"noise_multiplier": None, "epsilon": 9.0}
    runs = {
        rounds: private(texts, tmp_path, budget, federation={"rounds": rounds, "cohort_size": 2}, evaluation=few)
        for rounds in (2, 3)
    }
    federate(runs[2])
    assert 8.9 < table(tmp_path, "rounds")["epsilon"][-1] <= 9.0
    with pytest.raises(UserError, match=r"federation.rounds 2 -> 3: the noise was chosen .* start over with --fresh"):
        decide(runs[3], tmp_path, fresh=False)


def test_poisson_cohorts_are_as_they_should_be(texts: Path) -> None:
    config = private(texts, texts / "run", federation={"cohort_size": 2})
    population = Population(8, 0, 0.0)
    cohorts = [draw_by_poisson(config, population, t, 2) for t in range(1, 2001)]
    assert all(len(set(cohort)) == len(cohort) for cohort in cohorts)
    sizes = np.bincount([min(len(cohort), 5) for cohort in cohorts], minlength=6)
    expected = 2000 * np.append(stats.binom(8, 0.25).pmf(np.arange(5)), stats.binom(8, 0.25).sf(4))
    assert stats.chisquare(sizes, expected).pvalue > 1e-4
    times = np.bincount([c for cohort in cohorts for c in cohort], minlength=8)
    assert np.abs(times / 2000 - 0.25).max() < 0.04
    together = np.mean([{0, 1} <= set(cohort) for cohort in cohorts])
    assert abs(together - 0.25**2) < 0.025  # each on its own


def test_a_banded_cohort_is_of_every_bands_th_client(texts: Path) -> None:
    config = private(texts, texts / "run", {"bands": 3}, federation={"cohort_size": 2})
    cohorts = [draw_by_poisson(config, Population(8, 0, 0.0), t, 2) for t in range(1, 1501)]
    assert all(c % 3 == (t - 1) % 3 for t, cohort in enumerate(cohorts, 1) for c in cohort)
    times = np.bincount([c for cohort in cohorts for c in cohort], minlength=8)
    assert np.abs(times / 500 - 0.75).max() < 0.08


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"privacy": {"epsilon": 0.0}}, "privacy.epsilon: must be|privacy.epsilon: .*greater than 0"),
        ({"privacy": {"clip_norm": None}}, "privacy.clip_norm"),
        ({"privacy": {"noise_multiplier": None}}, "both missing"),
        ({"privacy": {"sampling": "fixed", "accountant": "pld"}}, "no bound for cohorts of a fixed size"),
        ({"server": {"aggregator": "median"}}, "use mean"),
        ({"server": {"aggregator": "fedexp"}}, "aggregator fedexp has no bound on what one client changes"),
        ({"server": {"weighting": "examples"}}, "set server.weighting uniform"),
        ({"federation": {"min_cohort": 2}}, "min_cohort"),
        ({"privacy": {"adaptive": {"count_noise": 1e12}}}, "count_noise"),
        ({"client": {"scaffold": True}}, "client.scaffold"),
        ({"client": {"server_momentum": 0.5}}, "client.server_momentum"),
        ({"mode": "local"}, "mode local"),
    ],
)
def test_what_would_break_the_promise_is_refused(texts: Path, tmp_path: Path, change: Any, words: str) -> None:
    privacy = change.pop("privacy", {})
    with pytest.raises(UserError, match=words):
        private(texts, tmp_path, privacy, **change)


@pytest.mark.parametrize(
    ("privacy", "federation", "words"),
    [
        ({"delta": 0.2}, {}, "more than 1 / 8"),
        ({"epsilon": 0.01}, {}, "less than one round spends"),
        ({}, {"cohort_size": 9}, "population has 8 clients"),
    ],
)
def test_what_the_population_cannot_have_is_refused(
    texts: Path, tmp_path: Path, privacy: Any, federation: Any, words: str
) -> None:
    with pytest.raises(RefusedError, match=words):
        federate(private(texts, tmp_path / "run", privacy, federation=federation))
    assert not (tmp_path / "run").exists()


def test_the_library_is_asked_for_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(UserError, match=r"pip install 'fedhpc\[privacy\]'"):
        level()


# ---------------------------------------------------------------- beside others, and against an attacker


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("q", "z", "rounds", "delta"), [(0.05, 0.6, 20, 1e-4), (0.1, 2.0, 200, 1e-5)])
def test_epsilon_beside_that_of_peers(q: float, z: float, rounds: int, delta: float) -> None:
    """Opacus 1.6 and pfl 0.4, where they are installed: docs/privacy.md has the numbers."""
    opacus, pfl = pytest.importorskip("opacus.accountants"), pytest.importorskip("pfl.privacy.privacy_accountant")
    by_pld, by_rdp = (Accountant(method, delta, Poisson(q)).epsilon(z, rounds) for method in ("pld", "rdp"))
    of_opacus = {}
    for name in ("RDPAccountant", "PRVAccountant"):
        accountant = getattr(opacus, name)()
        accountant.history = [(z, q, rounds)]
        of_opacus[name] = accountant.get_epsilon(delta=delta)
    assert of_opacus["RDPAccountant"] == pytest.approx(by_rdp, rel=1e-3)
    assert by_pld < of_opacus["PRVAccountant"] < by_pld + 0.02  # it adds its bound of the numerical error, 0.01
    keys = {"num_compositions": rounds, "sampling_probability": q, "mechanism": "gaussian", "delta": delta}
    for name, wanted in (("PLDPrivacyAccountant", by_pld), ("RDPPrivacyAccountant", by_rdp)):
        assert getattr(pfl, name)(**keys, epsilon=None, noise_parameter=z).epsilon == pytest.approx(wanted, rel=1e-6)


def least_epsilon(guesses: int, right: int, canaries: int, delta: float, confidence: float = 0.95) -> float:
    """The epsilon that so many right guesses refute (Steinke, Nasr and Jagielski 2023, theorem 5.2)."""

    def refuted(epsilon: float) -> bool:
        wrong_at_most = stats.binom(guesses, 1 / (1 + np.exp(-epsilon)))
        steps = np.arange(1, right + 1)
        alpha = (np.cumsum(wrong_at_most.pmf(right - steps)) / steps).max()
        return float(wrong_at_most.sf(right - 1) + 2 * canaries * delta * alpha) < 1 - confidence

    return max((epsilon for epsilon in np.arange(0, 20, 0.02) if refuted(epsilon)), default=0.0)


def audited(client: Client) -> float:
    """A lower bound of epsilon, from one run in which half of the clients took part, by who the attacker says did.

    Each client's update is a coordinate of its own: nothing tells more than its sum over the rounds.
    """
    canaries, rounds, seed = LAYOUT_OF_CANARIES.size, 4, 5
    takes_part = rng.generator(seed, "takes part").random(canaries) < 0.5
    seen = np.zeros(canaries)
    for round_ in range(1, rounds + 1):
        drawn = rng.generator(seed, "drawn", round_).random(canaries) < client.releases.cohort_size / canaries
        rows = np.flatnonzero(drawn & takes_part)
        updates = torch.zeros(len(rows), canaries, dtype=torch.float64)
        updates[torch.arange(len(rows)), torch.from_numpy(rows)] = 100.0  # clipped
        shares = np.ones(len(rows)) / len(rows)
        transport = LoopbackTransport()
        cohort = Cohort(transport, LAYOUT_OF_CANARIES, rows.tolist(), shares, np.arange(len(rows)), updates)
        seen += client.combine(transport, cohort, round_, lambda cohort, round_: torch.zeros(0), {}).numpy()
    sure = np.argsort(-np.abs(seen - seen.mean()))[: canaries // 4]
    right = int(((seen > seen.mean()) == takes_part)[sure].sum())
    return least_epsilon(len(sure), right, canaries, client.options.delta)


LAYOUT_OF_CANARIES = Layout({"one each": (1000,)})


@pytest.mark.slow
def test_an_attacker_learns_less_than_epsilon_and_more_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = {
        "server": {"weighting": "uniform"}, "partition": {"name": "virtual", "num_clients": 1000},
        "privacy": {**PRIVACY, "delta": 1e-5, "noise_multiplier": 3.0},
    }  # fmt: skip
    population = Population(1000, 0, 0.0)
    client = Client(configuration.resolve(raw), Releases(population, 1000, 800, lambda round_: range(800)))
    stated = client.accountant.epsilon(3.0, 4)
    assert 0.25 * stated < audited(client) < stated
    plain = discrete_gaussian
    monkeypatch.setattr(
        client_level, "discrete_gaussian", lambda sigma, count, generator: plain(sigma / 50, count, generator)
    )
    assert audited(client) > stated
