"""LoRA's dropout and its federated variants, each against its formula."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from fedhpc.methods.lora import Lora
from fedhpc.rng import bits, torch_seed
from fedhpc.training.block import train_block
from fedhpc.training.local import batches
from tests import tiny
from tests.federations import Interrupted, federate, table, tree, write_texts
from tests.federations import settings as run_settings
from tests.test_block import relative, settings, works
from tests.test_federation import same_results
from tests.test_methods import in_peft, make, warm

FAMILIES = ["llama", "gpt2"]  # grouped queries and tied embeddings; Conv1D


def lora(base: Any, **options: Any) -> Lora:
    method = make("lora", base, **options)
    assert isinstance(method, Lora)
    return method


# ---------------------------------------------------------------- dropout


def test_draws_are_those_of_splitmix64() -> None:
    # The first outputs of the generator that begins at 1234567, as its published test vectors have them.
    wanted = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    found = bits(torch.tensor([1234567]), torch.arange(5))
    assert [int(v) % 2**64 for v in found] == wanted


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_share_of_dropped_inputs(p: float) -> None:
    method = lora(tiny.base("llama"), dropout=p)
    keys = bits(torch.tensor(5), torch.arange(40))
    kept = method.kept(keys, 50, 32)
    assert abs(float((~kept).double().mean()) - p) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    # No two rows, positions or features share their draws.
    for dim in range(3):
        same = (kept.movedim(dim, 0)[1:] == kept.movedim(dim, 0)[:-1]).double().mean()
        assert abs(float(same) - (p * p + (1 - p) ** 2)) < 0.02
    # A row's draws do not depend on the others nor on padding.
    assert torch.equal(method.kept(keys[3:5], 20, 32), kept[3:5, :20])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_with_dropout_equals_its_clients_alone(family: str) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method, plain = lora(base, dropout=0.3), lora(base)
    start, group = warm(method, torch.float64), works(5)
    together = train_block(base, method, start, group, data, config, 2, 3).updates
    for i, work in enumerate(group):
        alone = train_block(base, method, start, [work], data, config, 2, 3).updates[0]
        assert float((together[i] - alone).norm() / alone.norm()) < 1e-9
    without = train_block(base, plain, start, group, data, config, 2, 3).updates
    assert float((together - without).norm() / without.norm()) > 1e-2
    another_round = train_block(base, method, start, group, data, config, 3, 3).updates
    assert float((together - another_round).norm() / together.norm()) > 1e-2


def train_in_peft(
    model: Any, named: dict[str, Any], config: Any, data: Any, work: Any, before_step: Callable[[int, int, int], None]
) -> None:
    """PEFT's model trained by torch.optim on the batches of `work`; before_step(step, rows, width) goes first."""
    c = config.client
    rule: Any = (
        torch.optim.SGD(named.values(), lr=c.lr)
        if c.optimizer == "sgd"
        else torch.optim.AdamW(named.values(), lr=c.lr, weight_decay=0.0)
    )
    for s, picked in enumerate(batches(len(work.indices), c, 0, 1, work.client_id)):
        chosen = work.indices[picked]
        rows = [torch.from_numpy(data.tokens(int(i)).astype(np.int64)) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        prompt = torch.from_numpy(data.prompt_lengths[chosen].astype(np.int64))
        supervised = (torch.arange(ids.shape[1]) >= prompt[:, None]) & real
        before_step(s, *ids.shape)
        logits = model(input_ids=ids, attention_mask=real.long()).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        rule.zero_grad()
        losses[supervised[:, 1:].flatten()].mean().backward()
        rule.step()


class Injected(torch.nn.Module):
    """A dropout whose mask is given."""

    mask: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.mask[:, : x.shape[1]]


@pytest.mark.parametrize("client", [{"optimizer": "sgd", "lr": 0.2}, {"optimizer": "adamw", "lr": 0.02}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_with_the_same_masks_peft_trains_alike(family: str, client: dict[str, Any]) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(**client)
    method = lora(base, dropout=0.3)
    start, work = warm(method, torch.float64), works(1)[0]
    found = start[0] - train_block(base, method, start, [work], data, config, 1, 1).updates[0]

    model, named = in_peft("lora", base, method)
    with torch.no_grad():
        for name, value in method.payload.views(start[0]).items():
            named[name].copy_(value)
    adapted = [m for m in model.modules() if hasattr(m, "lora_dropout")]
    assert len(adapted) == len(method.payload.shapes) // 2
    dropouts = [Injected() for _ in adapted]
    for module, dropout in zip(adapted, dropouts, strict=True):
        module.lora_dropout["default"] = dropout
    key = torch.tensor(torch_seed(0, "noise", 1, work.client_id))

    def inject(step: int, rows: int, width: int) -> None:
        of_rows = bits(key, torch.arange(rows) + (step << 32))
        for number, dropout in enumerate(dropouts):
            dropout.mask = method.kept(bits(of_rows, torch.tensor(number)), width, 32).double() / 0.7

    train_in_peft(model, named, config, data, work, inject)
    wanted = method.payload.flatten({n: p.detach() for n, p in named.items()})
    assert relative(found, wanted, start[0]) < 1e-9


def test_evaluation_drops_nothing() -> None:
    base = tiny.base("llama")
    method, plain = lora(base, dropout=0.5), lora(base)
    views = method.payload.views(warm(method, torch.float64))
    ids, rows = torch.randint(3, tiny.VOCABULARY, (2, 9)), torch.zeros(2, dtype=torch.int64)
    logits = []
    for one in (method, plain):
        with torch.no_grad(), one.attach(views, views, rows):
            logits.append(base.model(input_ids=ids).logits)
    assert torch.equal(*logits)


# ---------------------------------------------------------------- ffa


@pytest.mark.parametrize("family", FAMILIES)
def test_with_ffa_b_is_trained_as_by_peft_with_a_frozen(family: str) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method, plain = lora(base, aggregation="ffa"), lora(base)
    drawn = {n: t.double() for n, t in plain.initial().items() if "lora_A" in n}
    assert not set(drawn) & set(method.payload.shapes)
    assert set(drawn) | set(method.payload.shapes) == set(plain.payload.shapes)
    start, group = warm(method, torch.float64), works(3)
    together = train_block(base, method, start, group, data, config, 1, 1).updates
    for i, work in enumerate(group):
        model, named = in_peft("lora", base, plain)
        with torch.no_grad():
            for name, value in {**drawn, **method.payload.views(start[0])}.items():
                named[name].copy_(value)
        train_in_peft(model, {n: named[n] for n in method.payload.shapes}, config, data, work, lambda *_: None)
        wanted = method.payload.flatten({n: named[n].detach() for n in method.payload.shapes})
        assert relative(start[0] - together[i], wanted, start[0]) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
def test_with_ffa_the_mean_of_the_products_is_the_product_of_the_means(family: str, tmp_path: Path) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    weights = np.array([0.5, 0.2, 0.3])

    def difference(method: Lora) -> float:
        """Largest distance between the two, in units of the mean of the products."""
        start = warm(method, torch.float64)
        ends = (start - train_block(base, method, start, works(3), data, config, 1, 1).updates).numpy()
        clients = []
        for end in [*ends, np.average(ends, axis=0, weights=weights)]:
            folder = tmp_path / f"{method.options.aggregation}{len(clients)}"
            method.export(method.payload.views(torch.from_numpy(end)), folder)
            clients.append(products(folder))
        worst = 0.0
        for path in clients[0]:
            mean = sum(w * c[path] for w, c in zip(weights, clients[:-1], strict=True))
            worst = max(worst, float(np.linalg.norm(mean - clients[-1][path]) / np.linalg.norm(mean)))
        return worst

    assert difference(lora(base, aggregation="ffa")) < 1e-12
    assert difference(lora(base)) > 1e-2
    # A is what it was drawn as.
    assert_same(exported(tmp_path / "ffa0", "lora_A"), exported(tmp_path / "ffa3", "lora_A"))
    drawn = {f"base_model.model.{n}": t.numpy() for n, t in lora(base).initial().items() if "lora_A" in n}
    assert_same(exported(tmp_path / "ffa0", "lora_A"), drawn)


def exported(folder: Path, part: str = "") -> dict[str, np.ndarray]:
    """The tensors of an exported adapter whose name has `part` in it."""
    return {name: tensor for name, tensor in load_file(folder / "adapter_model.safetensors").items() if part in name}


def products(folder: Path) -> dict[str, np.ndarray]:
    """Path -> B A, with the scale, of an exported adapter."""
    about = json.loads((folder / "adapter_config.json").read_text())
    tensors = exported(folder)
    scale = about["lora_alpha"] / about["r"]
    return {
        name: scale * tensors[name.replace("lora_A", "lora_B")] @ a for name, a in tensors.items() if "lora_A" in name
    }


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    assert set(one) == set(other)
    for name in one:
        np.testing.assert_array_equal(one[name], other[name])


# ---------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


VARIANTS: dict[str, dict[str, Any]] = {"ffa": {"aggregation": "ffa", "dropout": 0.1}}


def raw_of(texts: Path, variant: str, **changes: Any) -> dict[str, Any]:
    """A small federation of a variant with unequal clients, one of which may drop out."""
    common = {
        "method": {"name": "lora", "rank": 3, "targets": ["q_proj", "down_proj"], **VARIANTS[variant]},
        "client": {"optimizer": "adamw", "lr": 0.05, "steps": None, "epochs": 1},
        "federation": {"rounds": 2, "dropout": 0.2},
    }
    raw = tree(texts, **{**common, **changes})
    raw["method"] = common["method"]
    return raw


@pytest.mark.parametrize("counts", [(3,), pytest.param((2, 4), marks=pytest.mark.slow)], ids=["quick", "many"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_number_of_ranks_does_not_change_a_bit(
    tmp_path: Path, texts: Path, variant: str, counts: tuple[int, ...]
) -> None:
    raw = raw_of(texts, variant)
    federate(run_settings(tmp_path / "1", raw))
    for ranks in counts:
        federate(run_settings(tmp_path / str(ranks), raw), ranks)
        same_results(tmp_path / "1", tmp_path / str(ranks))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_stopped_anywhere_and_resumed_equals_one_that_was_not(tmp_path: Path, texts: Path, variant: str) -> None:
    raw = raw_of(texts, variant, federation={"rounds": 3, "dropout": 0.2})
    whole = federate(run_settings(tmp_path / "whole", raw), ranks=2)
    config = run_settings(tmp_path / "stopped", raw)
    for share, ranks in ((0.45, 2), (0.4, 3)):
        with pytest.raises(Interrupted):
            federate(config, ranks, stop_at=int(share * whole))
    federate(config)
    same_results(tmp_path / "whole", tmp_path / "stopped", ("rounds", "clients"))
    assert set(table(tmp_path / "stopped", "events")["kind"]) == {"resumed"}
