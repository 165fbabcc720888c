"""The search for prompts: scores against plain forwards, candidates, halving, and runs on any number of ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch

from fedhpc import registry
from fedhpc.approaches.prepare import prepare
from fedhpc.approaches.prompt_search import approach as search_rounds
from fedhpc.approaches.prompt_search.approach import PromptSearch
from fedhpc.approaches.prompt_search.halving import rungs
from fedhpc.approaches.prompt_search.sampling import continuations
from fedhpc.approaches.scoring import likelihoods
from fedhpc.approaches.scoring.likelihoods import TokenCount
from fedhpc.approaches.scoring.objective import row_losses
from fedhpc.approaches.scoring.prompts import Candidate, Shared, Space, Writer
from fedhpc.builtin.world import rows
from fedhpc.config import Config, load
from fedhpc.data.templates import parse
from fedhpc.errors import UserError
from fedhpc.models.base import Attached
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.rng import generator
from tests import tiny
from tests.federations import Interrupted, federate, items_of, settings, table, tree, write_texts
from tests.ranks import Ranks, run_ranks
from tests.test_federation import same_results

WORDS = {name: [name, name.upper()] for name in sorted({row["label"] for row in rows("dining", "train")})}
NAMED = {"name": "templates"}
TEXTS = ["A place to eat.", "What kind of place is it? It is"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def search(texts: Path, **changes: Any) -> dict[str, Any]:
    """A search over labels with two generations of two rounds; `changes` are merged into its sections."""
    method = {
        "name": "prompt_search",
        "instructions": TEXTS,
        "cues": [" it is a", ""],
        "label_words": WORDS,
        "demonstrations": 2,
        "objective": "label_loss",
        "population": 6,
        "survivors": 2,
        "examples": 2,
        "max_prompt_tokens": 256,
        "proposers": [{"name": "templates"}, {"name": "lm", "max_tokens": 4}],
    }
    base = tree(
        texts,
        data={"target": " {label}", "max_length": 128},
        federation={"rounds": 4, "cohort_size": 4},
        client={"lr": 0.01},
        evaluation={"metrics": ["accuracy", "loss"], "every": 2, "max_examples": 5},
    )
    base["method"] = method
    for section, value in changes.items():
        base[section] = {**base.get(section, {}), **value} if isinstance(value, dict) else value
    return base


def made(folder: Path, raw: dict[str, Any]) -> PromptSearch:
    approach = prepare(settings(folder, raw), LoopbackTransport(), Launch(), False)
    assert isinstance(approach, PromptSearch)
    return approach


# ---------------------------------------------------------------- scores


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
def test_shared_prefixes_and_rows_score_as_each_row_alone(family: str) -> None:
    """Prefixes, rows and answers of unequal length, in one forward and in several."""
    base, rng = tiny.base(family), np.random.default_rng(0)

    def some(count: int) -> np.ndarray:
        return rng.integers(3, tiny.VOCABULARY, count).astype(np.int32)

    prefixes, texts = [some(n) for n in (0, 9, 4)], [some(int(n)) for n in rng.integers(1, 14, 24)]
    which = rng.integers(0, 3, 24)
    answers = [some(n) for n in (1, 3, 2)]
    wanted = np.zeros((24, 3))
    for b in range(24):
        for i, answer in enumerate(answers):
            ids = np.concatenate([prefixes[which[b]], texts[b], answer]).astype(np.int64)
            with torch.no_grad():
                likely = base.model(torch.from_numpy(ids[None])).logits[0].log_softmax(dim=-1).numpy()
            wanted[b, i] = likely[np.arange(len(ids) - len(answer) - 1, len(ids) - 1), answer].sum()
    spent = TokenCount()
    with torch.no_grad():
        shared = likelihoods.of_texts(base, prefixes, spent)
        together = likelihoods.log_likelihoods(base, shared, which, texts, [answers] * 24, spent)
        one = likelihoods.log_likelihoods(base, shared, which, texts, [[answers[1]]] * 24, TokenCount())
        none = likelihoods.of_texts(base, [some(0)], TokenCount())
        bare = likelihoods.log_likelihoods(base, none, np.zeros(24, int), texts, [answers] * 24, TokenCount())
    np.testing.assert_allclose(together, wanted, rtol=0, atol=1e-9)
    np.testing.assert_allclose(one[:, 0], wanted[:, 1], rtol=0, atol=1e-9)
    np.testing.assert_allclose(bare[which == 0], wanted[which == 0], rtol=0, atol=1e-9)
    alone = sum(
        len(prefixes[w]) + len(text) + len(answer) - 1
        for w, text in zip(which, texts, strict=True)
        for answer in answers
    )
    assert spent.unshared == alone
    assert spent.tokens - spent.padded < alone / 2


def test_soft_prompts_score_as_an_attached_prompt_does() -> None:
    base, examples = tiny.base("llama"), tiny.examples(12)
    prompts = torch.randn(2, 5, base.hidden_size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    which, every = np.arange(12) % 2, np.arange(12)
    with torch.no_grad():
        batch: Any = base.batch(examples, every)
        losses = tiny.objective(base).losses(base, Attached(embeddings=prompts[which]), batch)
        wanted = -np.bincount(np.repeat(every, batch.supervised), weights=losses.numpy())
        found = likelihoods.log_likelihoods(
            base,
            likelihoods.of_embeddings(base, prompts, TokenCount()),
            which,
            [examples.prompt(e) for e in every],
            [[examples.target(e)] for e in every],
            TokenCount(),
        )
    np.testing.assert_allclose(found[:, 0], wanted, rtol=0, atol=1e-9)


def test_objectives_are_their_formulas() -> None:
    likely, right = np.array([[-1.0, -2.0, -4.0], [-3.0, -2.0, -9.0]]), np.array([0, 2])
    np.testing.assert_array_equal(row_losses("loss", likely, right), [1.0, 9.0])
    shares = np.exp(likely) / np.exp(likely).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(row_losses("label_loss", likely, right), -np.log(shares[[0, 1], right]))
    np.testing.assert_array_equal(row_losses("accuracy", likely, right), [0.0, 1.0])
    likely[0, 1] = np.nan
    with np.errstate(invalid="ignore"):
        assert all(np.isnan(row_losses(name, likely, right)[0]) for name in ("label_loss", "accuracy"))  # type: ignore[arg-type]


# ---------------------------------------------------------------- schedule and candidates


def test_successive_halving_spends_about_the_same_in_every_rung() -> None:
    found = rungs(16, 3, 2, 4)
    assert [(r.size, r.examples, r.last) for r in found] == [(16, 4, False), (8, 8, False), (4, 16, True)]
    assert [r.size for r in rungs(9, 2, 3, 1)] == [9, 3]
    assert [r.size for r in rungs(4, 3, 2, 1)] == [4]


def writer_of(base: Any, label: str | None = "label") -> Writer:
    return Writer(base.tokenizer, 0, "|", parse(" {label}", "data.target"), label, 40)


@pytest.fixture(scope="module")
def builtin() -> Any:
    from fedhpc.config import Model
    from fedhpc.models.load import load_base

    return load_base(Model(), torch.device("cpu"))


@pytest.mark.parametrize("name", registry.names("proposers"))
def test_a_proposer_follows_from_its_draws_and_changes_something(name: str, builtin: Any) -> None:
    cls = registry.choice("proposers", name)
    words = tuple(tuple(group) for group in WORDS.values())
    space = Space(writer_of(builtin), tuple(TEXTS), (" it is a", ""), words, 2, ("random", "short"))
    proposer = cls(cls.Options(), space, builtin)
    shared = [Shared("an input", 1), Shared("another", 0)]
    first, again, other = (proposer.propose(space.hand_written(), shared, 40, generator(s, "x")) for s in (0, 0, 1))
    assert first == again
    assert first != other
    new = {c.to_json() for c in first} - {c.to_json() for c in space.hand_written()}
    assert len(new) > 10
    assert all(Candidate.from_json(text).to_json() == text for text in new)
    if name == "templates":  # every part of a prompt is searched
        start = space.hand_written()[0]
        for part in ("instruction", "cue", "words", "demonstrations", "shared"):
            assert any(getattr(c, part) != getattr(start, part) for c in first), part


def test_continuations_are_draws_from_the_model(builtin: Any) -> None:
    """The smallest draw takes the first token with a share; rows of other lengths beside it change nothing."""
    prompts = [np.array(builtin.tokenizer(t)["input_ids"], np.int32) for t in ("The Copper Kettle", "name")]
    draws = np.array([[0.1, 0.5, 0.9], [0.3, 0.999999999, 0.2]])
    with torch.no_grad():
        both = continuations(builtin, prompts, draws, 1.0)
        one = continuations(builtin, prompts[1:], draws[1:], 1.0)
        likely = builtin.model(torch.from_numpy(prompts[1][None]).long()).logits[0, -1].double().softmax(dim=-1)
    np.testing.assert_array_equal(both[1], one[0])
    assert both[1][0] == int(torch.searchsorted(likely.cumsum(dim=0), 0.3))


def test_demonstrations_are_the_clients_own_and_by_the_rule(tmp_path: Path, texts: Path) -> None:
    approach = made(tmp_path, search(texts))
    writer, train = approach.writer, approach.data.train
    assert train.labels is not None
    for client in range(8):
        scored, pool = approach.scored(1, client, 4, aside=2)
        assert not set(scored) & set(pool)
        assert {*scored, *pool} == set(approach.data.population.indices(client))
        assert len(scored) == min(4, len(scored) + len(pool) - min(2, (len(scored) + len(pool)) // 2))
    pool = np.arange(40)
    one = Candidate("Say it.", " is", tuple(WORDS), demonstrations=2, rule="short")
    first, second = sorted(pool, key=lambda e: train.lengths[e])[:2]
    pieces = [
        np.concatenate(
            [train.prompt(int(e))[1:], writer.ids(" is"), writer.answers(one)[train.labels[e]][:-1], writer.ids("\n")]
        )
        for e in (first, second)
    ]
    found = writer.demonstrations(one, train, pool, client=0)
    assert len(found) == sum(map(len, pieces))
    balanced = Candidate(words=tuple(WORDS), demonstrations=3, rule="balanced")
    chosen = writer.in_order(balanced, train, pool, 0)[: len(set(train.labels[pool]))]
    assert len(set(train.labels[chosen])) == len(chosen)
    tight = Writer(writer.tokenizer, 0, "\n", writer.target, writer.label, len(writer.fixed(one)) + 2)
    assert len(tight.demonstrations(one, train, pool, client=0)) == 0
    assert writer.in_order(balanced, train, pool, 0) != writer.in_order(balanced, train, pool, 1)


# ---------------------------------------------------------------- runs


def test_the_scores_of_a_round_are_those_of_its_pooled_examples(tmp_path: Path, texts: Path) -> None:
    """On two workers in blocks; by hand with the evaluation's own losses on examples with the prompt around them."""
    raw = search(texts, federation={"rounds": 2, "dropout": 0.3}, model={"dtype": "float64"})
    raw["method"] |= {"objective": "loss"}
    federate(settings(tmp_path, raw), ranks=3)
    approach = made(tmp_path / "again", raw)
    scores, prompts = table(tmp_path, "tables/scores"), table(tmp_path, "tables/candidates")["prompt"]
    assert [int((scores["round"] == t).sum()) for t in (1, 2)] == [6, 3]
    train = approach.data.train
    for round_, number, score, count in zip(
        *(scores[n] for n in ("round", "candidate", "score", "examples")), strict=True
    ):
        candidate = Candidate.from_json(prompts[number])
        total, rows_seen = 0.0, 0
        for client in approach.plan(int(round_)).training:
            scored, pool = approach.scored(int(round_), client, *approach.budget(int(round_) - 1))
            own = approach.writer.demonstrations(candidate, train, pool, client)
            whole = approach.writer.rewritten(candidate, train, [own])
            nothing = torch.empty(1, 0)
            found = approach.evaluator(LoopbackTransport()).evaluate(None, nothing, whole, scored, ["loss"])
            assert found is not None
            total += found.metrics["loss"] * approach.objective.num_supervised(whole, scored).sum()
            rows_seen += len(scored)
        assert count == rows_seen
        assert score == pytest.approx(total / rows_seen, rel=1e-12)


