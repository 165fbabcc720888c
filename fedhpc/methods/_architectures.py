"""What the linear layers inside a transformer are called, by architecture (`model_type` of its configuration).

A name is the end of a layer's path in the model, as PEFT matches it. Methods that adapt certain layers by default take
their names from here; an architecture that is not listed is taken to name its layers as Llama does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedhpc.models.base import Base


@dataclass(frozen=True)
class Architecture:
    """Names of linear layers; the projections of a fused attention layer share one."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    attention_output: tuple[str, ...] = ("o_proj",)  # of self-attention and of cross-attention
    feed_forward_output: str = "down_proj"
    rescaled: tuple[str, ...] | None = None  # what (IA)^3 rescales in PEFT where it is not keys and values

    @property
    def queries_and_values(self) -> list[str]:
        """What LoRA adapts (Hu et al. 2022, section 4.2)."""
        return list(dict.fromkeys([self.query, self.value]))

    @property
    def keys_and_values(self) -> list[str]:
        """Whose outputs (IA)^3 rescales (Liu et al. 2022, section 3.3)."""
        return list(dict.fromkeys(self.rescaled or [self.key, self.value]))


def _fused(attention: str, attention_output: str, feed_forward_output: str) -> Architecture:
    """Queries, keys and values are made by one layer."""
    return Architecture(attention, attention, attention, (attention_output,), feed_forward_output)


def _with_output(attention_output: str, feed_forward_output: str, **others: Any) -> Architecture:
    """Queries, keys and values are called as Llama's, what comes behind them is not."""
    return Architecture(attention_output=(attention_output,), feed_forward_output=feed_forward_output, **others)


_BERT = Architecture("query", "key", "value", ("attention.output.dense",), "output.dense")
_T5 = Architecture("q", "k", "v", ("o",), "wo")
ARCHITECTURES = {
    "bart": Architecture(
        attention_output=("self_attn.out_proj", "encoder_attn.out_proj"),
        feed_forward_output="fc2",
        rescaled=("q_proj", "v_proj"),
    ),
    "bert": _BERT,
    "biogpt": _with_output("self_attn.out_proj", "fc2"),
    "bloom": _fused("query_key_value", "self_attention.dense", "mlp.dense_4h_to_h"),
    "codegen": _fused("qkv_proj", "attn.out_proj", "mlp.fc_out"),
    "deberta-v2": Architecture("query_proj", "key_proj", "value_proj", ("attention.output.dense",), "output.dense"),
    "distilbert": Architecture("q_lin", "k_lin", "v_lin", ("out_lin",), "lin2"),
    "electra": _BERT,
    "falcon": _fused("query_key_value", "self_attention.dense", "dense_4h_to_h"),
    "gpt2": _fused("c_attn", "attn.c_proj", "mlp.c_proj"),
    "gpt_bigcode": _fused("c_attn", "attn.c_proj", "mlp.c_proj"),
    "gpt_neo": _with_output("attention.out_proj", "mlp.c_proj", rescaled=("q_proj", "v_proj")),
    "gpt_neox": _fused("query_key_value", "attention.dense", "dense_4h_to_h"),
    "gpt_neox_japanese": _fused("query_key_value", "attention.dense", "dense_4h_to_h"),
    "gptj": _with_output("attn.out_proj", "mlp.fc_out", rescaled=("q_proj", "v_proj")),
    "lfm2": _with_output("self_attn.out_proj", "feed_forward.w2"),
    "modernbert": _fused("Wqkv", "attn.Wo", "mlp.Wo"),
    "mpnet": Architecture("attn.q", "attn.k", "attn.v", ("attn.o",), "output.dense"),
    "mpt": _fused("Wqkv", "attn.out_proj", "ffn.down_proj"),
    "mt5": _T5,
    "opt": Architecture(attention_output=("self_attn.out_proj",), feed_forward_output="fc2"),
    "persimmon": _fused("query_key_value", "self_attn.dense", "dense_4h_to_h"),
    "phi": _with_output("self_attn.dense", "mlp.fc2", rescaled=("q_proj", "v_proj")),
    "phi3": _fused("qkv_proj", "self_attn.o_proj", "mlp.down_proj"),
    "roberta": _BERT,
    "starcoder2": _with_output("self_attn.o_proj", "mlp.c_proj"),
    "t5": _T5,
    "xglm": _with_output("self_attn.out_proj", "fc2"),
    "xlm-roberta": _BERT,
}


def architecture(base: Base) -> Architecture:
    """The names of the linear layers of a base."""
    return ARCHITECTURES.get(base.model.config.model_type, Architecture())
