"""Causal models of every build: what they compute in a padded batch is what transformers computes of a row alone."""

from __future__ import annotations

import copy
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from peft import PeftModel
from torch import Tensor
from transformers import DynamicCache

from fedhpc.config import Model
from fedhpc.data.tokens import Tokens, examples_from
from fedhpc.errors import UserError
from fedhpc.methods.base import Method, as_one_client
from fedhpc.models.base import Attached
from fedhpc.models.call import with_cache
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.load import BUILTIN, load_base
from tests import tiny
from tests.test_methods import make

SMALL: dict[str, Any] = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 96, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHORT = {key: SMALL[key] for key in ("vocab_size", "bos_token_id", "eos_token_id")}
LAYERS: dict[str, list[str]] = {
    "lfm2": ["conv", "full_attention", "conv"],
    "qwen3_next": ["linear_attention", "full_attention"],
    "granitemoehybrid": ["mamba", "attention"],
    "gemma3_text": ["sliding_attention", "full_attention"],
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1}


def small(model_type: str, **more: Any) -> Any:
    """A configuration of this family."""
    layers = LAYERS.get(model_type, [])
    hybrid = {"layer_types": layers, "num_hidden_layers": len(layers)} if layers else {}
    return tf.AutoConfig.for_model(model_type, **{**SMALL, **hybrid, **more})


#: Attention of their own making alone, positions that are counted from the mask or the keys, one head of keys for all.
WITH_KEYS: dict[str, Callable[[], Any]] = {
    "bloom": lambda: tf.BloomConfig(**SHORT, hidden_size=32, n_layer=2, n_head=4),
    "mpt": lambda: tf.MptConfig(**SHORT, d_model=32, n_layers=2, n_heads=4, max_seq_len=96),
    "gpt_neo": lambda: tf.GPTNeoConfig(
        **SHORT, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=6,
        max_position_embeddings=96,
    ),
    "gemma2": lambda: small("gemma2", head_dim=8, sliding_window=6),
    "gpt_oss": lambda: small("gpt_oss", head_dim=8, sliding_window=6, num_local_experts=4, num_experts_per_tok=2),
    "mistral": lambda: small("mistral", sliding_window=6),
    "gemma3_text": lambda: small("gemma3_text", head_dim=8, sliding_window=6),
    "falcon": lambda: tf.FalconConfig(
        **SHORT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, multi_query=True, bias=False, alibi=False,
        new_decoder_architecture=False,
    ),
    "falcon, new": lambda: tf.FalconConfig(
        **SHORT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_kv_heads=2, bias=False, alibi=False,
        new_decoder_architecture=True,
    ),
    "gpt_bigcode": lambda: tf.GPTBigCodeConfig(
        **SHORT, n_embd=32, n_layer=2, n_head=4, n_positions=96, multi_query=True
    ),
    "bert": lambda: tf.BertConfig(
        **SHORT, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=96, is_decoder=True,
    ),
}  # fmt: skip
#: Layers that keep something else of earlier tokens.
WITH_STATES: dict[str, Callable[[], Any]] = {
    "lfm2": lambda: small("lfm2"),
    "qwen3_next": lambda: small(
        "qwen3_next", head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
    ),
    "granitemoehybrid": lambda: small("granitemoehybrid", shared_intermediate_size=48, num_local_experts=0, **MAMBA),
    "mamba": lambda: tf.MambaConfig(
        **SHORT, hidden_size=32, num_hidden_layers=2, state_size=8, use_mambapy=False, pad_token_id=0
    ),
}  # fmt: skip
ALL = {**WITH_KEYS, **WITH_STATES}
LENGTHS, PROMPTS = (6, 11, 17), (3, 4, 5)


def base_of(config: Any) -> CausalLM:
    """A random model of this configuration, with weights large enough that a slip shows."""
    torch.manual_seed(0)
    network = tf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    with torch.no_grad():
        for name, p in network.named_parameters():
            if p.ndim == 2 and not any(word in name for word in ("embed", "wte", "wpe", "gate.weight", "A_log")):
                p.mul_(3.0)
    base = CausalLM.of(network, tiny.TinyTokenizer(), torch.device("cpu"), "tiny", "tiny")
    base.check()
    assert isinstance(base, CausalLM)
    return base


def rows() -> list[np.ndarray]:
    """Rows of unequal length."""
    rng = np.random.default_rng(0)
    return [np.concatenate([[1], rng.integers(3, tiny.VOCABULARY, n - 2), [2]]).astype(np.int32) for n in LENGTHS]


