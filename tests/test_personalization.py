"""Partial personalisation and fine-tuning: against one client at a time by hand, on ranks, resumed; the summary."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedhpc import config as configuration
from fedhpc.approaches.averaging.approach import Averaging
from fedhpc.approaches.describe import describe
from fedhpc.approaches.prepare import prepare
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import over_clients
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.results.results_file import Results
from fedhpc.training import client_state
from fedhpc.training.block import Work
from fedhpc.updates.layout import Layout, Split
from tests import tiny
from tests.federations import Interrupted, federate, final, save_random_bert, settings, table, tree, write_texts

LORA = {"name": "lora", "rank": 2}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def personal(texts: Path, **changes: Any) -> dict[str, Any]:
    """LoRA whose A is shared and whose B stays on the client; some clients are never sampled, some drop out."""
    raw = tree(
        texts,
        model={"dtype": "float64"},
        method=None,
        federation={"rounds": 3, "cohort_size": 4, "dropout": 0.2},
        client={"lr": 2.0},
        evaluation={"client_fraction": 0.2},
        personalization={"parts": ["*lora_B*"], "finetune_steps": 2},
    )
    raw["method"] = LORA
    for section, value in changes.items():
        raw[section] = {**raw.get(section, {}), **value}
    return raw


def prepared(config: Config) -> Averaging:
    return prepare(config, LoopbackTransport(), Launch(), False)


def by_hand(config: Config, task: Averaging) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]]]:
    """The final shared tensors, and those of every client sampled: one client at a time."""
    names = list(task.method.payload.shapes)
    initial = task.method.payload.views(task.initial_payload())
    shared = {n: initial[n].clone() for n in names if "lora_B" not in n}
    own: dict[int, dict[str, torch.Tensor]] = {}
    for t in range(1, config.federation.rounds + 1):
        arrived, counts = [], []
        for client in task.plan(t).training:
            mine = own.get(client, {n: initial[n] for n in names if "lora_B" in n})
            start = task.method.payload.flatten({**shared, **mine})[None]
            work = Work(client, task.data.population.indices(client))
            trained = tiny.train(
                task.base, task.method, task.objective, start, [work], task.data.train, config, t, task.rounds
            )
            after = task.method.payload.views((start - trained.updates)[0])
            own[client] = {n: after[n] for n in mine}
            arrived.append({n: after[n] for n in shared})
            counts.append(len(work.indices))
        share = np.array(counts) / sum(counts)
        shared = {n: sum(w * a[n] for w, a in zip(share.tolist(), arrived, strict=True)) for n in shared}
    return shared, own


def test_a_run_is_the_formula(tmp_path: Path, texts: Path) -> None:
    config = settings(tmp_path, personal(texts))
    federate(config, ranks=3)
    task = prepared(config)
    initial = {n: t.numpy() for n, t in task.method.payload.views(task.initial_payload()).items()}
    shared, own = by_hand(config, task)
    found = final(tmp_path)
    assert set(found) == set(initial)
    for name, tensor in found.items():
        if "lora_B" in name:  # that of a client never sampled
            np.testing.assert_array_equal(tensor, initial[name])
        else:
            assert np.linalg.norm(shared[name].numpy() - initial[name]) > 1e-3
            np.testing.assert_allclose(tensor, shared[name].numpy(), rtol=0, atol=1e-12)
    assert 0 < len(own) < 8
    for client, mine in own.items():
        assert min(float(tensor.norm()) for tensor in mine.values()) > 1e-3
        (file,) = (tmp_path / "clients" / str(client)).iterdir()
        state = client_state.load(tmp_path, client, int(file.stem))
        assert set(state) == {f"personal.{name}" for name in mine}  # by name and shape
        for name, tensor in mine.items():
            np.testing.assert_allclose(state[f"personal.{name}"], tensor, rtol=0, atol=1e-12)

    # Each client from the final state with its own part, tuned by hand, on its held-out data.
    rows = table(tmp_path, "client_eval")
    assert rows["client_id"].tolist() == list(range(8))
    start = {n: torch.from_numpy(t) for n, t in found.items()}
    tuning = settings(tmp_path, personal(texts, client={"steps": 2, "epochs": None}))
    for client in range(8):
        alone = task.method.payload.flatten({**start, **own.get(client, {})})[None]
        work = Work(client, task.data.population.indices(client))
        trained = tiny.train(task.base, task.method, task.objective, alone, [work], task.data.train, tuning, 4, 4)
        assert trained.steps.tolist() == [2]
        for column, payload in (
            ("loss", task.method.payload.flatten(start)[None]),
            ("loss_personal", alone - trained.updates),
        ):
            held_out = [task.data.population.held_out(client)]
            held = task.evaluator(LoopbackTransport()).by_client(
                task.method, payload, task.data.train, [client], held_out
            )
            assert held is not None
            assert rows[column][client] == pytest.approx(held["loss"][0], rel=1e-10)
    assert (np.abs(rows["loss_personal"] - rows["loss"]) > 1e-3).all()


def test_texts_of_clients_are_measured_too(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The data of the run, and so its fingerprint, are those of a run without."""
    raw = personal(texts)
    raw["evaluation"] = {**raw["evaluation"], "metrics": ["loss"], "test_metrics": ["macro_f1", "rouge_l"]}
    raw["data"] = {**raw["data"], "target": " {label}"}
    config = settings(tmp_path / "run", raw)
    federate(config, ranks=2)
    rows = table(tmp_path / "run", "client_eval")
    out = capsys.readouterr().out
    for name in ("macro_f1", "macro_f1_personal", "rouge_l", "rouge_l_personal"):
        assert ((rows[f"{name}_low"] <= rows[name]) & (rows[name] <= rows[f"{name}_high"])).any(), name
        assert f"clients' {name.replace('_', ' ')}: mean {rows[name].mean():.4f}" in out
    results = Results.read(tmp_path / "run" / "results.h5")
    assert "rouge_l_personal/worst_10_percent" in results.groups["client_summary"]
    described = results.image(complete=True)
    assert b"high end of the 95 % interval of the macro_f1 with the client's own part" in described
    raw["evaluation"]["test_metrics"] = ["loss"]
    assert prepared(config).data.fingerprint == prepared(settings(tmp_path / "other", raw)).data.fingerprint