def test_the_best_of_every_rung_go_on_and_the_best_of_the_last_is_kept(tmp_path: Path, texts: Path) -> None:
    federate(settings(tmp_path, search(texts)), ranks=2)
    scores, rounds = table(tmp_path, "tables/scores"), table(tmp_path, "tables/search")
    of = {t: scores["candidate"][scores["round"] == t] for t in (1, 2, 3, 4)}
    value = {t: dict(zip(of[t], scores["score"][scores["round"] == t], strict=True)) for t in of}
    best = sorted(of[1], key=lambda c: value[1][c])[:3]
    assert list(of[2]) == best
    weights = [scores["examples"][scores["round"] == t][0] for t in (1, 2)]
    over_both = sorted(best, key=lambda c: np.average([value[1][c], value[2][c]], weights=weights))
    assert list(of[3][:2]) == over_both[:2]
    assert not set(of[3][2:]) & set(of[1])
    assert list(rounds["best"]) == [0, over_both[0], over_both[0], rounds["best"][3]]
    assert list(rounds["rung"]) == [0, 1, 0, 1]
    assert (rounds["tokens_unshared"] > 2 * rounds["tokens"]).all()
    exported = json.loads((tmp_path / "adapter" / "prompt.json").read_text())
    kept = json.loads(table(tmp_path, "tables/candidates")["prompt"][rounds["best"][3]])
    assert exported["instruction"] == kept["instruction"]
    assert list(exported["words"].values()) == kept["words"]
    prompts = table(tmp_path, "tables/prompts")
    assert list(prompts["kind"]) == ["empty", "hand_written", "hand_written", "searched"]
    assert np.isfinite(prompts["test_accuracy"]).sum() == 3
    assert table(tmp_path, "test")["accuracy"] == prompts["test_accuracy"][-1]
    assert table(tmp_path, "rounds")["eval_accuracy"][-1] == prompts["validation_accuracy"][-1]