def random_prefix(base: CausalLM, n: int) -> tuple[tuple[Tensor, Tensor], ...]:
    noise = torch.Generator().manual_seed(1)
    shape = (2, 1, base.num_kv_heads, n, base.head_dim)
    return tuple((pair[0], pair[1]) for pair in (torch.randn(shape, generator=noise) for _ in range(base.num_layers)))


def alone(base: CausalLM, ids: list[int], past: Any = ()) -> Tensor:
    """transformers' own logits (T, V) of a row behind keys and values, without padding."""
    held = DynamicCache([(k.clone(), v.clone()) for k, v in past]) if past else None
    given = with_cache(base.model, held) if past else {}
    with torch.no_grad():
        logits: Tensor = base.model(input_ids=torch.tensor([ids]), **given).logits[0]
    return logits


def relative(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def same_as_alone(base: CausalLM, past: tuple[tuple[Tensor, Tensor], ...] = ()) -> None:
    """Losses and texts of a padded batch are those of its rows."""
    texts = rows()
    offsets = np.cumsum([0, *LENGTHS]).astype(np.int64)
    examples = examples_from(Tokens(np.concatenate(texts), offsets, np.array(PROMPTS, np.int32)))
    attached = Attached(past=tuple((k.expand(3, -1, -1, -1), v.expand(3, -1, -1, -1)) for k, v in past))
    with torch.no_grad():
        logits = base.base_logits(base.states(attached, base.batch(examples, np.arange(3))))
        written = base.generate(attached, [row[:-1] for row in texts], 5).tolist()
    wanted = [alone(base, row.tolist(), past)[p - 1 : -1] for row, p in zip(texts, PROMPTS, strict=True)]
    assert relative(logits, torch.cat(wanted)) < 1e-5
    for row, text in zip(texts, written, strict=True):
        ids = row[:-1].tolist()
        for token in text:
            wants = int(alone(base, ids, past)[-1].argmax())
            assert token == (-1 if wants == 2 else wants)
            if token == -1:
                break
            ids.append(token)
    assert len({tuple(text) for text in written}) > 1


@pytest.mark.parametrize("family", sorted(ALL))
def test_a_row_in_a_batch_is_what_transformers_computes_of_it_alone(family: str) -> None:
    same_as_alone(base_of(ALL[family]()))


@pytest.mark.parametrize("family", sorted(WITH_KEYS))
@pytest.mark.parametrize("n", [4, 9])
def test_the_same_behind_a_prefix_longer_than_the_window_too(family: str, n: int) -> None:
    base = base_of(WITH_KEYS[family]())
    base.check_past()
    same_as_alone(base, random_prefix(base, n))


@pytest.mark.parametrize("family", sorted(WITH_STATES))
def test_a_prefix_is_refused_where_layers_keep_states(family: str) -> None:
    with pytest.raises(UserError, match=r"a prefix needs layers that keep keys and values of every token"):
        base_of(WITH_STATES[family]()).check_past()


def test_heads_of_keys_are_those_that_the_model_keeps() -> None:
    heads = {family: base_of(WITH_KEYS[family]()).num_kv_heads for family in ("falcon", "falcon, new", "gpt_bigcode")}
    assert heads == {"falcon": 1, "falcon, new": 4, "gpt_bigcode": 1}


def trained(method: Method) -> dict[str, Tensor]:
    """A payload away from its start."""
    noise = torch.Generator().manual_seed(2)
    start = method.initial()
    return {name: t + 0.3 * torch.randn(t.shape, generator=noise, dtype=t.dtype) for name, t in start.items()}


@pytest.mark.parametrize("init", ["text", "random"])
@pytest.mark.parametrize("family", ["mistral", "gemma3_text", "falcon", "gpt_bigcode", "bloom"])
def test_an_exported_prefix_gives_the_same_logits_in_peft(family: str, init: str, tmp_path: Path) -> None:
    base = base_of(WITH_KEYS[family]())
    method = make("prefix", base, num_virtual_tokens=9, init=init)
    payload = trained(method)
    method.export(payload, tmp_path)
    reference = PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).eval()
    values = as_one_client(payload)
    with torch.no_grad(), method.attach(values, values, torch.zeros(1, dtype=torch.int64)) as attached:
        for row in rows():
            ids = torch.from_numpy(row.astype(np.int64)).unsqueeze(0)
            found = base.base_logits(base.read(attached, ids))
            assert relative(found, reference(input_ids=ids).logits) < 1e-4
            assert relative(found, base.model(input_ids=ids).logits) > 1e-2


