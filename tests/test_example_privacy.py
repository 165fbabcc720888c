"""Privacy of single examples: their gradients beside those of PEFT, one at a time, and what is made of them."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import dp_accounting
import numpy as np
import pytest
import torch
from dp_accounting import rdp
from scipy import stats

from fedhpc.approaches.prepare import prepare
from fedhpc.errors import UserError
from fedhpc.methods.base import Method
from fedhpc.privacy._accountant import _ORDERS, Accountant, Poisson
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.results.results_file import Results
from fedhpc.training.block import Trained, Work, train_block
from fedhpc.training.example_privacy import ExamplePrivacy
from fedhpc.training.local import LocalTraining
from fedhpc.training.schedule import batches, poisson_batches, sampling_rate
from tests import test_kinds as classifiers
from tests import test_methods as decoders
from tests import tiny
from tests.federations import (
    Interrupted,
    compare_with_peft,
    federate,
    final,
    save_random_bert,
    table,
    tree,
    write_texts,
)
from tests.federations import settings as settings_of
from tests.test_block import settings, works
from tests.test_trl import of, pairs

FREE = ExamplePrivacy(clip_norm=1e9, noise_multiplier=0.0)  # neither clipped nor noisy
METHODS = [
    *(("llama", name) for name in ("lora", "prefix", "prompt", "ia3", "adapter", "p_tuning")),
    *(("gpt2", name) for name in ("lora", "prefix")),
    *(("bert", name) for name in ("lora", "ia3", "prompt")),
]


def setting(family: str, name: str) -> tuple[Any, Method, Any, torch.Tensor]:
    """A tiny model, a method on it, examples and a start (1, P) away from where gradients vanish."""
    base = tiny.base(family)
    of = classifiers if family == "bert" else decoders
    method = of.make(name, base)
    start = classifiers.warm(method)
    return base, method, tiny.labelled() if family == "bert" else tiny.examples(), start


def train(base: Any, method: Method, data: Any, start: torch.Tensor, group: list[Work], **more: Any) -> Trained:
    """One step of SGD with a learning rate of 1, so an update is the step's gradient; `more` says otherwise."""
    privacy = more.pop("privacy", FREE)
    memory = more.pop("memory", None)
    config = settings(**{"optimizer": "sgd", "lr": 1.0, "steps": 1, **more})
    local = replace(LocalTraining.of(config, 1, 1), privacy=privacy)
    return train_block(base, method, tiny.objective(base), start, group, data, local, memory)


def one_by_one(base: Any, method: Method, data: Any, start: torch.Tensor, name: str, rows: np.ndarray) -> torch.Tensor:
    """The gradient of each example's mean loss in PEFT (of adapters: of wrapped layers), alone: (E, T)."""
    if base.name == "bert":
        model, named = classifiers.in_peft(name, base, method)
    elif name == "adapter":
        model, named = decoders.with_bottlenecks(base, method.options)
    else:
        model, named = decoders.in_peft(name, base, method)
    with torch.no_grad():
        for key, value in method.payload.views(start[0]).items():
            named[key].copy_(value)
    gradients = []
    for row in rows:
        ids = torch.from_numpy(data.tokens(int(row)).astype(np.int64))[None]
        logits = model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        if base.name == "bert":
            loss = torch.nn.functional.cross_entropy(logits, torch.tensor([int(data.labels[row])]))
        else:
            of_text, first = logits[0, -ids.shape[1] :], int(data.prompt_lengths[row])
            loss = torch.nn.functional.cross_entropy(of_text[first - 1 : -1], ids[0, first:])
        found = torch.autograd.grad(loss, list(named.values()))
        gradients.append(method.payload.flatten(dict(zip(named, found, strict=True))))
    return torch.stack(gradients)


