"""Every method that PEFT has too: trained in blocks as PEFT's own modules are by torch.optim, and its export."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf

from fedhpc import registry
from fedhpc.errors import UserError
from fedhpc.methods._architectures import ARCHITECTURES
from fedhpc.methods._linear import ends_with, features
from fedhpc.methods.adapter import load
from fedhpc.methods.base import Method
from fedhpc.models.load import layer_stacks
from fedhpc.training.schedule import batches
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
    method: Method = registry.choice("methods", name)(chosen, base, 0)
    return method


def warm(method: Method, dtype: torch.dtype) -> torch.Tensor:
    """A start away from LoRA's B = 0, where half of the gradients vanish."""
    start = start_of(method, dtype)
    return start + 0.1 * torch.randn(start.shape, dtype=dtype, generator=torch.Generator().manual_seed(3))


def in_peft(name: str, base: Any, method: Any) -> tuple[Any, dict[str, torch.nn.Parameter]]:
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
            task_type="CAUSAL_LM", r=o.rank, lora_alpha=o.alpha, target_modules=method.targets, fan_in_fan_out=conv
        ),
        "ia3": lambda: peft.IA3Config(
            task_type="CAUSAL_LM",
            target_modules=[*method.outputs, *method.inputs],
            feedforward_modules=method.inputs,
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
    model: Any,
    named: dict[str, Any],
    method: Method,
    data: Any,
    config: Any,
    work: Any,
    virtual: int = 0,
    rule: Any = None,
    round_: int = 1,
) -> torch.Tensor:
    """The parameters `named` of `model` after the client's batches under torch.optim, or `rule`: (P,)."""
    c = config.client
    rule = rule or (
        torch.optim.SGD(named.values(), lr=c.lr)
        if c.optimizer == "sgd"
        else torch.optim.AdamW(named.values(), lr=c.lr, weight_decay=0.0)
    )
    for picked in batches(len(work.indices), c, 0, round_, work.client_id):
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
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]

    model, named = in_peft(name, base, method)
    with torch.no_grad():
        for key, value in method.payload.views(start[0]).items():
            named[key].copy_(value)
    virtual = 0 if name in ("lora", "ia3") else 5  # soft prompts lengthen PEFT's logits
    wanted = trained_by_torch(model, named, method, data, config, work, virtual)
    assert relative(found, wanted, start[0]) < 1e-9


@pytest.mark.parametrize(("family", "count"), [("llama", 2), ("llama", 5), ("gpt2", 5), ("opt", 3)])
@pytest.mark.parametrize("name", ["lora", "ia3", "prompt", "p_tuning", "adapter"])
def test_a_block_equals_its_clients_alone(name: str, family: str, count: int) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method = make(name, base)
    start, group = warm(method, torch.float64), works(count)
    together = tiny.train(base, method, tiny.objective(base), start, group, data, config, 1, 1)
    for i, work in enumerate(group):
        alone = tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
        assert float((together.updates[i] - alone).norm() / alone.norm()) < 1e-9


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_the_export_loads_in_peft_and_gives_the_same_logits(name: str, family: str, tmp_path: Path) -> None:
    base = tiny.base(family)
    method = make(name, base)
    start = warm(method, torch.float64)
    method.export(method.payload.views(start[0]), tmp_path)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9))
    plain = base.model(input_ids=ids).logits
    views = method.payload.views(start)
    batch: Any = SimpleNamespace(ids=ids, row=torch.arange(2).repeat_interleave(9), positions=torch.arange(18))
    with torch.no_grad(), method.attach(views, views, torch.zeros(2, dtype=torch.int64)) as attached:
        ours = base.logits(attached, base.states(attached, batch), batch.row).view(2, 9, -1)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).double()
    theirs = loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, -9:]
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(ours, plain)
    torch.testing.assert_close(base.model(input_ids=ids).logits, plain)  # nothing stays attached


@pytest.mark.parametrize(
    ("name", "options"),
    [("lora", {"targets": ["nope"]}), ("ia3", {"inputs": ["nope"]}), ("adapter", {"feed_forward": ["nope"]})],
)
def test_a_layer_that_is_not_there_is_refused_with_those_that_are(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"no linear layer named nope; it has: .*q_proj"):
        make(name, tiny.base("llama"), **options).payload  # noqa: B018


# ---------------------------------------------------------------- adapters, which PEFT has not

BEHIND = {
    "gpt2": ("transformer.h.{}.attn", "c_proj", "transformer.h.{}.mlp", "c_proj"),
    "llama": ("model.layers.{}.self_attn", "o_proj", "model.layers.{}.mlp", "down_proj"),
}
ACTIVATIONS = {"relu": torch.relu, "tanh": torch.tanh, "gelu": torch.nn.GELU(), "silu": torch.nn.SiLU()}


class Bottleneck(torch.nn.Module):
    """A layer with an adapter behind it, as the paper draws it."""

    def __init__(self, layer: Any, width: int, m: int, activation: str) -> None:
        super().__init__()
        self.layer, self.activation = layer, ACTIVATIONS[activation]
        self.down, self.up = torch.nn.Linear(width, m).double(), torch.nn.Linear(m, width).double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.layer(x)
        return h + self.up(self.activation(self.down(h)))


