"""Distillation from end to end: against the formulas by hand, on ranks, resumed, with different models."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhpc import config as configuration
from fedhpc.approaches.describe import describe
from fedhpc.approaches.distillation import approach, learner
from fedhpc.approaches.distillation.approach import Distillation
from fedhpc.approaches.distillation.ensemble import mean
from fedhpc.approaches.distillation.knowledge import Knowledge, position_offsets, predict
from fedhpc.approaches.distillation.learner import LearnerGroup, group_of
from fedhpc.approaches.prepare import prepare
from fedhpc.errors import UserError
from fedhpc.objectives.soft_targets import SoftTargets
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.results.checkpoint import load_checkpoint
from fedhpc.rng import torch_seed
from fedhpc.training import client_state
from fedhpc.training.block import Work
from tests import tiny
from tests.federations import (
    Interrupted,
    federate,
    final,
    items_of,
    save_random_bert,
    save_random_llama,
    settings,
    table,
    tree,
    write_texts,
)
from tests.ranks import Ranks, run_ranks

LORA = {"name": "lora", "rank": 2}
PREFIX = {"name": "prefix", "num_virtual_tokens": 2}


@pytest.fixture(autouse=True)
def _one_model_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads here, and transformers does not load models in two threads at once."""
    lock, load = threading.Lock(), learner.load_base

    def locked(*args: Any) -> Any:
        with lock:
            return load(*args)

    monkeypatch.setattr(learner, "load_base", locked)


def save_words_llama(folder: Path) -> None:
    """A smaller random Llama in float64 whose tokens are whole words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from fedhpc.builtin.world import rows

    texts = [row[column] for row in rows("dining", "train")[:90] for column in ("mr", "ref")]
    words = sorted({word for text in texts for word in text.split()} | {":"})
    vocabulary = {word: i for i, word in enumerate(["<s>", "</s>", "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(1)
    shape = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(shape).double().save_pretrained(folder)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts and three models: model/, other/ with the same tokens written in another file, words/ with its own."""
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    save_random_llama(folder / "other")
    config = json.loads((folder / "other" / "tokenizer_config.json").read_text())
    (folder / "other" / "tokenizer_config.json").write_text(json.dumps({**config, "model_max_length": 100}))
    save_words_llama(folder / "words")
    return folder


def distilled(texts: Path, **changes: Any) -> dict[str, Any]:
    """Two rounds of two groups: LoRA of the server's base, a prefix of another one."""
    raw = tree(texts)
    raw["model"]["dtype"] = "float64"
    raw["method"] = {
        "name": "distillation",
        "student": LORA,
        "groups": [{"method": LORA, "share": 2.0}, {"model": str(texts / "other"), "method": PREFIX}],
        "public": {"max_examples": 6},
        "top_k": 5,
        "distil": {"lr": 50.0},
    }
    raw["federation"] = {"rounds": 2, "cohort_size": 5}
    raw["client"]["lr"] = 2.0
    raw["evaluation"] |= {"max_examples": 4}
    for section, value in changes.items():
        raw[section] = {**raw.get(section, {}), **value} if isinstance(value, dict) else value
    return raw


def prepared(config: configuration.Config) -> Distillation:
    approach = prepare(config, LoopbackTransport(), Launch(), False)
    assert isinstance(approach, Distillation)
    return approach


# ---------------------------------------------------------------- the rounds


def opinion(model: Any, payload: torch.Tensor, k: int) -> Knowledge:
    classes = len(model.base.tokenizer)
    (known,) = predict(model.base, model.method, model.objective, payload, model.public, classes, k, 1.0, 32, "float32")
    assert known is not None
    return known


