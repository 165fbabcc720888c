"""LoRA's dropout and its federated variants, each against its formula."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fedhpc.methods.lora import Lora
from fedhpc.rng import bits, torch_seed
from fedhpc.training.block import train_block
from fedhpc.training.local import batches
from tests import tiny
from tests.test_block import relative, settings, works
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
        for key, value in method.payload.views(start[0]).items():
            named[key].copy_(value)
    adapted = [m for m in model.modules() if hasattr(m, "lora_dropout")]
    assert len(adapted) == len(method.payload.shapes) // 2
    dropouts = [Injected() for _ in adapted]
    for module, dropout in zip(adapted, dropouts, strict=True):
        module.lora_dropout["default"] = dropout
    c = config.client
    rule: Any = (
        torch.optim.SGD(named.values(), lr=c.lr)
        if c.optimizer == "sgd"
        else torch.optim.AdamW(named.values(), lr=c.lr, weight_decay=0.0)
    )
    key = torch.tensor(torch_seed(0, "noise", 1, work.client_id))
    for s, picked in enumerate(batches(len(work.indices), c, 0, 1, work.client_id)):
        chosen = work.indices[picked]
        rows = [torch.from_numpy(data.tokens(int(i)).astype(np.int64)) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        real = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        prompt = torch.from_numpy(data.prompt_lengths[chosen].astype(np.int64))
        supervised = (torch.arange(ids.shape[1]) >= prompt[:, None]) & real
        of_rows = bits(key, torch.arange(len(rows)) + (s << 32))
        for number, dropout in enumerate(dropouts):
            dropout.mask = method.kept(bits(of_rows, torch.tensor(number)), ids.shape[1], 32).double() / 0.7
        logits = model(input_ids=ids, attention_mask=real.long()).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        rule.zero_grad()
        losses[supervised[:, 1:].flatten()].mean().backward()
        rule.step()
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