def with_bottlenecks(base: Any, options: Any) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """A copy of the base with wrapped layers, and the adapters' parameters under our names."""
    model, named = copy.deepcopy(base.model), {}
    attention, attention_layer, feed_forward, feed_forward_layer = BEHIND[base.name]
    for i in range(base.num_layers):
        both = [(attention.format(i), attention_layer), (feed_forward.format(i), feed_forward_layer)]
        for where, layer in both if options.placement == "houlsby" else both[1:]:
            parent = model.get_submodule(where)
            wrapped = Bottleneck(getattr(parent, layer), 32, options.bottleneck, options.activation)
            setattr(parent, layer, wrapped)
            for part in ("down", "up"):
                for name, p in getattr(wrapped, part).named_parameters():
                    named[f"{where}.{layer}.adapter.{part}.{name}"] = p
    return model, named


@pytest.mark.parametrize("client", [{"optimizer": "sgd", "lr": 0.2}, {"optimizer": "adamw", "lr": 0.02}], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize(
    ("placement", "activation"), [("houlsby", "relu"), ("pfeiffer", "tanh"), ("houlsby", "gelu"), ("pfeiffer", "silu")]
)
def test_adapters_train_as_wrapped_layers_do(
    placement: str, activation: str, family: str, client: dict[str, Any]
) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(**client)
    method = make("adapter", base, placement=placement, activation=activation)
    start, work = warm(method, torch.float64), works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
    model, named = with_bottlenecks(base, method.options)
    assert list(named) == list(method.payload.shapes)
    with torch.no_grad():
        for key, value in method.payload.views(start[0]).items():
            named[key].copy_(value)
    assert relative(found, trained_by_torch(model, named, method, data, config, work), start[0]) < 1e-9


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
@pytest.mark.parametrize("family", FAMILIES)
def test_exported_adapters_load_into_a_plain_model(family: str, placement: str, tmp_path: Path) -> None:
    base = tiny.base(family)
    method = make("adapter", base, placement=placement)
    start = warm(method, torch.float64)
    method.export(method.payload.views(start[0]), tmp_path)
    ids = torch.randint(3, tiny.VOCABULARY, (2, 9))
    plain = base.model(input_ids=ids).logits
    views = method.payload.views(start)
    with torch.no_grad(), method.attach(views, views, torch.zeros(2, dtype=torch.int64)):
        ours = base.model(input_ids=ids).logits
    torch.testing.assert_close(load(copy.deepcopy(base.model), tmp_path)(input_ids=ids).logits, ours)
    assert not torch.allclose(ours, plain)
    torch.testing.assert_close(base.model(input_ids=ids).logits, plain)
    if family == "llama":
        with pytest.raises(UserError, match="belongs to another model"):
            load(tiny.base("gpt2").model, tmp_path)


def test_adapters_begin_near_the_identity() -> None:
    base = tiny.base("llama")
    start = make("adapter", base).initial()
    assert len(start) == 2 * 2 * 4
    for name, tensor in start.items():
        assert float(tensor.abs().max()) <= 0.02
        assert bool(tensor.any()) == name.endswith("weight")
    assert all(torch.equal(t, start[n]) for n, t in make("adapter", base).initial().items())


def test_a_folder_of_peft_is_not_taken_for_adapters(tmp_path: Path) -> None:
    base = tiny.base("llama")
    method = make("lora", base)
    method.export(method.payload.views(start_of(method, torch.float64)[0]), tmp_path)
    with pytest.raises(UserError, match="is not an export of method adapter"):
        load(base.model, tmp_path)


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
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
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


# ---------------------------------------------------------------- names of layers


@pytest.mark.parametrize("model_type", sorted(ARCHITECTURES))
def test_every_architecture_has_the_layers_that_it_is_said_to_have(model_type: str) -> None:
    with torch.device("meta"):
        model = tf.AutoModel.from_config(tf.AutoConfig.for_model(model_type))
    linear = [path for path, module in model.named_modules() if features(module)]
    names = ARCHITECTURES[model_type]
    defaults = [*names.queries_and_values, *names.keys_and_values, *names.attention_output, names.feed_forward_output]
    for name in defaults:
        assert any(ends_with(path, name) for path in linear), name


@pytest.mark.parametrize("family", sorted({*tiny.FAMILIES, *tiny.ENCODERS, *tiny.SEQ2SEQ}))
def test_pfeiffers_adapters_stand_behind_the_feed_forward_alone(family: str) -> None:
    base = tiny.base(family)
    both, one = (make("adapter", base, placement=placement).payload.shapes for placement in ("houlsby", "pfeiffer"))
    layers = sum(len(stack) for stack in layer_stacks(base.model))
    assert len({name.partition(".adapter.")[0] for name in one}) == layers
    assert set(one) < set(both)
    assert not any(re.search("attn|attention", name, re.IGNORECASE) for name in one)