def by_hand(config: configuration.Config, approach: Distillation) -> tuple[torch.Tensor, dict[int, torch.Tensor]]:
    """The student, and what every client keeps: one client at a time, with plain sgd as in `distilled`."""
    options, population = config.method, approach.data.population
    draws = torch_seed(config.run.seed, "public set")

    def learn(model: Any, payload: torch.Tensor, client: int, known: Knowledge, lr: float, t: int) -> torch.Tensor:
        offsets = position_offsets(model.objective, model.public)
        taught = SoftTargets(model.objective, known.index, known.probability, offsets, 1.0, 0.0)
        changed = {
            "run": config.run.model_copy(update={"seed": draws}),
            "client": config.client.model_copy(update={"lr": lr, "steps": None, "epochs": 1}),
        }
        work = [Work(client, np.arange(len(model.public)))]
        trained = tiny.train(
            model.base, model.method, taught, payload, work, model.public, config.model_copy(update=changed), t, 2
        )
        return payload - trained.updates

    student, own, down = approach.student.initial[None], dict[int, torch.Tensor](), None
    for t in range(1, config.federation.rounds + 1):
        clients = list(approach.plan(t).cohort)
        said = []
        for client in clients:
            group = approach.groups[group_of([2.0, 1.0], config.run.seed, client)]
            payload = own.get(client, group.initial[None])
            if down is not None:
                payload = learn(group, payload, client, down, config.client.lr, t)
            work = [Work(client, population.indices(client))]
            payload = (
                payload
                - tiny.train(
                    group.base, group.method, group.objective, payload, work, approach.data.train, config, t, 2
                ).updates
            )
            own[client] = payload
            said.append(opinion(group, payload, options.top_k))
        together = Knowledge(np.stack([s.index for s in said]), np.stack([s.probability for s in said]))
        down = mean(together, np.array([population.num_examples(c) for c in clients]), options.top_k)
        student = learn(approach.student, student, population.num_clients, down, options.distil.lr, t)
    return student, {client: payload[0] for client, payload in own.items()}


def test_a_run_is_the_algorithm_by_hand_on_any_number_of_ranks(tmp_path: Path, texts: Path) -> None:
    config = settings(tmp_path / "1", distilled(texts))
    federate(config)
    approach = prepared(config)
    assert {group_of([2.0, 1.0], 0, c) for c in range(8)} == {0, 1}
    student, own = by_hand(config, approach)
    views = approach.student.method.payload.views(student[0])
    initial = approach.student.method.payload.views(approach.student.initial)
    found = final(tmp_path / "1")
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, views[name].numpy(), rtol=0, atol=1e-6)
    assert max(np.abs(tensor - initial[name].numpy()).max() for name, tensor in found.items()) > 1e-2
    for client, payload in own.items():
        (file,) = (tmp_path / "1" / "clients" / str(client)).iterdir()
        kept = client_state.load(tmp_path / "1", client, int(file.stem))
        assert list(kept) == ["theta"]
        np.testing.assert_allclose(kept["theta"], payload, rtol=0, atol=1e-6)

    comparison = table(tmp_path / "1", "tables/comparison")
    assert comparison["model"].tolist() == ["student", "ensemble", "alone", "base"]
    assert np.isfinite(comparison["loss"]).all() and len(set(comparison["loss"])) == 4
    assert comparison["loss"][0] == table(tmp_path / "1", "test")["loss"]
    assert items_of(tmp_path / "1") == dict.fromkeys(("test/loss", "base/loss"), f"{len(approach.data.test)} examples")
    rounds = table(tmp_path / "1", "rounds")
    positions = position_offsets(approach.objective, approach.student.public)[-1]
    assert rounds["bytes_up"].tolist() == [0, *[5 * positions * 20] * 2]  # five classes of 2 + 2 bytes
    assert rounds["bytes_down"].tolist() == [0, 0, 5 * positions * 20]
    described = "\n".join(describe(approach, LoopbackTransport()))
    classes = len(approach.base.tokenizer)
    assert f"6 examples, {positions:,} positions, 5 of {classes:,} classes each: 20 bytes a position" in described
    for ranks in (2, 3, 4):
        federate(settings(tmp_path / str(ranks), distilled(texts)), ranks)
        same(tmp_path / "1", tmp_path / str(ranks))


TIMES = {"seconds", "seconds_broadcast", "seconds_local", "seconds_reduce", "seconds_server", "seconds_eval"}
OF_RANKS = {"wire_bytes", "peak_memory_bytes", "worker"}


def same(one: Path, other: Path) -> None:
    """The same results to the bit."""
    for name, tensor in final(one).items():
        np.testing.assert_array_equal(tensor, final(other)[name])
    for part in ("rounds", "clients", "tables/comparison", "test"):
        columns, others = table(one, part), table(other, part)
        for name in columns.keys() - TIMES - OF_RANKS:
            np.testing.assert_array_equal(columns[name], others[name], err_msg=f"{part}/{name}")