@pytest.mark.parametrize("counts", [(3,), pytest.param((2, 4), marks=pytest.mark.slow)], ids=["quick", "many"])
def test_the_number_of_ranks_does_not_change_a_bit(tmp_path: Path, texts: Path, counts: tuple[int, ...]) -> None:
    raw = search(texts, evaluation={"samples": 2})
    federate(settings(tmp_path / "1", raw))
    for ranks in counts:
        federate(settings(tmp_path / str(ranks), raw), ranks)
        same_results(tmp_path / "1", tmp_path / str(ranks))
        for name in ("search", "scores", "candidates", "prompts"):
            one, other = (table(tmp_path / n, f"tables/{name}") for n in ("1", str(ranks)))
            for column in one:
                np.testing.assert_array_equal(one[column], other[column])


def test_a_run_stopped_anywhere_and_resumed_equals_one_that_was_not(tmp_path: Path, texts: Path) -> None:
    raw = search(texts)
    raw["method"] |= {"share_demonstrations": True}
    whole = federate(settings(tmp_path / "whole", raw), ranks=2)
    config = settings(tmp_path / "stopped", raw)
    for share, ranks in ((0.3, 2), (0.4, 1)):
        with pytest.raises(Interrupted):
            federate(config, ranks, stop_at=max(1, int(share * whole)))
    federate(config, ranks=3)
    same_results(tmp_path / "whole", tmp_path / "stopped", ("rounds", "clients"))
    for name in ("search", "scores", "candidates"):
        one, other = (table(tmp_path / n, f"tables/{name}") for n in ("whole", "stopped"))
        for column in one:
            np.testing.assert_array_equal(one[column], other[column])


