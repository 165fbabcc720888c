"""The written-out forward of the Llama family against transformers' own, and the frozen output layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as tf

from fedhpc.methods.full import Full
from fedhpc.methods.ia3 import IA3
from fedhpc.methods.lora import Lora
from fedhpc.methods.prefix import Prefix
from fedhpc.models import llama
from fedhpc.models.llama import hidden_at, last_hidden, written_out
from fedhpc.models.load import checkpoint_layers
from fedhpc.models.prefix_cache import prefix_cache
from fedhpc.objectives.base import through_frozen_head
from tests import tiny

FAMILIES = ["llama", "qwen2"]


class Exact(torch.nn.Module):
    """RMSNorm without transformers' detour through float32."""

    def __init__(self, norm: Any) -> None:
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.variance_epsilon))


def network(family: str) -> Any:
    model = tiny.base(family).model
    for path, module in list(model.named_modules()):
        if type(module).__name__.endswith("RMSNorm"):
            model.set_submodule(path, Exact(module))
    return model


def inputs_and_prefix(model: Any, n: int) -> tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor]]]:
    noise = torch.Generator().manual_seed(7)
    inputs = torch.randn(3, 11, 32, generator=noise, dtype=torch.float64, requires_grad=True)
    config = model.config
    shape = (2, 3, config.num_key_value_heads, n, config.hidden_size // config.num_attention_heads)
    parts = [torch.randn(shape, generator=noise, dtype=torch.float64) for _ in range(config.num_hidden_layers)]
    return inputs, [tuple(t.requires_grad_() for t in part.unbind(0)) for part in parts] if n else []  # type: ignore[misc]


@pytest.mark.parametrize("some", [False, True])
@pytest.mark.parametrize(("stretch", "scores"), [(64, 2**19), (4, 2**19), (4, 1)])  # 1: one row at a time
@pytest.mark.parametrize("n", [5, 0])
@pytest.mark.parametrize("family", FAMILIES)
def test_states_and_gradients_are_those_of_transformers(
    family: str, n: int, stretch: int, scores: int, some: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "_STRETCH", stretch)
    monkeypatch.setattr(llama, "_SCORES", scores)
    model = network(family)
    inputs, past = inputs_and_prefix(model, n)
    leaves = [inputs, *(t for pair in past for t in pair)]
    wanted = torch.tensor([[7, 8, 9, 10], [2, 3, 4, 5], [5, 0, 3, 10]]) if some else None
    ours = last_hidden(model, inputs, past, wanted)
    cache = prefix_cache(past) if past else None
    theirs = model.base_model(inputs_embeds=inputs, past_key_values=cache, use_cache=bool(past)).last_hidden_state
    if wanted is not None:
        theirs = theirs.gather(1, wanted.unsqueeze(2).expand(-1, -1, theirs.shape[2]))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
    direction = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for found, wanted in zip(
        torch.autograd.grad(ours, leaves, direction), torch.autograd.grad(theirs, leaves, direction), strict=True
    ):
        assert wanted.abs().max() > 1e-3
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("head", [8, 32])  # narrow products go as their transpose
def test_rows_have_the_same_bits_however_many_go_at_once(head: int, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(7, 150, heads * head, generator=noise, requires_grad=True) for heads in (4, 2, 2))
    past = [torch.randn(7, 2, 16, head, generator=noise, requires_grad=True) for _ in range(2)]
    angles = torch.randn(150, head, generator=noise)
    direction = torch.randn(7, 150, 4 * head, generator=noise)
    reached = []
    for scores in (2**30, 2**17, 1):  # all rows, two or so, one
        monkeypatch.setattr(llama, "_SCORES", scores)
        seen = llama._Attention.apply(q, k, v, *past, angles.cos(), angles.sin(), head**-0.5, None)
        reached.append([seen, *torch.autograd.grad(seen, [q, k, v, *past], direction)])
    for other in reached[1:]:
        assert all(map(torch.equal, reached[0], other))


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("most", [0.75, 0.1])
def test_states_are_those_at_the_positions_asked_for(
    everywhere: bool, most: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(llama, "_MOST_WANTED", most)
    model = network("llama")
    inputs, past = inputs_and_prefix(model, 5)
    rows, positions = torch.tensor([0, 0, 0, 2]), torch.tensor([8, 9, 10, 0])  # none of row 1
    with torch.no_grad():
        whole = last_hidden(model, inputs, past)
        found = hidden_at(model, inputs, past, rows, positions, everywhere)
    torch.testing.assert_close(found, whole[rows, positions], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_hooks_on_linear_layers_act(family: str) -> None:
    base = tiny.base(family, torch.float32)
    rows = torch.tensor([0, 1, 1])
    ids = torch.randint(3, tiny.VOCABULARY, (3, 11), generator=torch.Generator().manual_seed(0))
    inputs = base.model.get_input_embeddings()(ids)
    plain = last_hidden(base.model, inputs, ())
    targets = ["q_proj", "o_proj", "up_proj"]
    methods = (Lora(Lora.Options.model_validate({"rank": 2, "targets": targets}), base, 0), IA3(IA3.Options(), base, 0))
    for method in methods:
        noise = torch.Generator().manual_seed(3)
        state = {name: torch.randn(2, *shape, generator=noise) for name, shape in method.trainable.shapes.items()}
        with method.attach(state, state, rows):
            assert written_out(base.model)
            ours = last_hidden(base.model, inputs, ())
            theirs = base.model.base_model(inputs_embeds=inputs, use_cache=False).last_hidden_state
        assert (ours - plain).abs().max() > 1e-2
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_other_models_and_changed_layers_are_left_to_transformers() -> None:
    assert written_out(tiny.base("llama", torch.float32).model)
    assert not written_out(tiny.base("llama", torch.float64).model)
    assert not written_out(tiny.base("llama", torch.bfloat16).model)
    for family in sorted(set(tiny.FAMILIES) - set(FAMILIES)):
        assert not written_out(tiny.base(family, torch.float32).model)
    again = tiny.base("llama", torch.float32).model
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not written_out(again)
    for part in (again.model.layers[1].mlp, again.model.norm, again.model):
        with part.register_forward_hook(lambda *_: None):
            assert not written_out(again)
        with part.register_forward_pre_hook(lambda *_: None):
            assert not written_out(again)
    assert written_out(again)
    checkpoint_layers(again)
    assert not written_out(again)
    own = tiny.base("llama", torch.float32).model
    own.model.__class__ = type("LlamaModel", (type(own.model),), {"__module__": "modeling_of_its_own"})
    assert not written_out(own)
    windowed = tf.MistralConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        sliding_window=4,
    )
    assert not written_out(tf.MistralForCausalLM(windowed))
    windowed.sliding_window = None
    assert written_out(tf.MistralForCausalLM(windowed).requires_grad_(False))


def test_trained_norms_are_left_to_transformers() -> None:
    base = tiny.base("llama", torch.float32)
    method = Full(Full.Options(), base, 0)
    state = {name: t.unsqueeze(0).requires_grad_() for name, t in method.initial().items()}
    with method.attach(state, state, torch.zeros(1, dtype=torch.int64)):
        assert not written_out(base.model)
    assert written_out(base.model)


def test_a_padded_row_has_the_states_that_it_has_alone() -> None:
    base = tiny.base("llama", torch.float32)
    method = Prefix(Prefix.Options.model_validate({"num_virtual_tokens": 3, "init": "random"}), base, 0)
    state = {name: t.unsqueeze(0) for name, t in method.initial().items()}
    ids = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 0, 0, 0]])
    embed = base.model.get_input_embeddings()
    with method.attach(state, state, torch.zeros(2, dtype=torch.int64)) as attached:
        both = last_hidden(base.model, embed(ids), attached.past)
    with method.attach(state, state, torch.zeros(1, dtype=torch.int64)) as attached:
        alone = last_hidden(base.model, embed(ids[1:, :3]), attached.past)
    torch.testing.assert_close(both[1:, :3], alone, rtol=1e-5, atol=1e-5)


def test_the_frozen_head_gives_the_losses_and_gradients_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedhpc.objectives.base.LOGITS_AT_ONCE", {"cpu": 16 * 61})
    noise = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 8, generator=noise, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(61, 8, generator=noise, dtype=torch.float64)
    targets = torch.randint(61, (37,), generator=noise)
    weights = torch.rand(37, generator=noise, dtype=torch.float64)
    losses = torch.nn.functional.cross_entropy(hidden @ weight.T, targets, reduction="none")
    (wanted,) = torch.autograd.grad((losses * weights).sum(), hidden)
    found = through_frozen_head(hidden.detach(), weight, targets, weights)
    torch.testing.assert_close(found[0], losses.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[1], wanted, rtol=1e-12, atol=1e-12)
