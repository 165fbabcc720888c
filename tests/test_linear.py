"""Which linear layers methods adapt: those that see each row's tokens, under names that PEFT reads alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as tf

from fedhpc.errors import UserError
from fedhpc.methods import with_head
from fedhpc.models.base import most_positions
from fedhpc.models.causal_lm import CausalLM
from tests import tiny
from tests.test_block import settings, start_of, works
from tests.test_methods import make

SIZES = {
    "vocab_size": tiny.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 96, "moe_intermediate_size": 16,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
DEEPSEEK = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}


def base_of(network: Any) -> Any:
    network = network.eval().requires_grad_(False)
    return CausalLM.of(network, tiny.TinyTokenizer(), torch.device("cpu"), "moe", "moe")


def qwen2_moe() -> Any:
    torch.manual_seed(0)
    more = {"num_experts": 4, "shared_expert_intermediate_size": 32}
    return base_of(tf.Qwen2MoeForCausalLM(tf.Qwen2MoeConfig(**SIZES, **more)))


def qwen3_moe() -> Any:
    """A dense layer below one with experts."""
    torch.manual_seed(0)
    return base_of(tf.Qwen3MoeForCausalLM(tf.Qwen3MoeConfig(**SIZES, num_experts=4, mlp_only_layers=[0])))


def glm4_moe() -> Any:
    torch.manual_seed(0)
    return base_of(tf.Glm4MoeForCausalLM(tf.Glm4MoeConfig(**SIZES, **DEEPSEEK, head_dim=8)))


class Experts(torch.nn.Module):
    """Every token goes to one of two linear layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(0, 1)
        second, out = flat[:, 0] > 0, torch.empty_like(flat)
        for expert, chosen in zip(self.experts, (~second, second), strict=True):
            out[chosen] = expert(flat[chosen])
        return out.view_as(x)


def test_rows_end_where_attention_begins_to_choose() -> None:
    """In longer rows DeepSeek-V3.2 looks at the `index_topk` best tokens, later ones and padding among them."""
    config = tf.DeepseekV32Config(index_topk=64, max_position_embeddings=4096)
    assert most_positions(config) == 64
    assert most_positions(tf.DeepseekV32Config(index_topk=2048, max_position_embeddings=512)) == 512


def test_experts_that_see_some_tokens_are_refused() -> None:
    base = tiny.base("llama")
    base.model.model.layers[1].mlp = Experts(32).double()
    with pytest.raises(
        UserError, match=r"^method\.targets: model\.layers\.1\.mlp\.experts\.0 is not given the tokens row by row"
    ):
        make("lora", base, targets=["q_proj", "experts.0"])
    make("lora", base)


def test_layers_that_no_text_passes_through_are_refused() -> None:
    """As those of a tower for images: nothing would be trained."""
    base = tiny.base("llama")
    base.model.tower = torch.nn.Linear(32, 32).double()
    with pytest.raises(
        UserError, match=r"no text passes through the layers named tower, .*: down_proj, gate_proj, k_p"
    ):
        make("lora", base, targets=["q_proj", "tower"])


def test_a_name_that_is_not_of_linear_layers_alone_is_refused() -> None:
    """As `output` in GIT, its output layer and parts of its layers: PEFT stops at the first of these."""
    base = tiny.base("llama")
    base.model.model.layers[1].lm_head = torch.nn.Identity()
    with pytest.raises(UserError, match=r"^method\.targets: lm_head is the name of model\.layers\.1\.lm_head too"):
        make("lora", base, targets=["lm_head"])


def test_a_layer_has_its_inputs_or_its_outputs_rescaled() -> None:
    with pytest.raises(UserError, match=r"^method\.inputs: lm_head is among the layers of method\.outputs too"):
        _ = make("ia3", tiny.base("llama"), outputs=["k_proj", "lm_head"], inputs=["lm_head"]).payload


@pytest.mark.parametrize(
    ("of", "name", "options"),
    [
        (qwen3_moe, "lora", {}),
        (qwen2_moe, "lora", {"targets": ["q_proj", "down_proj"]}),
        # Names that PEFT reads as those of experts in these families.
        (qwen3_moe, "lora", {"targets": ["down_proj"]}),
        (glm4_moe, "lora", {"targets": ["q_proj", "gate_proj", "up_proj"]}),
        (qwen2_moe, "ia3", {}),
    ],
)
def test_adapters_beside_experts_export_what_was_trained(
    of: Any, name: str, options: dict[str, Any], tmp_path: Path
) -> None:
    base, data = of(), tiny.examples()
    method = with_head(make(name, base, **options))
    assert ["those of routed experts, experts.down_proj" in text for text in method.messages] == [True]
    start = start_of(method, torch.float32)
    start += 0.2 * torch.randn(start.shape, dtype=start.dtype, generator=torch.Generator().manual_seed(3))
    config = settings(optimizer="sgd", lr=0.1, steps=2)
    update = tiny.train(base, method, tiny.objective(base), start, works(1), data, config).updates
    views = method.payload.views(start - update)
    method.export({key: value[0] for key, value in views.items()}, tmp_path)
    loaded = peft.PeftModel.from_pretrained(of().model, tmp_path).eval()
    batch = base.batch(data, works(1)[0].indices[:1])
    with torch.no_grad(), method.attach(views, views, torch.zeros(1, dtype=torch.int64)) as attached:
        ours = tiny.objective(base).losses(base, attached, batch)
    with torch.no_grad():
        logits = loaded(input_ids=batch.ids).logits[0, batch.positions]
    theirs = torch.nn.functional.cross_entropy(logits, batch.targets, reduction="none")
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        plain = of().model(input_ids=batch.ids).logits[0, batch.positions]
    assert not torch.allclose(logits, plain, atol=1e-3)