@pytest.mark.slow
def test_processes_killed_in_mid_run_and_resumed_give_the_same_bits(tmp_path: Path, texts: Path) -> None:
    raw = search(texts, federation={"rounds": 12})
    federate(settings(tmp_path / "whole", raw))
    path = tmp_path / "start.yaml"
    path.write_text(settings(tmp_path / "killed", raw).to_yaml())
    with Ranks(2, ["-m", "fedhpc.main", str(path)], "forked") as running:
        running.wait_for("round 3/")
        running.rank_processes()[1].kill()
        assert not running.survivors(120)
    assert 3 <= json.loads((tmp_path / "killed" / "status.json").read_text())["round"] < 12
    for result in run_ranks(3, ["-m", "fedhpc.main", str(path)], "forked", timeout=300):
        assert (result.code, result.err) == (0, "")
    same_results(tmp_path / "whole", tmp_path / "killed", ("rounds", "clients"))
    assert list(table(tmp_path / "killed", "events")["kind"]) == ["resumed"]


@pytest.mark.parametrize("shared", [pytest.param(False, marks=pytest.mark.slow), True])
def test_examples_leave_a_client_only_where_it_is_allowed(tmp_path: Path, texts: Path, shared: bool) -> None:
    raw = search(texts)
    raw["method"] |= {"share_demonstrations": shared, "proposers": [{"name": "templates"}], "population": 12}
    federate(settings(tmp_path, raw), ranks=2)
    inputs = {f"{row['mr']} :" for row in rows("dining", "train")[:90]}
    prompts = [Candidate.from_json(text) for text in table(tmp_path, "tables/candidates")["prompt"]]
    assert any(c.demonstrations for c in prompts)
    seen = {one.input for c in prompts for one in c.shared}
    assert bool(seen) == shared
    assert seen <= inputs
    bytes_up = table(tmp_path, "rounds")["bytes_up"]
    plain = 8 * np.array([12, 6, 3, 12]) * 4
    assert (bytes_up[1:] == plain).all() != shared