def test_only_the_shared_part_travels(tmp_path: Path, texts: Path) -> None:
    config = settings(tmp_path, personal(texts))
    task = prepared(config)
    assert task.split.shared.size + task.split.personal.size == task.method.payload.size
    each = 8 * sum(int(np.prod(s)) for n, s in task.method.payload.shapes.items() if "lora_B" not in n)
    federate(config, ranks=2)
    rounds = table(tmp_path, "rounds")
    assert (rounds["bytes_down"][1:] == 4 * each).all()
    assert (rounds["bytes_up"] == each * rounds["completed"]).all()
    text = "\n".join(describe(task, LoopbackTransport()))
    assert f"{task.split.personal.size:,} of them personal" in text
    assert f"bytes per round: {4 * each:,} down" in text
    # On the wire too: a whole payload would exceed the bound that the shared part keeps.
    whole = [tmp_path / "whole", personal(texts, personalization={"parts": []})]
    federate(settings(whole[0], whole[1]), ranks=2)
    assert rounds["wire_bytes"][1:].max() < 0.75 * table(whole[0], "rounds")["wire_bytes"][1:].min()


def same(one: Path, other: Path) -> None:
    for pair in ((final(one), final(other)), *((table(p, g) for p in (one, other)) for g in ("client_eval", "test"))):
        first, second = pair
        assert list(first) == list(second)
        for name in first:
            np.testing.assert_array_equal(first[name], second[name], err_msg=name)