def gradients_of_examples(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What every forward hands to be clipped from now on."""
    seen: list[torch.Tensor] = []
    add = ExamplePrivacy.add_clipped

    def watched(self: ExamplePrivacy, gradient: Any, of_examples: torch.Tensor, owners: Any) -> None:
        seen.append(of_examples.clone())
        add(self, gradient, of_examples, owners)

    monkeypatch.setattr(ExamplePrivacy, "add_clipped", watched)
    return seen


@pytest.mark.parametrize(("family", "name"), METHODS)
def test_gradients_of_examples_are_those_of_single_examples_in_peft(
    family: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And their clipped sum is that of numpy."""
    base, method, data, start = setting(family, name)
    compare_with_peft(name)
    rows = np.arange(3, 12)
    wanted = one_by_one(base, method, data, start, name, rows)
    norms = np.linalg.norm(wanted.numpy(), axis=1)
    clip = float(np.median(norms))
    seen = gradients_of_examples(monkeypatch)
    privacy = ExamplePrivacy(clip, 0.0)
    found = train(base, method, data, start, [Work(0, rows)], batch_size=len(rows), privacy=privacy).updates[0]
    by_length = np.argsort(data.lengths_of(rows), kind="stable")
    apart = (torch.cat(seen) - wanted[by_length]).norm(dim=1) / wanted[by_length].norm(dim=1)
    assert float(apart.max()) < 1e-9
    clipped = wanted.numpy() * np.minimum(1.0, clip / norms)[:, None]
    np.testing.assert_allclose(found.numpy(), clipped.sum(axis=0) / len(rows), rtol=0, atol=1e-9 * clip)


@pytest.mark.parametrize(("family", "objective"), [("llama", "dpo"), ("t5", "auto"), ("bert", "auto")])
def test_a_step_is_the_sum_of_steps_of_single_examples(family: str, objective: str) -> None:
    """Also where an example has two rows, as a pair has."""
    base = tiny.base(family)
    method = classifiers.make("lora", base)
    start, rows = classifiers.warm(method), np.arange(4, 10)
    data = pairs() if objective == "dpo" else tiny.labelled() if family == "bert" else tiny.examples()
    made = of("dpo", base) if objective == "dpo" else tiny.objective(base)
    config = settings(optimizer="sgd", lr=1.0, steps=1, batch_size=len(rows))

    def update(chosen: np.ndarray, privacy: ExamplePrivacy) -> torch.Tensor:
        local = replace(LocalTraining.of(config, 1, 1), privacy=privacy)
        return train_block(base, method, made, start, [Work(0, chosen)], data, local).updates[0]

    alone = torch.stack([update(rows[i : i + 1], FREE) for i in range(len(rows))])
    clip = float(alone.norm(dim=1).median())
    clipped = alone * (clip / alone.norm(dim=1, keepdim=True)).clamp(max=1.0)
    together = update(rows, ExamplePrivacy(clip, 0.0))
    assert float((together - clipped.mean(dim=0)).norm() / together.norm()) < 1e-9


def test_a_block_is_its_clients_alone_with_starts_of_their_own() -> None:
    """Batches of Poisson, in several forwards; client 2 has fewer examples than a batch, so all are in every step."""
    base, method, data, first = setting("llama", "lora")
    group = works(4)
    starts = torch.cat([first, first * 0.9, first * 1.1, first])
    private = {"privacy": ExamplePrivacy(0.05, 0.7), "steps": 3, "batch_size": 6, "lr": 0.5}
    together = train(base, method, data, starts, group, **private)
    cut = train(base, method, data, starts, group, **private, micro_batch=2)
    for i, work in enumerate(group):
        alone = train(base, method, data, starts[i : i + 1], [work], **private)
        for other in (together, cut):
            assert float((other.updates[i] - alone.updates[0]).norm() / alone.updates[0].norm()) < 1e-9
            assert other.tokens[i] == alone.tokens[0]
            assert other.loss_last[i] == pytest.approx(alone.loss_last[0], rel=1e-9)


def test_without_clip_and_noise_it_is_plain_training_on_the_same_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a classifier, whose examples have one label each: the mean over the expected batch, not the real one."""
    base, method, data, start = setting("bert", "lora")
    work = Work(5, np.arange(20))
    drawn = poisson_batches(20, settings(batch_size=8).client, 0, 1, 5)
    monkeypatch.setattr("fedhpc.training.block.batches", poisson_batches)
    for steps in (1, 2):
        config = settings(optimizer="sgd", lr=0.2, steps=steps, batch_size=8)
        # The plain step divides by the examples of its batch: its learning rate makes up for that.
        rate = 0.2 * len(drawn[0]) / 8
        plain_local = replace(LocalTraining.of(config, 1, 1), lr=rate)
        plain = train_block(base, method, tiny.objective(base), start, [work], data, plain_local)
        private = train(base, method, data, start, [work], steps=steps, batch_size=8, lr=0.2)
        if steps == 1:
            np.testing.assert_allclose(private.updates, plain.updates, rtol=0, atol=1e-12)
        assert private.tokens[0] == plain.tokens[0] == sum(map(len, drawn[:steps]))


def test_one_example_more_moves_the_sum_by_at_most_the_clip() -> None:
    """By brute force: each example in turn is added to the batch of a step, whatever its gradient is."""
    base, method, data, start = setting("llama", "prefix")
    clip, rows = 0.02, np.arange(10)
    privacy = ExamplePrivacy(clip, 0.0)

    def total(chosen: np.ndarray) -> torch.Tensor:
        size = len(chosen)
        return size * train(base, method, data, start, [Work(0, chosen)], batch_size=size, privacy=privacy).updates[0]

    whole = total(rows)
    moved = [float((whole - total(np.delete(rows, left_out))).norm()) for left_out in rows]
    assert max(moved) <= clip * (1 + 1e-9)
    assert max(moved) > 0.9 * clip  # and the bound is reached


def test_no_example_adds_more_than_the_clip_by_rounding() -> None:
    """Not by that of its norm and not by that of its numbers: one example alone in a float32 sum."""
    rows = 10 * torch.randn(400, 3001, generator=torch.Generator().manual_seed(3))
    clipped = torch.zeros_like(rows)
    ExamplePrivacy(0.7, 0.0).add_clipped(clipped, rows.clone(), torch.arange(400))
    norms = torch.linalg.vector_norm(clipped.double(), dim=1)
    assert float(norms.max()) <= 0.7 and float(norms.min()) > 0.7 * (1 - 2e-6)


def test_a_gradient_that_is_not_finite_adds_nothing() -> None:
    gradient = torch.zeros(2, 3)
    of_examples = torch.tensor(
        [[3.0, 4.0, 0.0], [torch.inf, 1.0, 0.0], [torch.nan, 1.0, 2.0], [1e30, 1e30, 1e30], [0.0, 0.0, 0.0]]
    )
    ExamplePrivacy(1.0, 0.0).add_clipped(gradient, of_examples, torch.tensor([0, 0, 1, 1, 1]))
    assert torch.isfinite(gradient).all()
    assert float(gradient.norm(dim=1).max()) <= 2.0 + 1e-6
    torch.testing.assert_close(gradient[0], torch.tensor([0.6, 1.8, 0.0]))


def test_noise_is_normal_and_keyed_by_round_client_and_step() -> None:
    privacy, size = ExamplePrivacy(0.5, 3.0), 40_000

    def drawn(*key: int) -> np.ndarray:
        noise = torch.zeros(2, size, dtype=torch.float64)
        seed, round_, step, *clients = key
        privacy.add_noise(noise, seed, [round_] * len(clients), step, clients)
        return noise.numpy()

    noise = drawn(0, 1, 2, 7, 8)
    assert stats.kstest(noise.ravel() / 1.5, "norm").pvalue > 1e-3
    np.testing.assert_array_equal(noise, drawn(0, 1, 2, 8, 7)[::-1])
    others = [drawn(*key) for key in ((1, 1, 2, 7, 8), (0, 2, 2, 7, 8), (0, 1, 3, 7, 8), (0, 1, 2, 9, 10))]
    for other in others:
        for one in noise:
            assert abs(np.corrcoef(one, other[0])[0, 1]) < 5 / np.sqrt(size)


def test_a_step_without_examples_is_noise_alone() -> None:
    """With the losses of the steps that had some."""
    base, method, data, start = setting("llama", "prompt")
    pace = settings(batch_size=1, steps=6).client
    seed = next(s for s in range(99) if not len(poisson_batches(9, pace, s, 1, 0)[0]))
    config = settings(optimizer="sgd", lr=1.0, batch_size=1, steps=6)
    local = replace(LocalTraining.of(config, 1, 1), privacy=ExamplePrivacy(0.1, 2.0), seed=seed)
    first = train_block(
        base, method, tiny.objective(base), start, [Work(0, np.arange(9))], data, replace(local, steps=1)
    )
    noise = torch.zeros(1, method.payload.size, dtype=torch.float64)
    ExamplePrivacy(0.1, 2.0).add_noise(noise, seed, [1], 0, [0])
    torch.testing.assert_close(first.updates, noise)
    assert first.tokens[0] == 0
    whole = train_block(base, method, tiny.objective(base), start, [Work(0, np.arange(9))], data, local)
    assert whole.tokens[0] > 0 and whole.loss_first[0] > 0 and whole.loss_last[0] > 0


def test_every_example_is_in_a_batch_with_the_same_probability() -> None:
    """By a draw of its own: counts of examples and sizes of batches are binomial."""
    pace, count, steps = settings(batch_size=6, steps=2000).client, 30, 2000
    drawn = poisson_batches(count, pace, 0, 1, 3)
    rate = sampling_rate(count, pace)
    assert rate == 0.2 and len(drawn) == steps
    seen = np.bincount(np.concatenate(drawn), minlength=count)
    assert stats.chisquare(seen, np.full(count, seen.sum() / count)).pvalue > 1e-3
    sizes = np.bincount([len(batch) for batch in drawn], minlength=count + 1)
    wanted = steps * stats.binom.pmf(np.arange(count + 1), count, rate)
    often = wanted > 5
    expected = np.append(wanted[often], wanted[~often].sum())
    assert stats.chisquare(np.append(sizes[often], sizes[~often].sum()), expected).pvalue > 1e-3
    assert [len(b) for b in poisson_batches(4, pace, 0, 1, 3)] == [4] * steps  # all of what is less than a batch
    assert len(poisson_batches(7, settings(batch_size=3).client, 0, 1, 3)) == len(
        batches(7, settings(batch_size=3).client, 0, 1, 3)
    )


# ---------------------------------------------------------------- runs

PRIVACY = {"name": "example", "clip_norm": 0.5, "delta": 0.01, "noise_multiplier": 1.5, "accountant": "rdp"}

PARTITION = {"name": "quantity_skew", "num_clients": 4, "alpha": 2.0}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    save_random_bert(folder / "bert")
    return folder


def private(texts: Path, folder: Path, privacy: dict[str, Any] | None = None, **changes: Any) -> Any:
    """A small federation whose clients, of unequal sizes, take batches of 4."""
    few = {"every": 9, "max_examples": 4, "test_max_examples": 4}
    client = {"batch_size": 4, "steps": None, "epochs": 1, "lr": 0.5, **changes.pop("client", {})}
    whole = {name: changes.pop(name) for name in ("method", "partition") if name in changes}
    raw = tree(
        texts,
        **{
            "evaluation": few,
            "client": client,
            "federation": {"cohort_size": 3},
            **changes,
            "privacy": {**PRIVACY, **(privacy or {})},
        },
    )
    return settings_of(folder, {**raw, "partition": PARTITION, **whole})


@cache
def by_library(size: int, steps: int) -> float:
    """The epsilon of a client with `size` examples after so many steps, by dp-accounting's own events."""
    event = dp_accounting.PoissonSampledDpEvent(min(1.0, 4 / size), dp_accounting.GaussianDpEvent(1.5))
    epsilon: float = rdp.RdpAccountant(_ORDERS).compose(event, steps).get_epsilon(0.01)
    return epsilon


def spent_by_hand(config: Any, rounds: int) -> list[float]:
    """The largest epsilon of a client after 0 to `rounds` rounds, for the steps that it took."""
    approach = prepare(config, LoopbackTransport(), Launch(), write_cache=False)
    sizes = [approach.data.population.num_examples(c) for c in range(approach.data.population.num_clients)]
    steps, worst = [0] * len(sizes), [0.0]
    for round_ in range(1, rounds + 1):
        for client in approach.plan(round_).training:
            steps[client] += math.ceil(sizes[client] / 4)
        worst.append(max(by_library(n, s) for n, s in zip(sizes, steps, strict=True) if s))
    return worst


def test_a_private_run_has_the_same_bits_on_several_ranks_and_resumed(texts: Path, tmp_path: Path) -> None:
    changes = {"federation": {"rounds": 3, "cohort_size": 3}, "method": {"name": "lora", "rank": 2}}
    runs: dict[str, Any] = {}
    for name, ranks in (("one", 1), ("three", 3)):
        config = private(texts, tmp_path / name, **changes)
        collectives = federate(config, ranks)
        runs[name] = final(tmp_path / name)
    config = private(texts, tmp_path / "resumed", **changes)
    with pytest.raises(Interrupted):
        federate(config, 2, stop_at=collectives // 2)
    federate(config, 2)
    runs["resumed"] = final(tmp_path / "resumed")
    wanted = spent_by_hand(config, 3)
    assert wanted[0] == 0 < wanted[1] < wanted[3]
    for name, tensors in runs.items():
        np.testing.assert_allclose(table(tmp_path / name, "rounds")["epsilon"], wanted, rtol=1e-9)
        assert all(np.array_equal(tensors[key], runs["one"][key]) for key in tensors)
    attributes = Results.read(tmp_path / "one" / "results.h5").attributes
    assert attributes["epsilon"] == pytest.approx(wanted[3])
    assert (attributes["protects"], attributes["neighbouring_relation"]) == ("example", "add-or-remove-one")
    # Blocks of one client: other forwards, in 32 bits.
    federate(private(texts, tmp_path / "alone", **changes, runtime={"block_size": 1}))
    for key, tensor in final(tmp_path / "alone").items():
        np.testing.assert_allclose(tensor, runs["one"][key], rtol=0, atol=1e-6)


@pytest.mark.parametrize("mode", ["centralized", "local"])
def test_clients_without_a_federation_spend_too(mode: str, texts: Path, tmp_path: Path) -> None:
    config = private(texts, tmp_path / mode, mode=mode, federation={"rounds": 2, "cohort_size": 3})
    federate(config)
    found = table(tmp_path / mode, "rounds")["epsilon"]
    np.testing.assert_allclose(found, spent_by_hand(config, len(found) - 1), rtol=1e-9)
    assert len(found) > 1
    cards = [file.read_text() for file in (tmp_path / mode / "adapter").rglob("README.md")]
    assert len(cards) == (4 if mode == "local" else 1) and all(f"with epsilon {found[-1]:.4g}" in c for c in cards)


def level(texts: Path, folder: Path, privacy: dict[str, Any]) -> Any:
    """The privacy of a run of four rounds, two clients each, and in how many rounds each client trains."""
    config = private(texts, folder, privacy, federation={"rounds": 4, "cohort_size": 2})
    made = prepare(config, LoopbackTransport(), Launch(), write_cache=False).privacy
    return made, made._planned(4)


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_what_is_spent_is_what_the_worst_client_has_spent(accountant: Any, texts: Path, tmp_path: Path) -> None:
    privacy, times = level(texts, tmp_path, {"accountant": accountant, "noise_multiplier": 3.0})
    each = [
        Accountant(accountant, 0.01, Poisson(min(1, 4 / n))).epsilon(3.0, t * math.ceil(n / 4))
        for n, t in zip(privacy.releases.population.sizes().tolist(), times.tolist(), strict=True)
    ]
    assert privacy._most_spent(times) == max(each) > min(each)
    spent = privacy.initial()
    for clients in ([], [1, 1], [3]):
        privacy.account(spent, clients)
    assert spent["rounds"].tolist() == [0, 2, 0, 1]
    assert privacy._most_spent(0 * times) == 0


def test_the_noise_for_a_budget_is_that_of_the_client_that_needs_the_most(texts: Path, tmp_path: Path) -> None:
    privacy, times = level(texts, tmp_path, {"noise_multiplier": None, "epsilon": 3.0})
    assert 2.95 < privacy._most_spent(times) <= 3.0


def test_a_run_ends_with_its_budget(texts: Path, tmp_path: Path) -> None:
    few = {"rounds": 4, "cohort_size": 4}
    config = private(texts, tmp_path / "run", federation=few)
    _, one, budget, three = spent_by_hand(config, 3)
    assert one < budget < three
    federate(private(texts, tmp_path / "run", {"epsilon": budget * (1 + 1e-9)}, federation=few))
    assert len(table(tmp_path / "run", "rounds")["epsilon"]) == 3
    with pytest.raises(RefusedError, match="less than one round spends"):
        federate(private(texts, tmp_path / "none", {"epsilon": 1e-3}, federation=few))


@pytest.mark.parametrize("protocol", ["none", "pairwise"])
def test_a_budget_counts_the_rounds_of_clients_that_take_time(protocol: str, texts: Path, tmp_path: Path) -> None:
    # Plans need the bytes of updates, and the budget needs plans before anything has trained.
    few = {"rounds": 4, "cohort_size": 4}
    more = {"devices": {"name": "lognormal"}, "secure": {"name": protocol}}
    config = private(texts, tmp_path, {"epsilon": 100.0}, federation=few, **more)
    approach = prepare(config, LoopbackTransport(), Launch(), write_cache=False)
    assert approach.rounds == 4 and approach.plan(1).times is not None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"method": {"name": "full"}}, "method.name full has no gradient for each example"),
        ({"method": {"name": "fedkseed"}, "client": {"optimizer": "sgd"}}, "method.name fedkseed has no gradient"),
        ({"privacy": {"delta": 0.9}}, "one over the examples of the largest client"),
        ({"partition": {"name": "virtual"}}, "gives an example to several clients"),
        ({"client": {"packing": True}}, "client.packing puts several examples into one row"),
        ({"method": {"name": "lora", "aggregation": "stack", "ranks": [1, 2]}}, "method.ranks would not last"),
        ({"client": {"scaffold": True}}, "client.scaffold is not defined with privacy.name example"),
        ({"personalization": {"finetune_steps": 2}, "evaluation": {"client_fraction": 0.2}}, "finetune_steps would"),
        ({"privacy": {"noise_multiplier": None}}, "both missing"),
        ({"privacy": {"sampling": "fixed"}}, "sampling"),
    ],
)
def test_what_has_no_examples_of_its_own_is_refused(
    texts: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    changes = dict(change)
    with pytest.raises((UserError, RefusedError), match=words):
        federate(private(texts, tmp_path / "run", changes.pop("privacy", None), **changes))
    assert not (tmp_path / "run").exists()