def test_stopped_anywhere_and_resumed(tmp_path: Path, texts: Path) -> None:
    raw = distilled(texts, federation={"rounds": 3, "cohort_size": 4, "dropout": 0.3})
    whole = federate(settings(tmp_path / "whole", raw), ranks=2)
    config = settings(tmp_path / "stopped", raw)
    for share, ranks in ((0.15, 2), (0.4, 3), (0.1, 1), (0.2, 2)):
        with pytest.raises(Interrupted):
            federate(config, ranks, stop_at=int(share * whole))
    federate(config, ranks=3)
    same(tmp_path / "whole", tmp_path / "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("down", ["server", "none"])
def test_what_goes_down(tmp_path: Path, texts: Path, down: str) -> None:
    """The student's own knowledge (FedMKT), or nothing; the ensemble's is in the run by hand."""
    method = {**distilled(texts)["method"], "down": down, "alone": False}
    config = settings(tmp_path / "run", distilled(texts, method=method, federation={"rounds": 2, "cohort_size": 8}))
    federate(config, ranks=2)
    rounds = table(tmp_path / "run", "rounds")
    assert (rounds["bytes_down"][2] > 0) == (down == "server") and rounds["bytes_down"][1] == 0
    assert table(tmp_path / "run", "tables/comparison")["model"].tolist() == ["student", "ensemble", "base"]
    # After the first round the clients are what they are anyhow; after the second they have learnt from another one.
    federate(settings(tmp_path / "ensemble", distilled(texts, federation={"rounds": 2, "cohort_size": 8})))
    columns = [table(tmp_path / name, "clients")["loss_first"] for name in ("run", "ensemble")]
    np.testing.assert_array_equal(*(column[:8] for column in columns))
    assert (columns[0][8:] != columns[1][8:]).any()


def test_with_what_the_student_knows_the_clients_learn_from_it(tmp_path: Path, texts: Path) -> None:
    method = {**distilled(texts)["method"], "down": "server"}
    config = settings(tmp_path, distilled(texts, method=method, federation={"rounds": 1, "cohort_size": 4}))
    federate(config)
    approach = prepared(config)
    state = approach.initial_state()
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    state.load(loaded[0])
    assert state.knowledge is not None
    expected = opinion(approach.student, state.theta[None], 5)
    np.testing.assert_array_equal(state.knowledge.index, expected.index)
    np.testing.assert_array_equal(state.knowledge.probability, expected.probability)


def test_confidence_and_uniform_weights(tmp_path: Path, texts: Path) -> None:
    """By the formula from what the clients kept after one round, in which nothing had come down."""
    method = {**distilled(texts)["method"], "aggregation": "entropy", "groups": [], "alone": False}
    raw = distilled(texts, method=method, federation={"rounds": 1, "cohort_size": 3}, server={"weighting": "uniform"})
    config = settings(tmp_path, raw)
    federate(config, ranks=2)
    approach = prepared(config)
    group, total, whole = approach.groups[0], 0.0, 0.0
    for client in approach.plan(1).cohort:
        theta = client_state.load(tmp_path, client, 1)["theta"][None]
        classes = len(group.base.tokenizer)
        about = (group.public, classes, 5, 1.0, 32, "float32")
        (known,) = predict(group.base, group.method, group.objective, theta, *about, confident=True)
        assert known is not None and known.confidence is not None
        p = np.zeros((len(known), classes))
        np.put_along_axis(p, known.index, known.probability.astype(np.float64), 1)
        weight = np.rint(known.confidence.astype(np.float64) * 2**14)
        total, whole = total + weight[:, None] * p, whole + weight[:, None]
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    expected = total / whole
    order = np.argsort(-expected, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(loaded[0]["knowledge.index"], order)
    of_order = np.take_along_axis(expected, order, 1).astype(np.float16)
    np.testing.assert_array_equal(loaded[0]["knowledge.probability"], of_order)


# ---------------------------------------------------------------- other tokens, other models


def test_models_with_tokens_of_their_own_teach_each_other(tmp_path: Path, texts: Path) -> None:
    groups = [{"method": LORA}, {"model": str(texts / "words"), "method": LORA}]
    method = {**distilled(texts)["method"], "groups": groups, "align": "edit_distance", "alone": False}
    raw = distilled(texts, method=method)
    for ranks in (1, 3):
        federate(settings(tmp_path / str(ranks), raw), ranks)
    same(tmp_path / "1", tmp_path / "3")
    comparison = table(tmp_path / "1", "tables/comparison")
    losses = dict(zip(comparison["model"], comparison["loss"], strict=True))
    assert np.isnan(losses["ensemble"]) and losses["student"] != losses["base"]  # no token that all have
    group = prepared(settings(tmp_path / "1", raw)).groups[1]
    assert isinstance(group, LearnerGroup) and group.aligned
    assert 0.05 < group.upwards.share < 1 and 0.05 < group.downwards.share < 1


def test_other_tokens_without_an_alignment_are_refused(tmp_path: Path, texts: Path) -> None:
    groups = [{"method": LORA}, {"model": str(texts / "words"), "method": LORA}]
    config = settings(tmp_path, distilled(texts, method={**distilled(texts)["method"], "groups": groups}))
    with pytest.raises(RefusedError, match=r"groups\[1\]\.model: '.*words' has other tokens than .*edit_distance"):
        prepare(config, LoopbackTransport(), Launch(), False)


@pytest.mark.parametrize("learner_", ["student", "group"])
def test_a_method_that_does_not_fit_its_base_is_refused(tmp_path: Path, texts: Path, learner_: str) -> None:
    long = {"name": "prefix", "num_virtual_tokens": 300}
    changed = {"student": long} if learner_ == "student" else {"groups": [{"method": long}]}
    config = settings(tmp_path, distilled(texts, method={**distilled(texts)["method"], **changed}))
    with pytest.raises(RefusedError, match="256 tokens and 300 virtual ones exceed the 512 positions"):
        prepare(config, LoopbackTransport(), Launch(), False)


@pytest.fixture(scope="module")
def encoders(texts: Path) -> Path:
    save_random_bert(texts / "bert")
    save_random_bert(texts / "small")
    return texts


def test_classifiers_need_no_alignment(tmp_path: Path, encoders: Path) -> None:
    """Whatever their tokens, they choose between the same labels."""
    tokenizer = json.loads((encoders / "small" / "tokenizer.json").read_text())
    last = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    del tokenizer["model"]["vocab"][last]
    (encoders / "small" / "tokenizer.json").write_text(json.dumps(tokenizer))
    raw = distilled(encoders)
    raw["model"]["name"] = str(encoders / "bert")
    raw["data"] |= {"prompt": "{mr}", "label": "label", "max_length": 60}
    raw["method"]["groups"] = [{"method": LORA}, {"model": str(encoders / "small"), "method": LORA}]
    raw["method"]["top_k"] = None
    raw["evaluation"]["metrics"] = ["loss", "accuracy"]
    for ranks in (1, 2):
        federate(settings(tmp_path / str(ranks), raw), ranks)
    same(tmp_path / "1", tmp_path / "2")
    comparison = table(tmp_path / "1", "tables/comparison")
    assert np.isfinite(comparison["loss"]).all()
    assert ((comparison["accuracy"] >= 0) & (comparison["accuracy"] <= 1)).all()
    labels = prepared(settings(tmp_path / "1", raw)).base.model.config.num_labels
    assert table(tmp_path / "1", "rounds")["bytes_up"][1] == 5 * 6 * labels * 2  # no class numbers

    raw["method"]["groups"][1]["model"] = str(encoders / "model")
    with pytest.raises(RefusedError, match="causal_lm and the server's model as classification"):
        prepare(settings(tmp_path / "x", raw), LoopbackTransport(), Launch(), False)


# ---------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize(
    ("value", "reason"), [(np.nan, "its parameters are not"), (1e200, "its predictions on the public")]
)
def test_a_client_that_says_nothing_finite_is_rejected(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, value: float, reason: str
) -> None:
    train = approach.train_block

    def spoilt(base: Any, method: Any, objective: Any, payloads: Any, works: Any, *rest: Any) -> Any:
        trained = train(base, method, objective, payloads, works, *rest)
        for i, work in enumerate(works):
            if work.client_id == bad:
                trained.updates[i] = value
        return trained

    raw = distilled(texts, federation={"rounds": 2, "cohort_size": 8})
    bad = next(c for c in range(8) if group_of([2.0, 1.0], 0, c) == 0)
    monkeypatch.setattr(approach, "train_block", spoilt)
    federate(settings(tmp_path, raw), ranks=2)
    rows = table(tmp_path, "clients")
    assert [c for c, s in zip(rows["client_id"], rows["status"], strict=True) if s == 2] == [bad, bad]
    messages = table(tmp_path, "events")["message"].tolist()
    assert [m for m in messages if m.startswith(f"client {bad}: {reason}")] == [m for m in messages if "client" in m]
    assert not (tmp_path / "clients" / str(bad)).exists()
    assert np.isfinite(table(tmp_path, "tables/comparison")["loss"]).all()


def test_a_student_that_diverges_ends_the_run_in_one_line(tmp_path: Path, texts: Path) -> None:
    method = {**distilled(texts)["method"], "distil": {"lr": 1e300, "epochs": 3}}
    with pytest.raises(UserError, match=r"diverged in round 1.*lower method\.distil\.lr"):
        federate(settings(tmp_path, distilled(texts, method=method)))


def public_sets(texts: Path) -> Iterator[tuple[dict[str, Any], str]]:
    lines = [json.loads(line) for line in (texts / "train.jsonl").read_text().splitlines()[:4]]
    (texts / "empty.jsonl").write_text("")
    (texts / "short.jsonl").write_text(json.dumps({"mr": "x", "label": lines[0]["label"]}) + "\n")
    yield {"split": "empty.jsonl"}, r"empty\.jsonl: the split has no rows"
    yield {"split": "short.jsonl"}, r"short\.jsonl:1: data\.target names the column 'ref', which is not there"
    yield {"split": "nowhere"}, r"method\.public\.split: .* has no split or file 'nowhere'; it has: .*train"
    yield {"split": "train"}, r"method\.public: 90 of its 90 rows are in train too"
    yield {"split": "validation"}, r"method\.public: 10 of its 10 rows are in validation too"
    yield {"max_examples": 90}, r"method\.public\.max_examples: 90 of 90 training rows leave none"
    yield {"where": {"label": ["nobody"]}}, "none of 90 rows passes"
    yield {"where": {"colour": ["red"]}}, r"method\.public\.where names the column 'colour'"
    yield {"source": str(texts / "missing.jsonl")}, "there is no file or folder"


def test_a_public_set_that_cannot_be_used(tmp_path: Path, texts: Path) -> None:
    for public, message in public_sets(texts):
        method = {**distilled(texts)["method"], "public": public, "groups": []}
        config = settings(tmp_path, distilled(texts, method=method))
        with pytest.raises(RefusedError, match=message) as caught:
            prepare(config, LoopbackTransport(), Launch(), False)
        assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_public_set_and_the_private_data_have_no_row_in_common(tmp_path: Path, texts: Path) -> None:
    taken = prepared(settings(tmp_path, distilled(texts))).data
    assert taken.public is not None and (len(taken.public), len(taken.train)) == (6, 84)
    labels = sorted({json.loads(line)["label"] for line in (texts / "train.jsonl").read_text().splitlines()})
    raw = distilled(texts)
    raw["data"]["where_not"] = {"label": labels[:1]}
    raw["method"]["public"] = {"where": {"label": labels[:1]}, "max_examples": 4}
    apart = prepared(settings(tmp_path, raw)).data
    assert apart.public is not None and apart.public.labels is not None and apart.train.labels is not None
    assert len(apart.public) == 4 and set(apart.public.labels) == {0} and 0 not in apart.train.labels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "local"}, "mode local has no ensemble to distil"),
        ({"method": {"student": {"name": "distillation"}}}, "method.student: distillation trains no model of its own"),
        ({"method": {"student": {"name": "fedkseed"}}}, "method.student: fedkseed sends seeds to save bytes"),
        ({"method": {"student": {"name": "lorra"}}}, "method.student.name: unknown value 'lorra'; did you mean 'lora'"),
        ({"method": {"groups": [{"methd": {}}]}}, r"unknown key 'method.groups\[0\].methd'; did you mean 'method'"),
        ({"method": {"groups": [7]}}, r"method.groups\[0\] must be a mapping"),
        ({"method": {"public": {"max_examples": 0}}}, "method.public.max_examples: must be greater than or equal to 1"),
    ],
)
def test_what_does_not_go_together_is_said_before_anything_is_loaded(
    tmp_path: Path, texts: Path, changes: dict[str, Any], message: str
) -> None:
    raw = distilled(texts)
    for section, value in changes.items():
        raw[section] = {**raw.get(section, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        settings(tmp_path, raw)


def test_clients_are_in_groups_by_their_shares() -> None:
    for seed in (0, 1, 7):
        of = np.array([group_of([3.0, 1.0], seed, client) for client in range(1000)])
        for start in range(0, 1000, 100):
            assert abs((of[start : start + 100] == 0).sum() - 75) <= 2
        assert group_of([1.0], seed, 5) == 0


# ---------------------------------------------------------------- processes


@pytest.mark.slow
def test_killed_and_the_same_command_again(tmp_path: Path, texts: Path) -> None:
    raw = distilled(texts, federation={"rounds": 6, "cohort_size": 5}, client={"steps": 6})
    federate(settings(tmp_path / "whole", raw))
    config = settings(tmp_path / "killed", raw)
    path = tmp_path / "run.yaml"
    path.write_text(config.to_yaml())
    command = ["-m", "fedhpc.main", str(path)]
    with Ranks(3, command, "forked") as running:
        running.wait_for("round 3/6")
        running.rank_processes()[1].send_signal(signal.SIGKILL)
        running.wait(60)
    assert [result.code for result in run_ranks(3, command, "forked")] == [0, 0, 0]
    same(tmp_path / "whole", tmp_path / "killed")