# ---------------------------------------------------------------- loading


def saved(folder: Path, config: Any) -> Model:
    """A random model in a folder, with the built-in tokenizer."""
    torch.manual_seed(0)
    tf.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BUILTIN / name, folder / name)
    return Model(name=str(folder))


@pytest.mark.parametrize(("family", "attention"), [("gemma2", "eager"), ("mistral", "sdpa")])
def test_attention_is_what_the_class_has(family: str, attention: str, tmp_path: Path) -> None:
    config = small(family, head_dim=8, vocab_size=802)
    base = load_base(saved(tmp_path, config), torch.device("cpu"))
    assert base.model.config._attn_implementation == attention


def test_a_model_that_reads_in_both_directions_is_refused() -> None:
    config = tf.BertGenerationConfig(**{**SMALL, "is_decoder": False})
    with pytest.raises(UserError, match="tokens depend on later ones, or on other rows"):
        base_of(config)


def test_a_model_that_wants_more_than_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: Any, input_ids: Any = None, **kwargs: Any) -> Any:
        raise ValueError("pixels are needed")

    monkeypatch.setattr(tf.GPT2Model, "forward", forward)
    with pytest.raises(UserError, match=r"does not take text alone: pixels are needed"):
        base_of(tf.GPT2Config(**SHORT, n_embd=32, n_layer=1, n_head=4))


def test_tokens_that_are_looked_up_in_every_layer_count_and_refuse_soft_prompts() -> None:
    layers = ["sliding_attention", "full_attention"] * 2
    config = small(
        "gemma3n_text", num_hidden_layers=4, num_kv_shared_layers=2, layer_types=layers, head_dim=8, laurel_rank=8,
        activation_sparsity_pattern=[0.0] * 4, intermediate_size=48, hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=tiny.VOCABULARY, sliding_window=6,
    )  # fmt: skip
    torch.manual_seed(0)
    network = tf.AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, p in network.named_parameters():
        if "correct_output_scale" in name:
            p.fill_(1.0)  # drawn as zeros, so that nothing of it would show
    base = CausalLM.of(network, tiny.TinyTokenizer(), torch.device("cpu"), "tiny", "tiny")
    assert isinstance(base, CausalLM)
    assert base.num_layers == 2, "the layers that read a prefix"
    base.check_past()
    same_as_alone(base)
    same_as_alone(base, random_prefix(base, 4))
    with pytest.raises(UserError, match="looks its tokens up more than once"):
        make("prompt", base)


@pytest.mark.parametrize(
    ("family", "message"),
    [
        ("mistral", r"looks at the last 6 columns alone, padding included, and there are up to 7"),
        ("gpt_neo", r"looks at the last 6 columns alone"),
        ("mpt", r"does not let rows of unequal length share keys and values"),
        ("lfm2", r"does not let rows of unequal length share keys and values"),
    ],
)
def test_what_cannot_share_keys_and_values_is_refused(family: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        base_of(ALL[family]()).check_shared(7)


def test_what_can_share_keys_and_values_is_not() -> None:
    base_of(ALL["mistral"]()).check_shared(6)
    base_of(ALL["falcon"]()).check_shared(96)
    base_of(small("qwen2", sliding_window=None)).check_shared(96)


# ---------------------------------------------------------------- calls


def test_a_cache_goes_by_the_name_that_the_version_has() -> None:
    class Older(torch.nn.Module):
        def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: bool = True) -> None: ...

    class Newer(torch.nn.Module):
        def forward(self, input_ids: Any, cache: Any = None) -> None: ...

    held = object()
    assert with_cache(Older(), held) == {"past_key_values": held, "use_cache": True}
    assert with_cache(Newer(), held) == {"cache": held}
    assert with_cache(Older(), None) == {"use_cache": False}
    assert with_cache(Newer(), None) == {}


@pytest.mark.parametrize("family", ["gemma2", "lfm2", "falcon"])
def test_calls_of_models_warn_of_nothing(family: str, caplog: pytest.LogCaptureFixture) -> None:
    base = base_of(ALL[family]())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        base.check()
        base.activations([5, 6, 7]) if base.keys_and_values else None
        base.read(Attached(), torch.tensor([[5, 6, 7]]))
        base.generate(Attached(), [np.array([5, 6, 7])], 3)
    assert not caplog.records