def test_the_same_bits_on_ranks_and_resumed(tmp_path: Path, texts: Path) -> None:
    raw = personal(texts, checkpoint={"every": 2}, runtime={"block_size": 2})
    whole = federate(settings(tmp_path / "1", raw))
    federate(settings(tmp_path / "3", raw), ranks=3)
    same(tmp_path / "1", tmp_path / "3")
    config = settings(tmp_path / "stopped", raw)
    for share, ranks in ((0.4, 3), (0.5, 1)):
        with pytest.raises(Interrupted):
            federate(config, ranks, stop_at=int(share * whole))
    federate(config, ranks=2)
    same(tmp_path / "1", tmp_path / "stopped")


def test_a_run_that_an_older_version_began_goes_on(tmp_path: Path, texts: Path) -> None:
    """Its clients' files have the personal part as one flat tensor without names."""
    raw = personal(texts, federation={"rounds": 3})
    federate(settings(tmp_path / "new", raw))
    config = settings(tmp_path / "old", personal(texts, federation={"rounds": 2}))
    federate(config)
    layout = prepared(config).split.personal
    for file in (tmp_path / "old" / "clients").rglob("*.safetensors"):
        client, version = int(file.parent.name), int(file.stem)
        kept = client_state.load(tmp_path / "old", client, version)
        flat = layout.flatten({name: kept[f"personal.{name}"] for name in layout.shapes})
        client_state.save(tmp_path / "old", client, version, {"personal": flat})
    federate(settings(tmp_path / "old", raw))
    same(tmp_path / "new", tmp_path / "old")


