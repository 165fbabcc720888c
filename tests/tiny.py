"""Tiny random models and examples of every family, for tests that compare against a reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import transformers as tf

from fedhpc import objectives
from fedhpc.config import Config
from fedhpc.data.tokens import Examples, Tokens, examples_from
from fedhpc.methods.base import Method
from fedhpc.models.base import Base
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.encoder import Classifier
from fedhpc.models.seq2seq import Seq2Seq
from fedhpc.objectives.base import Objective
from fedhpc.training.block import Trained, Work, train_block
from fedhpc.training.local import LocalTraining

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


ENCODERS: dict[str, Any] = {
    "bert": lambda: tf.BertForSequenceClassification(
        tf.BertConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=96, num_labels=3,
        )
    ),
    "roberta": lambda: tf.RobertaForSequenceClassification(
        tf.RobertaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=96, num_labels=3, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        )
    ),
}  # fmt: skip
SEQ2SEQ: dict[str, Any] = {
    "t5": lambda: tf.T5ForConditionalGeneration(
        tf.T5Config(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=3, num_decoder_layers=2, num_heads=4,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=3,
        )
    ),
    "bart": lambda: tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=VOCABULARY, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, encoder_layers=3,
            decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, max_position_embeddings=96,
            pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=3, forced_eos_token_id=None,
            scale_embedding=True,
        )
    ),
}  # fmt: skip
#: Experts as a list of layers, of which a row reaches some.
LISTED: dict[str, Any] = {
    "switch": lambda: tf.SwitchTransformersForConditionalGeneration(
        tf.SwitchTransformersConfig(
            vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
            num_experts=6, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, expert_capacity=64,
            pad_token_id=0, eos_token_id=2, decoder_start_token_id=3,
        )
    ),
}  # fmt: skip
CLASSES: dict[str, type[Base]] = {
    **dict.fromkeys(FAMILIES, CausalLM),
    **dict.fromkeys(ENCODERS, Classifier),
    **dict.fromkeys({**SEQ2SEQ, **LISTED}, Seq2Seq),
}


def train(
    base: Base,
    method: Method,
    objective: Objective,
    starts: torch.Tensor,
    works: Sequence[Work],
    examples: Examples,
    config: Config,
    round_: int = 1,
    rounds: int = 1,
    **more: Any,
) -> Trained:
    """`train_block` as a configuration asks for it."""
    local = replace(LocalTraining.of(config, round_, rounds), packing=config.client.packing)
    return train_block(base, method, objective, starts, works, examples, local, **more)


class TinyTokenizer:
    """As much of a tokenizer as a forward pass needs: one id per character."""

    pad_token_id, bos_token_id, eos_token_id = 0, 1, 2
    bos_token, eos_token = "<s>", "</s>"

    def __call__(self, text: Any, add_special_tokens: bool = False, **_: Any) -> dict[str, Any]:
        if not isinstance(text, str):
            return {"input_ids": [self(one, add_special_tokens)["input_ids"] for one in text]}
        ids = [3 + ord(c) % (VOCABULARY - 3) for c in text]
        return {"input_ids": [1, *ids, 2] if add_special_tokens else ids}

    def save_pretrained(self, path: Any) -> None:
        """Nothing: no test reads it."""


def base(
    family: str, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 3.0, device: str = "cpu"
) -> Any:
    """A random model; weights larger than usual, so that what a payload does shows."""
    torch.manual_seed(seed)
    model = {**FAMILIES, **ENCODERS, **SEQ2SEQ, **LISTED}[family]().to(dtype).eval().requires_grad_(False)
    for path, module in list(model.named_modules()):
        if type(module).__name__ == "T5LayerNorm":  # it takes the variance in float32, whatever the model's dtype
            exact = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=dtype)
            model.set_submodule(path, exact.requires_grad_(False))
        if type(module).__name__ == "SwitchTransformersTop1Router":  # nor its router
            module.dtype = dtype
    with torch.no_grad():
        for name, p in model.named_parameters():
            # T5 does not scale its attention, so larger weights would make it chaotic.
            if (
                family != "t5"
                and p.ndim == 2
                and "embed" not in name
                and "shared" not in name
                and "wte" not in name
                and "wpe" not in name
            ):
                p.mul_(scale)
    model.to(device)
    return CLASSES[family].of(model, TinyTokenizer(), torch.device(device), family, family)


def objective(base: Base) -> Any:
    """What such a model is trained with."""
    return objectives.for_model(type(base))


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


def labelled(count: int = 60, seed: int = 0, longest: int = 20) -> Examples:
    """Random token sequences of unequal length, `1 ... 2`, each with one of three labels."""
    rng = np.random.default_rng(seed)
    rows = [np.concatenate([[1], rng.integers(3, VOCABULARY, rng.integers(2, longest)), [2]]) for _ in range(count)]
    lengths = np.array([len(row) for row in rows])
    tokens = Tokens(np.concatenate(rows).astype(np.int32), np.cumsum([0, *lengths]), lengths.astype(np.int32))
    return examples_from(tokens, labels=rng.integers(0, 3, count).astype(np.int32), label_names=["a", "b", "c"])
