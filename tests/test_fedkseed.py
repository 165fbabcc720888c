"""FedKSeed: against a plain loop in torch, on any number of ranks, and what it sends."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from fedhpc.rng import generator, normals
from fedhpc.training.schedule import batches, learning_rate
from tests import tiny
from tests.federations import (
    Interrupted,
    federate,
    final,
    save_random_bert,
    save_random_t5,
    settings,
    table,
    tree,
    write_texts,
)
from tests.test_block import SIZES, relative, start_of, works
from tests.test_block import settings as client_settings
from tests.test_federation import same_results
from tests.test_methods import make

K = 32


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    save_random_bert(folder / "bert")
    save_random_t5(folder / "t5")
    return folder


def loss_of(model: Any, family: str, data: Any, chosen: np.ndarray) -> float:
    """The mean loss of the examples `chosen`, one after another."""
    losses = []
    for i in chosen:
        ids = torch.from_numpy(data.tokens(int(i)).astype(np.int64))[None]
        if family in tiny.ENCODERS:
            losses.append(-model(input_ids=ids).logits.log_softmax(-1)[0, data.labels[i]][None])
        elif family in tiny.SEQ2SEQ:
            prompt = int(data.prompt_lengths[i])
            logits = model(input_ids=ids[:, :prompt], labels=ids[:, prompt:]).logits[0].log_softmax(-1)
            losses.append(-logits.gather(1, ids[0, prompt:, None])[:, 0])
        else:
            logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
            scores = logits.gather(1, ids[0, 1:, None])[:, 0]
            losses.append(-scores[int(data.prompt_lengths[i]) - 1 :])
    return float(torch.cat(losses).mean())


def by_hand(base: Any, method: Any, data: Any, work: Any, config: Any, c: np.ndarray) -> np.ndarray:
    """c (K,) after the client's steps: every loss at weights made anew from W_0 and c."""
    model, o, c = copy.deepcopy(base.model), config.client, c.copy()
    own = dict(base.model.named_parameters())
    z = [{name: part.numpy() for name, part in method.direction(k)} for k in range(len(c))]

    @torch.no_grad()
    def loss(at: np.ndarray, chosen: np.ndarray) -> float:
        for name, p in model.named_parameters():
            moved = sum(at[k] * z[k][name] for k in range(len(at)))
            p.copy_(own[name] + torch.from_numpy(np.asarray(moved)))
        return loss_of(model, base.name, data, chosen)

    steps = batches(len(work.indices), o, 0, 1, work.client_id)
    for s, picked in enumerate(steps):
        k = generator(0, "direction", 1, work.client_id, s).integers(len(c))
        away = np.eye(len(c))[k] * method.options.eps
        slope = loss(c + away, work.indices[picked]) - loss(c - away, work.indices[picked])
        slope /= 2 * method.options.eps
        if o.clip_norm is not None:
            slope *= min(1.0, o.clip_norm / (abs(slope) + 1e-6))
        c[k] -= learning_rate(o, s / len(steps)) * slope
    return c


@pytest.mark.parametrize(
    ("family", "client"),
    [
        ("llama", {"lr": 1e-3}),
        ("gpt2", {"lr": 1e-2, "clip_norm": 0.5, "schedule": "linear", "epochs": 2}),
        ("bert", {"lr": 1e-3}),
        ("t5", {"lr": 1e-3}),
    ],
)
def test_a_client_trains_as_a_plain_loop_does(family: str, client: dict[str, Any]) -> None:
    base, config = tiny.base(family), client_settings(optimizer="sgd", **client)
    data = tiny.labelled() if family == "bert" else tiny.examples()
    method = make("fedkseed", base, num_seeds=K)
    c = 1e-3 * np.random.default_rng(0).standard_normal(K)
    work = works(1)[0]
    found = (
        c
        - tiny.train(base, method, tiny.objective(base), torch.from_numpy(c)[None], [work], data, config, 1, 1)
        .updates[0]
        .numpy()
    )
    wanted = by_hand(base, method, data, work, config, c)
    assert relative(*(torch.from_numpy(x) for x in (found, wanted, c))) < 1e-9


