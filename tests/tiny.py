"""Tiny random models and examples of every family, for tests that compare against a reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import transformers as tf

from fedhpc.data.tokens import Examples, Tokens, examples_from
from fedhpc.models import Base

VOCABULARY = 61
FAMILIES: dict[str, Any] = {
    "gpt2": lambda: tf.GPT2LMHeadModel(
        tf.GPT2Config(vocab_size=VOCABULARY, n_positions=96, n_embd=32, n_layer=2, n_head=4)
    ),
    "llama": lambda: tf.LlamaForCausalLM(
        tf.LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=96, tie_word_embeddings=True,
        )
    ),
    "qwen2": lambda: tf.Qwen2ForCausalLM(
        tf.Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=96,
        )
    ),
    "qwen3": lambda: tf.Qwen3ForCausalLM(
        tf.Qwen3Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, head_dim=16, max_position_embeddings=96,
        )
    ),
    "opt": lambda: tf.OPTForCausalLM(
        tf.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=96, word_embed_proj_dim=32, dropout=0.0,
        )
    ),
    "gpt_neox": lambda: tf.GPTNeoXForCausalLM(
        tf.GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=96,
        )
    ),
}  # fmt: skip


class TinyTokenizer:
    """As much of a tokenizer as a forward pass needs: one id per character."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2

    def __call__(self, text: str, add_special_tokens: bool = False) -> dict[str, list[int]]:
        return {"input_ids": [3 + ord(c) % (VOCABULARY - 3) for c in text]}


def base(
    family: str, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 3.0, device: str = "cpu"
) -> Base:
    """A random model; weights larger than usual, so that what a payload does shows."""
    torch.manual_seed(seed)
    model = FAMILIES[family]().to(dtype).eval().requires_grad_(False)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.ndim == 2 and "embed" not in name and "wte" not in name and "wpe" not in name:
                p.mul_(scale)
    model.to(device)
    config = model.config
    heads = config.num_attention_heads
    return Base(
        model=model,
        tokenizer=TinyTokenizer(),
        device=torch.device(device),
        name=family,
        fingerprint=family,
        num_layers=config.num_hidden_layers,
        num_kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        hidden_size=config.hidden_size,
    )


def examples(count: int = 60, seed: int = 0, longest: int = 20) -> Examples:
    """Random token sequences of unequal length, each with a prompt and a target."""
    rng = np.random.default_rng(seed)
    rows, prompts = [], []
    for _ in range(count):
        prompt, target = rng.integers(2, longest // 2), rng.integers(2, longest // 2)
        rows.append(np.concatenate([[1], rng.integers(3, VOCABULARY, prompt + target), [2]]))
        prompts.append(1 + prompt)
    offsets = np.concatenate([[0], np.cumsum([len(r) for r in rows])])
    return examples_from(
        Tokens(np.concatenate(rows).astype(np.int32), offsets.astype(np.int64), np.array(prompts, dtype=np.int32))
    )
