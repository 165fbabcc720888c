"""Several examples in one row are trained as each is in a row of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.approaches.averaging.packing import require_packing
from fedhpc.data.tokens import Spans, Tokens, examples_from
from fedhpc.errors import UserError
from fedhpc.methods.base import Attached, Method
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.packing import pack
from fedhpc.training.block import Trained, Work
from tests import tiny
from tests.federations import federate, final, settings, table, tree, write_texts

METHODS: dict[str, dict[str, Any]] = {
    "prefix": {"num_virtual_tokens": 3, "init_text": "some words"},
    "lora": {"rank": 2},
    "ia3": {},
    "adapter": {"bottleneck": 4},
    "full": {},
}


def make(base: Any, name: str, **options: Any) -> Method:
    method: Method = registry.choice("methods", name)(registry.options("methods", name)(**options), base, 0)
    return method


def trained(family: str, name: str, **client: Any) -> Trained:
    """Two steps of three clients (one by one where they cannot share a base) in 64 bits."""
    base, data = tiny.base(family), tiny.examples()
    method = make(base, name, **METHODS[name])
    start = method.payload.flatten({n: t.double() for n, t in method.initial().items()}).unsqueeze(0)
    works = [Work(i, np.arange(i * 20, i * 20 + size)) for i, size in enumerate((20, 7, 13))]
    raw = {"optimizer": "sgd", "lr": 0.5, "clip_norm": 1.0, "batch_size": 8, "steps": 2, **client}
    config = configuration.resolve({"partition": {"name": "iid"}, "client": raw})
    works = works if method.shares_base else works[:1]
    return tiny.train(base, method, tiny.objective(base), start, works, data, config)


@pytest.mark.parametrize(
    ("family", "name"),
    [*((family, "lora") for family in tiny.FAMILIES), *(("gpt2", n) for n in METHODS), ("llama", "prefix")],
)
def test_packed_rows_train_as_rows_of_their_own(family: str, name: str) -> None:
    packed, apart = trained(family, name, packing=True), trained(family, name)
    moved = torch.linalg.vector_norm(apart.updates, dim=1)
    assert float(moved.min()) > 1e-2
    assert float((torch.linalg.vector_norm(packed.updates - apart.updates, dim=1) / moved).max()) < 1e-9
    np.testing.assert_allclose(packed.loss_sum, apart.loss_sum, rtol=1e-10)
    np.testing.assert_array_equal(packed.tokens, apart.tokens)
    assert packed.input_tokens - packed.padded_tokens == apart.input_tokens - apart.padded_tokens


def test_micro_batches_are_packed_too() -> None:
    packed = trained("llama", "lora", packing=True, batch_size=4, gradient_accumulation_steps=2)
    np.testing.assert_allclose(packed.updates, trained("llama", "lora").updates, rtol=0, atol=1e-12)


def test_rows_are_filled_and_belong_to_one_client() -> None:
    rng = np.random.default_rng(0)
    sizes, clients = rng.integers(0, 50, 200), rng.integers(0, 4, 200)
    row, first = pack(sizes, clients)
    used = np.zeros((row.max() + 1, 50), int)
    for size, r, c in zip(sizes, row, first, strict=True):
        used[r, c : c + size] += 1
    assert used.max() == 1 and used.sum() == sizes.sum()
    assert all(len(set(clients[row == r])) == 1 for r in range(row.max() + 1))
    assert len(used) <= np.ceil(11 / 9 * sizes.sum() / sizes.max()) + 4  # Johnson's bound, for each client
    np.testing.assert_array_equal(pack(np.array([3]), np.array([0])), ([0], [0]))


def model(network: Any) -> Any:
    torch.manual_seed(0)
    return CausalLM.of(network.eval().requires_grad_(False), tiny.TinyTokenizer(), torch.device("cpu"), "some", "some")


def bloom() -> Any:
    return model(tf.BloomForCausalLM(tf.BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4)))


def mistral() -> Any:
    shape = tf.MistralConfig(
        vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=96, sliding_window=16,
    )  # fmt: skip
    return model(tf.MistralForCausalLM(shape))


@pytest.mark.parametrize(
    ("base", "name", "options", "message"),
    [
        (bloom, "lora", {}, r"'some' \(bloom\) does not read several texts in one row"),
        (mistral, "lora", {}, "looks at the last 16 tokens alone, and a text has up to 20"),
        (lambda: tiny.base("llama"), "prompt", {"init": "random"}, "embeddings in front of a row, which several"),
        (lambda: tiny.base("llama"), "lora", {"dropout": 0.1}, "dropout by the position in a row, which several"),
        (lambda: tiny.base("bert"), "lora", {}, "client.packing: model.task classification has a row for every"),
    ],
)
def test_what_cannot_share_rows_is_refused(base: Any, name: str, options: dict[str, Any], message: str) -> None:
    base = base()
    with pytest.raises(UserError, match=message):
        require_packing(tiny.objective(base), make(base, name, **options), 20)


def test_a_window_that_no_text_fills_is_none() -> None:
    base = mistral()
    require_packing(tiny.objective(base), make(base, "lora"), 16)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_texts_are_read_as_by_themselves(attention: str) -> None:
    base, data = tiny.base("llama"), tiny.examples()
    base.model.set_attn_implementation(attention)
    chosen = np.arange(60)
    batch = base.packed(data, chosen, chosen % 2)
    apart = base.states(Attached(), base.batch(data, chosen))
    torch.testing.assert_close(base.states(Attached(), batch), apart, rtol=0, atol=1e-10)
    assert batch.tokens < base.batch(data, chosen).tokens


def test_several_spans_of_a_text_are_packed() -> None:
    """As the assistant turns of a chat are."""
    base, data = tiny.base("llama"), tiny.examples()
    starts = np.stack([data.prompt_lengths, data.lengths - 2], axis=1)
    ends = np.minimum(starts + 2, data.lengths[:, None])
    spans = Spans(np.arange(len(data) + 1) * 2, *(one.ravel().astype(np.int32) for one in (starts, ends)))
    tokens = Tokens(data.ids, data.offsets, data.prompt_lengths)
    chats, chosen = examples_from(tokens, spans=spans), np.arange(60)
    packed, apart = base.packed(chats, chosen, chosen % 2), base.batch(chats, chosen)
    assert torch.equal(packed.targets, apart.targets) and np.array_equal(packed.supervised, apart.supervised)
    states = [base.states(Attached(), batch) for batch in (packed, apart)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-10)


def test_a_run_on_any_ranks(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    texts = write_texts(tmp_path_factory.mktemp("texts"))
    raw = tree(texts, model={"dtype": "float64"}, client={"lr": 1.0}, federation={"rounds": 2, "cohort_size": 4})
    federate(settings(tmp_path / "apart", raw))
    packed = {**raw, "client": {**raw["client"], "packing": True}}
    for ranks in (1, 3):
        federate(settings(tmp_path / str(ranks), packed), ranks)
    apart, one, three = (final(tmp_path / name) for name in ("apart", "1", "3"))
    for name in one:
        np.testing.assert_array_equal(one[name], three[name])
        np.testing.assert_allclose(one[name], apart[name], rtol=0, atol=1e-9)
    fewer, more = (table(tmp_path / name, "rounds")["padded_tokens"].sum() for name in ("1", "apart"))
    assert fewer <= more