def test_the_directions_are_normal_and_their_own() -> None:
    one, other = (normals(key, 100_001, torch.float64, torch.device("cpu")).numpy() for key in (2**60 + 7, 2**61 + 5))
    for z in (one, other):
        assert len(z) == 100_001
        assert abs(z.mean()) < 0.015
        assert abs(z.var() - 1) < 0.02
        assert abs((z**4).mean() - 3) < 0.15
        assert abs((np.abs(z) > 1.959964).mean() - 0.05) < 0.004
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.015
    assert abs(np.corrcoef(one[:50_000], one[50_001:])[0, 1]) < 0.02  # both come of the same draws
    method = make("fedkseed", tiny.base("llama"), num_seeds=K)
    again = make("fedkseed", tiny.base("llama"), num_seeds=K)
    first, same, second = (torch.cat([z.flatten() for _, z in m.direction(k)]) for m, k in
                           ((method, 0), (again, 0), (method, 1)))  # fmt: skip
    assert torch.equal(first, same)
    assert abs(float(torch.corrcoef(torch.stack([first, second]))[0, 1])) < 0.03


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_history_leaks_into_a_client(dtype: torch.dtype) -> None:
    """To the last bit: after other clients from other starts as in a fresh process."""
    base, data, config = tiny.base("llama", dtype), tiny.examples(), client_settings(optimizer="sgd", lr=1e-3)
    start = 1e-3 * torch.randn(1, K, dtype=dtype, generator=torch.Generator().manual_seed(0))
    one, other = works(2)

    def update(method: Any, work: Any, scale: float = 1.0) -> torch.Tensor:
        return tiny.train(base, method, tiny.objective(base), scale * start, [work], data, config, 1, 1).updates

    used = make("fedkseed", base, num_seeds=K)
    fresh = update(make("fedkseed", base, num_seeds=K), one)
    for work, scale in ((other, 1.0), (other, 2.0), (one, 1.0)):
        update(used, work, scale)
    assert fresh.any()
    assert torch.equal(update(used, one), fresh)


def test_the_loss_falls() -> None:
    """Every step sees all examples of the client, so its first and its last loss are of the same ones."""
    base, data = tiny.base("llama", torch.float32, scale=1.0), tiny.examples()
    method = make("fedkseed", base, num_seeds=512)
    config = client_settings(optimizer="sgd", lr=3e-3, steps=150, batch_size=SIZES[0])
    trained = tiny.train(
        base, method, tiny.objective(base), start_of(method, torch.float32), works(1), data, config, 1, 1
    )
    assert trained.loss_first[0] - trained.loss_last[0] > 0.1


def test_a_run_sends_less_than_20_kb(tmp_path: Path, texts: Path) -> None:
    changes = {"method": {"name": "fedkseed"}, "client": {"lr": 1e-4}, "federation": {"rounds": 2}}
    config = settings(tmp_path, {**tree(texts, **changes), "method": changes["method"]} | {"model": {
        "name": str(texts / "model"), "dtype": "float32"}})  # fmt: skip
    federate(config)
    found = table(tmp_path, "rounds")
    trained = found["round"] > 0
    assert trained.sum() == 2
    for column in ("bytes_up", "bytes_down"):
        each = found[column][trained] / found["completed"][trained]
        assert (each == 4 * 4096).all() and (each < 20_000).all()
    assert np.count_nonzero(final(tmp_path)["coefficients"]) > 10


@pytest.mark.parametrize("model", ["model", *(pytest.param(m, marks=pytest.mark.slow) for m in ("bert", "t5"))])
def test_any_number_of_ranks_stopped_and_resumed_gives_the_same_bits(tmp_path: Path, texts: Path, model: str) -> None:
    raw = tree(
        texts,
        model={"name": str(texts / model), "dtype": "float32"},
        data={"prompt": "{mr}", "max_length": 48} if model != "model" else {},
        federation={"rounds": 3},
        client={"lr": 1e-4},
    )
    raw["method"] = {"name": "fedkseed", "num_seeds": K}
    collectives = {
        1: federate(settings(tmp_path / "one", raw)),
        3: federate(settings(tmp_path / "three", raw), ranks=3),
    }
    assert np.abs(final(tmp_path / "one")["coefficients"]).max() > 0
    same_results(tmp_path / "one", tmp_path / "three")
    for ranks, other, share in ((3, 2, 0.5), (1, 3, 0.7))[: 2 if model == "model" else 1]:
        where = tmp_path / f"{ranks}-{other}"
        with pytest.raises(Interrupted):
            federate(settings(where, raw), ranks, stop_at=int(share * collectives[ranks]))
        federate(settings(where, raw), other)
        same_results(tmp_path / "one", where, ("rounds", "clients"))
        assert "resumed" in table(where, "events")["kind"]


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_the_export_is_a_model_with_the_moved_weights(family: str, tmp_path: Path) -> None:
    base = tiny.base(family)
    base.tokenizer.save_pretrained = lambda path: None
    method = make("fedkseed", base, num_seeds=K)
    c = 1e-2 * torch.randn(K, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    method.export({"coefficients": c}, tmp_path)
    loaded = dict(tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).named_parameters())
    directions = [dict(method.direction(k)) for k in range(K)]
    for name, p in base.model.named_parameters():
        z = torch.stack([z[name] for z in directions])
        torch.testing.assert_close(loaded[name].detach(), p + torch.tensordot(c, z, 1), rtol=1e-9, atol=1e-12)
