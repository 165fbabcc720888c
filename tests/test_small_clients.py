"""Clients with fewer rows than a batch, and rounds that nobody completes: what they train, weigh and leave alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pytest
import torch
from transformers import AutoModelForCausalLM

from fedhpc.approaches.prepare import prepare
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.results.checkpoint import load_checkpoint
from tests.federations import Interrupted, federate, final, settings, table, tree, write_texts

SIZES = {"a": 1, "b": 1, "c": 2, "d": 9, "e": 40}
HELD_OUT = [0, 0, 1, 4, 20]  # of evaluation.client_fraction 0.5, and never a single row


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five owners with 1, 1, 2, 9 and 40 rows."""
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    lines = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    owners = [name for name, count in SIZES.items() for _ in range(count)]
    rows = [{**line, "client": owner, "use": str(owner in "ae")} for line, owner in zip(lines, owners, strict=False)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for split in ("validation", "test"):
        rest = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({**row, "use": "True"}) + "\n" for row in rest))
    return folder


def small(texts: Path, **changes: Any) -> dict[str, Any]:
    raw = tree(
        texts,
        federation={"rounds": 1, "cohort_size": 5},
        client={"optimizer": "sgd", "lr": 0.1, "batch_size": 8, "steps": None, "epochs": 2},
    ) | {"partition": {"name": "natural"}}
    for section, value in changes.items():
        raw[section] = {**raw.get(section, {}), **value} if isinstance(value, dict) else value
    return raw


@pytest.mark.parametrize("mode", ["federated", "local", "centralized"])
def test_clients_with_fewer_rows_than_a_batch(tmp_path: Path, texts: Path, mode: str) -> None:
    config = settings(tmp_path, small(texts, mode=mode, evaluation={"client_fraction": 0.5}))
    federate(config)
    clients = pandas.DataFrame(table(tmp_path, "clients")).sort_values("client_id")
    left = [size - out for size, out in zip(SIZES.values(), HELD_OUT, strict=True)]
    if mode == "centralized":
        assert list(clients["num_examples"]) == [27] and list(clients["steps"]) == [8]
    elif mode == "federated":
        assert list(clients["num_examples"]) == left
        assert list(clients["steps"]) == [2 * -(-rows // 8) for rows in left] == [2, 2, 2, 2, 6]
    else:
        assert set(clients["num_examples"]) == set(left)
    assert np.isfinite(clients["loss_first"]).all() and np.isfinite(clients["loss_last"]).all()
    assert all(np.isfinite(values).all() for values in final(tmp_path).values())


def test_a_client_of_one_row_takes_plain_steps(tmp_path: Path, texts: Path) -> None:
    """Its update is that of two steps of torch's SGD on the row; the shares of the mean are rows."""
    raw = small(texts, method={"name": "full"}, model={"dtype": "float64"})
    del raw["method"]["num_virtual_tokens"]
    task = prepare(settings(tmp_path, raw), LoopbackTransport(), Launch(), False)
    plan, examples = task.plan(1), task.data.train
    (row,) = task.data.population.indices(0)
    result = task.local(plan, [0], task.download(LoopbackTransport(), task.initial_state(), plan))
    assert result.steps.tolist() == [2]
    model = AutoModelForCausalLM.from_pretrained(texts / "model", dtype=torch.float64)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids, front = torch.tensor(examples.tokens(row))[None].long(), int(examples.prompt_lengths[row])
    for _ in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(input_ids=ids).logits[0, front - 1 : -1], ids[0, front:]).backward()
        optimizer.step()
    updates = task.method.payload.views(result.upload.updates[0].double())
    for name, p in model.named_parameters():
        if name in updates:
            torch.testing.assert_close(updates[name], before[name] - p.detach(), rtol=1e-9, atol=1e-12)
    assert max(float(update.abs().max()) for update in updates.values()) > 1e-3
    shares = task._shares(plan)
    assert {c: float(share) for c, share in zip(plan.cohort, shares / shares.sum(), strict=True)} == pytest.approx(
        {c: size / 53 for c, size in enumerate(SIZES.values())}
    )


@pytest.mark.parametrize(
    "server", [{"optimizer": "adam", "lr": 0.05}, {"aggregator": "median"}, {"aggregator": "fednova"}]
)
def test_rounds_that_nobody_completes(tmp_path: Path, texts: Path, server: dict[str, Any]) -> None:
    """They change neither parameters nor moments, have an event and no loss; resumed in between, the same bits."""
    raw = small(texts, federation={"rounds": 8, "cohort_size": 2, "dropout": 0.85}, server=server)
    seen: dict[int, dict[str, np.ndarray]] = {}

    def keep(round_: int) -> None:
        loaded = load_checkpoint(tmp_path / "run")
        if loaded is not None:
            seen[round_] = {name: tensor.copy() for name, tensor in loaded[0].items() if not name.startswith("rows/")}

    federate(settings(tmp_path / "run", raw), on_round=keep)
    rounds = table(tmp_path / "run", "rounds")
    void = [t for t in range(1, 9) if rounds["completed"][t] == 0]
    assert 2 <= len(void) < 8, "rounds of both sorts"
    for t in void:
        assert np.isnan(rounds["train_loss"][t]) and rounds["update_norm"][t] == 0
        for name, tensor in seen[t].items():
            assert tensor.tobytes() == seen[t - 1][name].tobytes(), name
    events = table(tmp_path / "run", "events")
    assert list(events["round"][events["kind"] == "void"]) == void
    assert all(np.isfinite(values).all() for values in final(tmp_path / "run").values())
    with pytest.raises(Interrupted):
        federate(settings(tmp_path / "again", raw), stop_at=20)
    federate(settings(tmp_path / "again", raw))
    for name, values in final(tmp_path / "run").items():
        assert values.tobytes() == final(tmp_path / "again")[name].tobytes()


def test_owners_without_rows_are_rejected(tmp_path: Path, texts: Path) -> None:
    raw = small(texts, data={"where": {"use": ["True"]}}, federation={"rounds": 3, "cohort_size": 2})
    federate(settings(tmp_path, raw))
    clients = pandas.DataFrame(table(tmp_path, "clients"))
    empty = clients["client_id"].isin([1, 2, 3])
    assert empty.any() and (clients["status"] == np.where(empty, 2, 0)).all()
    rounds = table(tmp_path, "rounds")
    assert [int(n) for n in rounds["rejected"][1:]] == [int(empty[clients["round"] == t].sum()) for t in (1, 2, 3)]
    assert all(np.isfinite(values).all() for values in final(tmp_path).values())
