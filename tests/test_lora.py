"""LoRA in blocks against PEFT's own layers trained by torch.optim, and its export."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from fedhpc import registry
from fedhpc.errors import UserError
from fedhpc.methods.base import Method
from fedhpc.training.block import train_block
from fedhpc.training.local import batches
from tests import tiny
from tests.test_block import relative, settings, start_of, works

TARGETS = {"llama": ["q_proj", "k_proj", "v_proj", "o_proj"], "gpt2": ["c_attn", "c_proj"]}


def make(base: Any, **options: Any) -> Method:
    method: Method = registry.load("methods", "lora").METHOD(
        registry.options("methods", "lora")(**{"rank": 3, "alpha": 6.0, **options}), base, 0
    )
    return method


def warm(method: Method, dtype: torch.dtype) -> torch.Tensor:
    """A start away from B = 0, where half of the gradients vanish."""
    start = start_of(method, dtype)
    return start + 0.1 * torch.randn(start.shape, dtype=dtype, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("client", [{"optimizer": "sgd", "lr": 0.5}, {"optimizer": "adamw", "lr": 0.02}])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_client_trains_as_peft_and_torch_optim_do(family: str, client: dict[str, Any]) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(**client)
    method = make(base, targets=TARGETS[family])
    start, work = warm(method, torch.float64), works(1)[0]
    found = start[0] - train_block(base, method, start, [work], data, config, 1, 1).updates[0]

    model = get_peft_model(
        copy.deepcopy(base.model),
        LoraConfig(
            r=3, lora_alpha=6, target_modules=TARGETS[family], task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"
        ),
    ).double()
    named = {n.replace(".default", "").removeprefix("base_model.model."): p for n, p in model.named_parameters()}
    for name, value in method.payload.views(start[0]).items():
        with torch.no_grad():
            named[name].copy_(value)
    trained = [named[name] for name in method.payload.shapes]
    c = config.client
    rule: Any = (
        torch.optim.SGD(trained, lr=c.lr)
        if c.optimizer == "sgd"
        else torch.optim.AdamW(trained, lr=c.lr, weight_decay=0.0)
    )
    for picked in batches(len(work.indices), c, 0, 1, work.client_id):
        chosen = work.indices[picked]
        rows = [torch.from_numpy(data.tokens(int(i)).astype(np.int64)) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        prompt = torch.from_numpy(data.prompt_lengths[chosen].astype(np.int64))
        supervised = (torch.arange(ids.shape[1]) >= prompt[:, None]) & mask
        logits = model(input_ids=ids, attention_mask=mask.long()).logits
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        rule.zero_grad()
        losses[supervised[:, 1:].flatten()].mean().backward()
        rule.step()
    wanted = method.payload.flatten({n: named[n].detach() for n in method.payload.shapes})
    assert relative(found, wanted, start[0]) < 1e-9


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_block_equals_its_clients_alone(family: str, count: int) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method = make(base)
    start, group = warm(method, torch.float64), works(count)
    together = train_block(base, method, start, group, data, config, 1, 1)
    for i, work in enumerate(group):
        alone = train_block(base, method, start, [work], data, config, 1, 1).updates[0]
        assert float((together.updates[i] - alone).norm() / alone.norm()) < 1e-9


@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox", "opt", "qwen2", "qwen3"])
def test_the_export_loads_in_peft_and_gives_the_same_logits(family: str, tmp_path: Path) -> None:
    base = tiny.base(family)
    method = make(base)
    start = warm(method, torch.float64)
    method.export(method.payload.views(start[0]), tmp_path)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9))
    plain = base.model(input_ids=ids).logits
    views = method.payload.views(start)
    with torch.no_grad(), method.attach(views, views, torch.zeros(2, dtype=torch.int64)):
        ours = base.model(input_ids=ids).logits
    loaded = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).double()
    torch.testing.assert_close(loaded(input_ids=ids).logits, ours)
    assert not torch.allclose(ours, plain)
    torch.testing.assert_close(base.model(input_ids=ids).logits, plain)  # nothing stays attached


def test_a_target_that_is_not_there_is_refused_with_those_that_are() -> None:
    with pytest.raises(UserError, match=r"no layer named nope; it has: .*q_proj"):
        make(tiny.base("llama"), targets=["nope"]).payload  # noqa: B018