def test_the_bytes_are_those_of_the_texts_and_a_number_for_each(tmp_path: Path, texts: Path) -> None:
    federate(settings(tmp_path, search(texts, federation={"rounds": 1})))
    approach = made(tmp_path / "again", search(texts))
    text = search_rounds.encoded(0, approach.first)
    assert [Candidate.from_tree(one) for one in json.loads(text)["candidates"]] == approach.first
    found = table(tmp_path, "rounds")
    assert (found["bytes_down"][1], found["bytes_up"][1]) == (4 * len(text), 4 * 8 * 6)
    with h5py.File(tmp_path / "results.h5") as file:
        assert file.attrs["trainable_parameters"] == 0


def test_a_client_whose_scores_are_not_finite_is_rejected(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    raw = search(texts, federation={"rounds": 2, "cohort_size": 8}, runtime={"block_size": 4})
    bad = made(tmp_path / "plan", raw).plan(1).blocks[0].clients[2]
    score = PromptSearch.score

    def poisoned(self: PromptSearch, prefixes: Any, found: Any, clients: int, *rest: Any) -> Any:
        scores = score(self, prefixes, found, clients, *rest)
        scores.means[2 if clients == 4 else 0, 1] = np.nan if clients == 4 else scores.means[0, 1]
        return scores

    monkeypatch.setattr(PromptSearch, "score", poisoned)
    federate(settings(tmp_path / "run", raw), ranks=2)
    clients = table(tmp_path / "run", "clients")
    rejected = clients["client_id"][(clients["status"] == 2) & (clients["round"] == 1)]
    assert bad in rejected
    assert f"client {bad}: its scores are not finite" in list(table(tmp_path / "run", "events")["message"])
    assert np.isfinite(table(tmp_path / "run", "tables/scores")["score"]).all()


@pytest.mark.slow
def test_a_median_of_scores_takes_the_sharded_way(tmp_path: Path, texts: Path) -> None:
    raw = search(texts, server={"aggregator": "median"}, federation={"rounds": 1})
    federate(settings(tmp_path / "1", raw))
    federate(settings(tmp_path / "3", raw), ranks=3)
    one, other = (table(tmp_path / n, "tables/scores")["score"] for n in "13")
    np.testing.assert_array_equal(one, other)
    mean = search(texts, federation={"rounds": 1})
    federate(settings(tmp_path / "mean", mean))
    assert not np.array_equal(one, table(tmp_path / "mean", "tables/scores")["score"])


@pytest.mark.slow
def test_texts_without_labels_are_searched_by_their_loss(tmp_path: Path, texts: Path) -> None:
    raw = search(texts, data={"target": " {ref}"}, evaluation={"metrics": ["loss", "bleu"], "samples": 1})
    del raw["method"]["label_words"]
    raw["method"] |= {"objective": "loss"}
    federate(settings(tmp_path, raw), ranks=2)
    assert np.isfinite(table(tmp_path, "tables/scores")["score"]).all()
    assert {unit.split()[1] for unit in items_of(tmp_path).values()} == {"examples", "prompts"}


# ---------------------------------------------------------------- mistakes

REF = {"data": {"target": " {ref}"}, "evaluation": {"metrics": ["loss"]}}


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            {"instructions": [], "label_words": {}, "demonstrations": 0, "cues": [""], "proposers": [NAMED]},
            {},
            r"method\.instructions: there is no second candidate",
        ),
        ({"instructions": ["word " * 300]}, {}, r"method\.instructions\[0\].*has \d+ tokens.*max_prompt_tokens is 256"),
        ({"max_prompt_tokens": 500}, {}, r"method\.max_prompt_tokens: .*628 tokens.*512 positions: lower .* by 116"),
        ({"label_words": {**WORDS, "pub": ["cafe"]}}, {}, "'cafe' stands for both 'cafe' and 'pub'"),
        ({"label_words": {"pub": ["x"]}}, {}, r"method\.label_words: label 'bakery' has no words"),
        ({"label_words": {**WORDS, "bub": ["x"]}}, {}, r"no label 'bub'; did you mean 'pub'"),
        ({"label_words": {**WORDS, "pub": [" "]}}, {}, r"method\.label_words\.pub: ' ' is empty"),
        ({}, REF, r"method\.objective: label_loss .*data\.target must be made of the label"),
        ({"objective": "loss"}, REF, r"method\.label_words: the answers have no labels"),
        ({"survivors": 6}, {}, r"method\.survivors 6 leaves no place"),
        ({"proposers": [{"name": "template"}]}, {}, r"proposers\[0\]\.name: unknown value 'template'; did you mean"),
        ({"proposers": [{"name": "lm", "request": "again"}]}, {}, r"has no \{instruction\}"),
        ({"proposers": [{"name": "lm", "heat": 1}]}, {}, r"method\.proposers.*heat"),
        ({"share_demonstrations": True, "demonstrations": 0}, {}, r"method\.share_demonstrations"),
        ({}, {"mode": "local"}, "mode local: prompt_search searches over all clients"),
        ({}, {"data": {"label": None}, "evaluation": {"metrics": ["loss"]}}, "label_loss needs data.label"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    tmp_path: Path, texts: Path, method: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    raw = search(texts, **changes)
    raw["method"] |= method
    with pytest.raises((UserError, RefusedError), match=message) as error:
        made(tmp_path / "run", raw)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_the_options_of_proposers_survive_yaml_and_load_without_torch(tmp_path: Path, texts: Path) -> None:
    import subprocess
    import sys

    config = settings(tmp_path, search(texts))
    path = tmp_path / "start.yaml"
    path.write_text(config.to_yaml())
    again: Config = load(str(path), [])
    assert again == config
    assert again.method.proposers[1].max_tokens == 4
    program = (
        f"import sys\nfrom fedhpc import config\nconfig.load({str(path)!r}, [])\nsys.exit('torch' in sys.modules)\n"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
