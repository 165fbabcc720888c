"""Precision and size: bases in 16 bits, layers computed again instead of kept, quantised bases."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as tf
from torch.utils._python_dispatch import TorchDispatchMode

from fedhpc import registry
from fedhpc.config import Model
from fedhpc.models.load import checkpoint_layers, layer_stacks, load_base
from tests import tiny
from tests.test_block import SIZES, settings, start_of, works
from tests.test_methods import make, warm

# Methods of parameters of a language model; the others train none on a client, or behind an encoder of sentences.
TRAINED = [name for name in registry.names("methods") if not registry.is_approach(name) and name != "retriever"]

# ---------------------------------------------------------------- 16 bits


@pytest.mark.parametrize(
    ("dtype", "has", "slow"),
    [
        ("bfloat16", {"avx512_bf16": False, "amx_bf16": False}, True),
        ("bfloat16", {"avx512_bf16": True, "amx_bf16": False}, False),
        ("float16", {"avx512_bf16": True, "avx512_fp16": False}, True),
        ("float32", {}, False),
    ],
)
def test_a_processor_without_instructions_for_16_bits_is_named(
    dtype: str, has: dict[str, Any], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    capabilities = {"architecture": "x86_64", **has}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    base = load_base(Model.model_validate({"name": "builtin", "dtype": dtype}), torch.device("cpu"))
    assert [f"no instructions for {dtype}" in message for message in base.messages] == [True] * slow


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", TRAINED)
def test_every_method_trains_a_base_in_16_bits(name: str, dtype: torch.dtype) -> None:
    """The payload stays in float32, and the loss falls: every step sees the same rows."""
    base, data = tiny.base("llama", dtype, scale=1.0), tiny.examples()
    rate = {"full": 0.3, "fedkseed": 1e-3, "adapter": 0.3, "ia3": 50.0}.get(name, 0.5)
    config = settings(optimizer="sgd", lr=rate, steps=12, batch_size=SIZES[0])
    method = make(name, base, **({"num_seeds": 64, "eps": 0.02} if name == "fedkseed" else {}))
    trained = tiny.train(
        base, method, tiny.objective(base), start_of(method, torch.float32), works(1), data, config, 1, 1
    )
    assert trained.updates.dtype == torch.float32
    assert bool(torch.isfinite(trained.updates).all()) and trained.updates.any()
    assert trained.loss_last[0] < trained.loss_first[0]


# ---------------------------------------------------------------- gradient checkpointing


@pytest.mark.parametrize("family", sorted(tiny.FAMILIES))
@pytest.mark.parametrize("name", ["prefix", "prompt", "lora", "adapter", "full"])
def test_layers_computed_again_give_the_same_updates(name: str, family: str) -> None:
    """To the last bit: the same operations on the same numbers."""
    data, config = tiny.examples(), settings(optimizer="sgd", lr=0.2, steps=2)
    updates, passes = [], []
    for again in (False, True):
        base = tiny.base(family)
        count: list[int] = []
        first = next(layer_stacks(base.model)[0][0].children())
        first.register_forward_hook(lambda *_, count=count: count.append(1))
        if again:
            checkpoint_layers(base.model)
        method = make(name, base)
        start, group = warm(method, torch.float64), works(1 if name == "full" else 3)
        count.clear()
        updates.append(tiny.train(base, method, tiny.objective(base), start, group, data, config, 1, 1).updates)
        passes.append(len(count))
    assert passes[1] == 2 * passes[0]
    assert float(updates[0].norm()) > 1e-3
    assert torch.equal(updates[0], updates[1])


class Peak(TorchDispatchMode):
    """The most bytes of tensors made under it that were alive at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return
        self._seen.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)

        def gone() -> None:
            self.alive -= size
            self._seen.discard(key)

        weakref.finalize(storage, gone)


def peak_of(again: bool) -> int:
    """Bytes at the peak of one step of prefix-tuning in a deep narrow model."""
    torch.manual_seed(0)
    shape = tf.LlamaConfig(
        vocab_size=tiny.VOCABULARY, hidden_size=32, intermediate_size=96, num_hidden_layers=12, num_attention_heads=4,
        max_position_embeddings=96,
    )  # fmt: skip
    model = tf.LlamaForCausalLM(shape).eval().requires_grad_(False)
    base = replace(tiny.base("llama", torch.float32), model=model, num_layers=12, num_kv_heads=4, head_dim=8)
    if again:
        checkpoint_layers(model)
    method = make("prefix", base)
    start = warm(method, torch.float32)
    with Peak() as peak:
        tiny.train(
            base, method, tiny.objective(base), start, works(4), tiny.examples(longest=60), settings(steps=1), 1, 1
        )
    return peak.peak


def test_layers_computed_again_take_less_memory() -> None:
    assert peak_of(True) < peak_of(False) / 2  # 4.0 of 12.8 MB
