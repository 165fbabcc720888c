"""How long a row may be: as long as the model's weights and angles reach, with transformers' own loss."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from fedhpc.data.tokens import Tokens, examples_from
from fedhpc.errors import UserError
from fedhpc.models.base import Attached, most_positions
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.encoder import SentenceEncoder
from fedhpc.models.load import check_length
from tests import tiny
from tests.test_causal import same_as_alone

SHAPE = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}
LLAMA3 = {**YARN, "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 20,
}  # fmt: skip


def decoder(family: str, rope: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(0)
    config = getattr(tf, f"{family}Config")(**SHAPE, num_key_value_heads=2, rope_parameters=rope, **options)
    model = getattr(tf, f"{family}ForCausalLM")(config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8.0)  # so that what angles do shows
    return CausalLM.of(model, tiny.TinyTokenizer(), torch.device("cpu"), family, family)


@pytest.mark.parametrize("family", ["Llama", "Qwen3"])  # the forward pass of our own, and transformers'
@pytest.mark.parametrize("rope", [LINEAR, YARN, LLAMA3], ids=lambda rope: rope["rope_type"])
def test_rows_reach_as_far_as_stretched_angles(family: str, rope: dict[str, Any]) -> None:
    base = decoder(family, rope, **({"head_dim": 8} if family == "Qwen3" else {}))
    assert base.max_positions == 128
    check_length(base, 100, virtual=28)
    with pytest.raises(UserError, match=r"data\.max_length: 101 tokens and 28 virtual ones exceed the 128 positions"):
        check_length(base, 101, virtual=28)
    ids = np.array([1, *np.random.default_rng(0).integers(3, tiny.VOCABULARY, 99)], np.int32)
    examples = examples_from(Tokens(ids, np.array([0, 100]), np.array([40], np.int32)))
    batch = base.batch(examples, np.arange(1))
    logits = torch.cat(list(base.predictions(Attached(), batch)))
    row = torch.tensor(ids.astype(np.int64))[None]
    labels = torch.where(torch.arange(100)[None] < 40, -100, row)
    theirs = base.model(input_ids=row, labels=labels).loss
    assert abs(float(torch.nn.functional.cross_entropy(logits, batch.targets)) - float(theirs)) < 1e-4
    assert float(theirs) > 4.2  # not the loss of a model that knows nothing but the number of tokens, log 61 = 4.11

    # A text goes on to the last position, and as transformers writes it.
    base.tokenizer.eos_token_id = -1
    written = base.generate(Attached(), [ids], 40)[0].tolist()
    assert written.index(-1) == 128 - 100 + 1
    expected = base.model.generate(
        row, attention_mask=torch.ones_like(row), max_new_tokens=28, do_sample=False, eos_token_id=None
    )[0, 100:]
    assert written[:28] == expected.tolist()


def test_angles_that_follow_the_longest_row_end_where_they_begin_to() -> None:
    assert decoder("Llama", DYNAMIC).max_positions == 32
    base = decoder("Phi3", LONGROPE, original_max_position_embeddings=20)
    assert base.max_positions == 20
    same_as_alone(base)
    check_length(base, 20, 0)
    with pytest.raises(UserError, match=r"data\.max_length: 21 tokens .* exceed the 20 positions.*longest row"):
        check_length(base, 21, 0)


def test_angles_that_reach_to_the_last_position_are_not_stretched_again() -> None:
    yarn = {**YARN, "original_max_position_embeddings": 8}
    assert most_positions(tf.LlamaConfig(**SHAPE, rope_parameters=yarn)) == 32


def test_layers_may_be_stretched_each_in_its_own_way() -> None:
    layers = ["sliding_attention", "full_attention"]
    plain = {"rope_type": "default", "rope_theta": 1e4}

    def limit(sliding: dict[str, Any], full: dict[str, Any]) -> int | None:
        rope = {"sliding_attention": sliding, "full_attention": full}
        return most_positions(tf.Gemma3TextConfig(**SHAPE, layer_types=layers, rope_parameters=rope))

    assert limit(plain, plain) == 32
    assert limit(plain, LINEAR) == 128
    assert limit(LINEAR, LINEAR) == 128  # not 512


def test_what_has_no_positions_has_no_limit() -> None:
    shape = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    assert most_positions(tf.FalconConfig(**shape, alibi=True)) is None
    assert most_positions(tf.FalconConfig(**shape, alibi=False)) == 2048
    assert most_positions(tf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=1, n_head=4)) is None
    assert most_positions(tf.MptConfig(vocab_size=61, d_model=32, n_layers=1, n_heads=4, max_seq_len=64)) == 64
    assert most_positions(tf.GPT2Config(n_positions=96)) == 96


def test_an_encoder_reaches_as_far_too() -> None:
    torch.manual_seed(0)
    rope = {"sliding_attention": {"rope_type": "default", "rope_theta": 1e4}, "full_attention": LINEAR}
    config = tf.ModernBertConfig(**SHAPE, cls_token_id=1, sep_token_id=2, rope_parameters=rope, local_attention=8)
    model = tf.ModernBertModel(config).eval().requires_grad_(False)
    base = SentenceEncoder.of(model, tiny.TinyTokenizer(), torch.device("cpu"), "m", "m")
    assert base.max_positions == 128
    ids = torch.randint(3, tiny.VOCABULARY, (1, 100))
    mean = model(input_ids=ids).last_hidden_state[0].mean(0)
    torch.testing.assert_close(base.vectors([ids[0].numpy()])[0], mean / mean.norm(), rtol=0, atol=1e-5)
