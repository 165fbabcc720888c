"""A base whose layers are read in parts is the base: its fingerprint, what it computes, its gradients, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf

from fedhpc.models.load import BUILTIN
from tests.federations import save_random_bert, save_random_llama, save_random_t5
from tests.ranks import Result, run_ranks

SHAPE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 96,
}  # fmt: skip
CAUSAL: dict[str, Any] = {
    "gpt2": lambda v: tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=v, n_positions=96, n_embd=32, n_layer=3, n_head=4)),
    "qwen2": lambda v: tf.Qwen2ForCausalLM(tf.Qwen2Config(vocab_size=v, **SHAPE)),
    # Its experts are stored one by one, and fused while they are read.
    "mixtral": lambda v: tf.MixtralForCausalLM(tf.MixtralConfig(vocab_size=v, num_local_experts=5, **SHAPE)),
}
LOAD = """
import sys
import torch
import torch.distributed as dist
from fedhpc.config import Model
from fedhpc.errors import UserError
from fedhpc.models.call import with_cache
from fedhpc.models.load import load_base
from fedhpc.ranks.transport.torch_dist import TorchGroup

dist.init_process_group("gloo")
ranks = range(dist.get_world_size())
group = TorchGroup(dist.group.WORLD, dist.group.WORLD, ranks, dist.get_rank())


def load(folder, group=group, **keys):
    model = Model.model_validate({"name": str(folder), **keys})
    return load_base(model, torch.device("cpu"), ["a", "b", "c"], seed=1, group=group)
"""
SAME = (
    LOAD
    + """
def outcome(base):
    states = base.read_some(2, 4, 3)
    inputs = torch.linspace(-1, 1, 3 * base.hidden_size, dtype=base.dtype).view(1, 3, -1).requires_grad_()
    extra = {} if not base.model.config.is_encoder_decoder else {"decoder_inputs_embeds": inputs}
    out = base.model(inputs_embeds=inputs, **with_cache(base.model, None), **extra)[0]
    out.square().sum().backward()
    return states.detach(), out.detach(), inputs.grad


*folders, few_experts, pickled = sys.argv[1:]
for folder in (few_experts, pickled):
    try:
        load(folder)
    except UserError as error:
        print(error, flush=True)
for folder in folders:
    for keys in ({}, {"gradient_checkpointing": True, "dtype": "bfloat16"}):
        cut, entire = load(folder, **keys), load(folder, None, **keys)
        assert cut.fingerprint == entire.fingerprint, folder
        assert type(cut.model) is type(entire.model), folder
        for one, other in zip(outcome(cut), outcome(entire), strict=True):
            assert torch.isfinite(one).all() and one.abs().max() > 0, folder
            assert torch.equal(one, other), (folder, keys)
        group.release()
        held = {name: getattr(p, "to_local", lambda p=p: p)().numel() for name, p in cut.model.named_parameters()}
        sizes = {name: p.numel() for name, p in entire.model.named_parameters()}
        assert held.keys() == sizes.keys()
        layers = [name for name in sizes if any(part.isdigit() for part in name.split("."))]
        for name, p in entire.model.named_parameters():
            rows = [len(part) for part in torch.arange(len(p)).chunk(len(ranks))]
            mine = rows[dist.get_rank()] if dist.get_rank() < len(rows) else 0
            assert held[name] == (p[0].numel() * mine if name in layers else p.numel()), name
    print(folder, "same", flush=True)
"""
)

MEMORY = (
    LOAD
    + """
from fedhpc.bench.compute import peak_bytes, reset_peak
from fedhpc.models.sharding import shard
from fedhpc.ranks.memory import return_freed_memory

return_freed_memory()
device = torch.device("cpu")
layers = torch.nn.ModuleList(torch.nn.Linear(1500, 1500) for _ in range(6)).requires_grad_(False)
shard(layers, group, device)
passes = [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0] * 3
for number in passes:
    group.need(number)
group.release()
before, received = reset_peak(device), group.account.received_bytes
for number in passes[:-1]:
    group.need(number)
print((peak_bytes(device) - before) / layers[0].weight.nbytes, (group.account.received_bytes - received) / 9e6)
"""
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random model of each family, with its tokenizer."""
    root = tmp_path_factory.mktemp("models")
    save_random_llama(root / "llama")
    save_random_bert(root / "bert")
    save_random_t5(root / "t5")
    tokenizer = tf.AutoTokenizer.from_pretrained(BUILTIN)
    for name, make in CAUSAL.items():
        torch.manual_seed(0)
        # In several files, as large models come.
        make(len(tokenizer)).double().save_pretrained(root / name, max_shard_size="100KB")
        tokenizer.save_pretrained(root / name)
    few = tf.MixtralConfig(vocab_size=len(tokenizer), num_local_experts=4, **SHAPE)
    tf.MixtralForCausalLM(few).save_pretrained(root / "with few experts")
    tokenizer.save_pretrained(root / "with few experts")
    shutil.copytree(root / "llama", root / "without safetensors", ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save({}, root / "without safetensors" / "pytorch_model.bin")
    return {path.name: path for path in sorted(root.iterdir())}


def run(ranks: int, program: str, *arguments: object) -> list[Result]:
    script = f"import sys\nsys.argv[1:] = {json.dumps([str(a) for a in arguments])}\n{program}"
    return run_ranks(ranks, script, "forked")


def test_the_same_bits_on_three_ranks(folders: dict[str, Path]) -> None:
    results = run(3, SAME, *folders.values())
    for result in results:
        assert (result.code, result.err) == (0, ""), result.err
        few, pickled, *same = result.out.splitlines()
        assert few == (
            "runtime.worker_ranks: 4 experts cannot be divided among 3 ranks so that each holds some of them; use 2"
        )
        assert pickled == (
            "runtime.worker_ranks: this model has no safetensors, of which parts can be read; save it anew with "
            "transformers (save_pretrained), or give 1"
        )
        assert same == [f"{folder} same" for folder in [*folders.values()][:-2]]


def test_a_rank_has_two_whole_layers_at_most() -> None:
    """The one that computes and the next one on its way, or the next one as it arrives and as it is used."""
    for result in run(2, MEMORY):
        assert (result.code, result.err) == (0, ""), result.err
        layers, received = map(float, result.out.split())
        assert 1.8 < layers < 2.4
        # Halves of the first layer, of two for each of three times forth and back, and of none for nothing.
        assert received == pytest.approx((1 + 3 * 10) / 2, rel=0.01)