def test_a_head_that_stays_at_home(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With accuracy per client, and what the run says at its end."""
    save_random_bert(tmp_path / "bert")
    raw = personal(texts, model={"name": str(tmp_path / "bert"), "task": "classification"})
    raw["data"] = {**raw["data"], "prompt": "{mr}", "max_length": 48}
    raw["evaluation"] = {**raw["evaluation"], "metrics": ["loss", "accuracy"]}
    raw["personalization"] = {"parts": ["classifier.*"]}
    config = settings(tmp_path / "run", raw)
    federate(config, ranks=2)
    assert set(prepared(config).split.personal.shapes) == {"classifier.weight", "classifier.bias"}
    rows = table(tmp_path / "run", "client_eval")
    trained = sorted({int(folder.name) for folder in (tmp_path / "run" / "clients").iterdir()})
    other = [c for c in range(8) if c not in trained]
    assert trained and other
    assert (rows["loss_personal"][trained] != rows["loss"][trained]).all()
    np.testing.assert_allclose(rows["loss_personal"][other], rows["loss"][other], rtol=1e-9)  # the initial part
    measured = ("loss", "accuracy", "loss_personal", "accuracy_personal")
    ends = {f"{name}_{end}" for name in measured for end in ("low", "high")}
    assert set(rows) == {"client_id", "num_examples", "tokens", *measured, *ends}
    for name in measured:
        assert not (rows[f"{name}_low"] > rows[name]).any() and not (rows[name] > rows[f"{name}_high"]).any()
    correct = rows["accuracy"] * rows["num_examples"]
    np.testing.assert_allclose(correct, np.rint(correct), atol=1e-12)
    out = capsys.readouterr().out
    summary = Results.read(tmp_path / "run" / "results.h5").groups["client_summary"]
    assert f"clients' loss personal: mean {rows['loss_personal'].mean():.4f}, worst 10 %" in out
    assert float(summary["accuracy_personal/mean"]) == pytest.approx(rows["accuracy_personal"].mean())
    assert "with the initial personal part" in out


def test_the_summary_over_clients() -> None:
    rng = np.random.default_rng(0)
    examples = np.arange(26) % 13  # two clients have none
    columns = {
        "client_id": np.arange(26), "num_examples": examples, "tokens": examples,
        "loss": np.where(examples > 0, rng.normal(size=26), np.nan), "accuracy_personal": rng.random(26),
    }  # fmt: skip
    found = over_clients(columns, ["accuracy"])
    counted = {name: np.sort(columns[name][examples > 0]) for name in ("loss", "accuracy_personal")}
    assert len(counted["loss"]) == 24
    assert found == pytest.approx(
        {
            "loss/mean": counted["loss"].mean(),
            "loss/worst_10_percent": counted["loss"][-3:].mean(),
            "loss/std": counted["loss"].std(),
            "accuracy_personal/mean": counted["accuracy_personal"].mean(),
            "accuracy_personal/worst_10_percent": counted["accuracy_personal"][:3].mean(),
            "accuracy_personal/std": counted["accuracy_personal"].std(),
        }
    )
    one = over_clients({"num_examples": np.array([2, 1]), "loss": np.array([1.0, 3.0])}, [])
    assert one == {"loss/mean": 2.0, "loss/worst_10_percent": 3.0, "loss/std": 1.0}
    diverged = over_clients({"num_examples": np.array([2, 1]), "loss": np.array([1.0, np.nan])}, [])
    assert all(np.isnan(value) for value in diverged.values())


def test_split() -> None:
    whole = Layout({"a": (2,), "b": (1, 2), "c": ()})
    split = Split(whole, Layout({"b": (1, 2)}))
    shared, own = split.apart(torch.arange(5.0))
    assert (shared.tolist(), own.tolist()) == ([0, 1, 4], [2, 3])
    assert split.join(shared, own).tolist() == [0, 1, 2, 3, 4]
    assert split.join(shared[None], torch.stack([own, -own])).tolist() == [[0, 1, 2, 3, 4], [0, 1, -2, -3, 4]]


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({"mode": "local"}, "mode local has none"),
        ({"mode": "centralized"}, "mode centralized has none"),
        ({"evaluation": {"client_fraction": 0.0}}, "evaluation.client_fraction"),
        ({"client": {"scaffold": True}}, "client.scaffold .* give one"),
        ({"client": {"optimizer": "adamw", "moments": "both"}}, "client.moments .* give one"),
        ({"personalization": {"parts": [""]}}, "personalization.parts.0: must not be empty"),
        ({"personalization": {"finetune_steps": -1}}, "personalization.finetune_steps"),
    ],
)
def test_settings_that_contradict(texts: Path, changes: dict[str, Any], wanted: str) -> None:
    raw = personal(texts)
    for key, value in changes.items():
        raw[key] = {**raw[key], **value} if isinstance(value, dict) else value
    with pytest.raises(UserError, match=wanted) as error:
        configuration.resolve(raw)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("parts", "method", "wanted"),
    [
        (["*lora_C*"], LORA, "no tensor .* matches '\\*lora_C\\*'; it has: model.layers"),
        (["*lora_A*", "*lora_B*"], LORA, "nothing would be exchanged: use mode local"),
        (["*lora_B*"], {**LORA, "aggregation": "exact"}, "trains other parameters than it exchanges"),
        (["*lora_D*"], {**LORA, "aggregation": "stack"}, "no tensor"),
    ],
)
def test_parts_that_do_not_fit(tmp_path: Path, texts: Path, parts: list[str], method: Any, wanted: str) -> None:
    raw = personal(texts, personalization={"parts": parts})
    raw["method"] = method
    with pytest.raises(RefusedError, match=wanted) as error:
        prepared(settings(tmp_path, raw))
    assert "\n" not in str(error.value)


def test_parts_of_what_is_not_trained_as_it_is_exchanged(tmp_path: Path, texts: Path) -> None:
    save_random_bert(tmp_path / "bert")
    raw = personal(texts, model={"name": str(tmp_path / "bert"), "task": "classification"})
    raw["data"] = {**raw["data"], "prompt": "{mr}", "max_length": 48}
    raw["method"] = {"name": "prefix", "exchange": "materialised", "hidden_size": 4, "num_virtual_tokens": 2}
    raw["personalization"] = {"parts": ["classifier.*"]}
    with pytest.raises(RefusedError, match="trains other parameters than it exchanges"):
        prepared(settings(tmp_path / "run", raw))
