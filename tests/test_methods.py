"""Every method that PEFT has too: trained in blocks as PEFT's own modules are by torch.optim, and its export."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from fedhpc import registry
from fedhpc.errors import UserError
from fedhpc.methods.base import Method
from fedhpc.training.block import train_block
from fedhpc.training.local import batches
from tests import tiny
from tests.test_block import relative, settings, start_of, works

OPTIONS: dict[str, dict[str, Any]] = {
    "prefix": {"num_virtual_tokens": 5, "init_text": "some words"},
    "lora": {"rank": 3, "alpha": 6.0},
    "ia3": {},
    "prompt": {"num_virtual_tokens": 5, "init_text": "some words"},
    "p_tuning": {"num_virtual_tokens": 5, "hidden_size": 24},
}
FULL: dict[str, dict[str, Any]] = {
    "all": {},
    "bias": {"parameters": "bias"},
    "last": {"last_layers": 1},
    "last-bias": {"last_layers": 1, "parameters": "bias"},
}
FAMILIES = sorted(tiny.FAMILIES)


def make(name: str, base: Any, **options: Any) -> Method:
    chosen = registry.options("methods", name)(**{**OPTIONS.get(name, {}), **options})
    method: Method = registry.load("methods", name).METHOD(chosen, base, 0)
    return method


def warm(method: Method, dtype: torch.dtype) -> torch.Tensor:
    """A start away from LoRA's B = 0, where half of the gradients vanish."""
    start = start_of(method, dtype)
    return start + 0.1 * torch.randn(start.shape, dtype=dtype, generator=torch.Generator().manual_seed(3))


def in_peft(name: str, base: Any, method: Method) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """PEFT's own model, and its trained parameters under our names."""
    o, conv = method.options, base.name == "gpt2"
    soft = {
        "num_virtual_tokens": 5,
        "num_layers": base.num_layers,
        "num_attention_heads": base.num_kv_heads,
        "token_dim": base.num_kv_heads * base.head_dim if name == "prefix" else 32,
    }
    configs = {
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", **soft),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", **soft),
        "p_tuning": lambda: peft.PromptEncoderConfig(task_type="CAUSAL_LM", encoder_hidden_size=o.hidden_size, **soft),
        "lora": lambda: peft.LoraConfig(
            task_type="CAUSAL_LM", r=o.rank, lora_alpha=o.alpha, target_modules=method._targets, fan_in_fan_out=conv
        ),
        "ia3": lambda: peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=[n for part in method._names for n in part],
            feedforward_modules=method._names[1],
            fan_in_fan_out=conv,
        ),
    }
    model = peft.get_peft_model(copy.deepcopy(base.model), configs[name]()).to(base.dtype)
    found = {}
    for path, parameter in model.named_parameters():
        ours = path.removeprefix("base_model.model.").removeprefix("prompt_encoder.default.").replace(".default", "")
        if name in ("prefix", "prompt") and ours == "embedding.weight":
            ours = "prompt_embeddings"
        found[ours] = parameter
    return model, {n: found[n] for n in method.payload.shapes}


def trained_by_torch(
    model: Any, named: dict[str, Any], method: Method, data: Any, config: Any, work: Any, virtual: int = 0
) -> torch.Tensor:
    """The parameters `named` of `model` after the client's batches under torch.optim: (P,)."""
    c = config.client
    rule: Any = (
        torch.optim.SGD(named.values(), lr=c.lr)
        if c.optimizer == "sgd"
        else torch.optim.AdamW(named.values(), lr=c.lr, weight_decay=0.0)
    )
    for picked in batches(len(work.indices), c, 0, 1, work.client_id):
        chosen = work.indices[picked]
        rows = [torch.from_numpy(data.tokens(int(i)).astype(np.int64)) for i in chosen]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]
        prompt = torch.from_numpy(data.prompt_lengths[chosen].astype(np.int64))
        supervised = (torch.arange(ids.shape[1]) >= prompt[:, None]) & mask
        logits = model(input_ids=ids, attention_mask=mask.long()).logits[:, virtual:]
        losses = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        rule.zero_grad()
        losses[supervised[:, 1:].flatten()].mean().backward()
        rule.step()
    return method.payload.flatten({n: p.detach() for n, p in named.items()})


@pytest.mark.parametrize("client", [{"optimizer": "sgd", "lr": 0.2}, {"optimizer": "adamw", "lr": 0.02}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "ia3", "prompt", "p_tuning"])
def test_a_client_trains_as_peft_and_torch_optim_do(name: str, family: str, client: dict[str, Any]) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(**client)
    method = make(name, base)
    start, work = warm(method, torch.float64), works(1)[0]
    found = start[0] - train_block(base, method, start, [work], data, config, 1, 1).updates[0]

    model, named = in_peft(name, base, method)
    with torch.no_grad():
        for key, value in method.payload.views(start[0]).items():
            named[key].copy_(value)
    virtual = 0 if name in ("lora", "ia3") else 5  # soft prompts lengthen PEFT's logits
    wanted = trained_by_torch(model, named, method, data, config, work, virtual)
    assert relative(found, wanted, start[0]) < 1e-9


@pytest.mark.parametrize("count", [2, 5])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["lora", "ia3", "prompt", "p_tuning"])
def test_a_block_equals_its_clients_alone(name: str, family: str, count: int) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method = make(name, base)
    start, group = warm(method, torch.float64), works(count)
    together = train_block(base, method, start, group, data, config, 1, 1)
    for i, work in enumerate(group):
        alone = train_block(base, method, start, [work], data, config, 1, 1).updates[0]
        assert float((together.updates[i] - alone).norm() / alone.norm()) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_the_export_loads_in_peft_and_gives_the_same_logits(name: str, family: str, tmp_path: Path) -> None:
    from fedhpc.training.forward import hidden_states

    base = tiny.base(family)
    method = make(name, base)
    start = warm(method, torch.float64)
    method.export(method.payload.views(start[0]), tmp_path)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9))
    plain = base.model(input_ids=ids).logits
    views = method.payload.views(start)
    with torch.no_grad(), method.attach(views, views, torch.zeros(2, dtype=torch.int64)) as attached:
        ours = base.logits(hidden_states(base, attached, ids))
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).double()
    theirs = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -9:]
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours, plain)
    torch.testing.assert_close(base.model(input_ids=ids).logits, plain)  # nothing stays attached


@pytest.mark.parametrize(("name", "options"), [("lora", {"targets": ["nope"]}), ("ia3", {"inputs": ["nope"]})])
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"no linear layer named nope; it has: .*q_proj"):
        make(name, tiny.base("llama"), **options).payload  # noqa: B018


# ---------------------------------------------------------------- full, and a part of it

# Of the two layers of the tiny models, and what stands outside them: a tied output layer is an embedding.
TRAINED = {
    ("gpt2", "last"): r"transformer\.(h\.1\.|ln_f)",
    ("llama", "last"): r"model\.(layers\.1\.|norm)",
    ("qwen2", "last"): r"model\.(layers\.1\.|norm)|lm_head",
    ("opt", "last"): r"model\.decoder\.(layers\.1\.|final_layer_norm)",
    ("gpt_neox", "last"): r"gpt_neox\.(layers\.1\.|final_layer_norm)|embed_out|lm_head",
    ("gpt2", "bias"): r".*\.bias$",
    ("gpt2", "last-bias"): r"transformer\.(h\.1\.|ln_f).*bias$",
    ("qwen2", "bias"): r".*[qkv]_proj\.bias$",
    ("llama", "all"): "",
}


@pytest.mark.parametrize(("family", "part"), TRAINED)
def test_full_trains_what_its_options_say_as_torch_optim_does(family: str, part: str) -> None:
    base, data = tiny.base(family), tiny.examples()
    method = make("full", base, **FULL[part])
    model = copy.deepcopy(base.model)
    chosen = {n: p.requires_grad_() for n, p in model.named_parameters() if re.match(TRAINED[family, part], n)}
    assert list(method.payload.shapes) == list(chosen)
    config = settings(optimizer="sgd", lr=0.05, clip_norm=None)
    start, work = start_of(method, torch.float64), works(1)[0]
    found = start[0] - train_block(base, method, start, [work], data, config, 1, 1).updates[0]
    assert relative(found, trained_by_torch(model, chosen, method, data, config, work), start[0]) < 1e-9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameters": "bias"}, r"method\.parameters: 'llama' \(llama\) has no bias terms"),
        ({"last_layers": 3}, r"method\.last_layers: 3, but 'llama' has 2 layers"),
    ],
)
def test_a_part_that_is_not_there_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make("full", tiny.base("llama"), **options).payload  # noqa: B018
