"""LoRA, (IA)^3 and adapters on the output layer, whose tokens are those of all clients: each has its own client's."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
from transformers import LlamaForCausalLM

import fedhpc
from fedhpc.errors import UserError
from fedhpc.methods._peft import _same_weights, adapter_config, adapter_tensors
from fedhpc.methods.adapter import load as load_adapters
from fedhpc.methods.base import Method
from fedhpc.training.schedule import batches
from tests import tiny
from tests.federations import Interrupted, federate, table, tree, write_texts
from tests.federations import settings as run_settings
from tests.test_block import relative, settings, works
from tests.test_export import loss_of, rows_of, text_of
from tests.test_federation import same_results
from tests.test_methods import Bottleneck, make, warm
from tests.test_preferences import of, pairs

# Tied embeddings but for qwen2; Conv1D; a scale in front of the output layer; a bias behind it.
ATTENTION = {"llama": "q_proj", "qwen2": "q_proj", "gpt2": "c_attn", "t5": "q", "bart": "q_proj"}
pytestmark = [
    # PEFT's own.
    pytest.mark.filterwarnings("ignore:.*tie_word_embeddings:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning"),
]
METHODS = ["lora", "ia3-outputs", "ia3-inputs", "adapter"]


def on_output(name: str, base: Any, **options: Any) -> Method:
    """The method on the output layer, and on a layer of attention that sees rows."""
    attention = ATTENTION[base.name]
    if name == "lora":
        return make(name, base, targets=[attention, "lm_head"], **options)
    if name == "adapter":
        return make(name, base, bottleneck=4, activation="tanh", attention=[attention], feed_forward=["lm_head"])
    outputs, inputs = ([attention, "lm_head"], None) if name == "ia3-outputs" else ([attention], ["lm_head"])
    return make("ia3", base, outputs=outputs, inputs=inputs)


def reference(name: str, base: Any, method: Any) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """PEFT's own model, or one with wrapped layers, and what is trained in it under our names."""
    model = copy.deepcopy(base.model)
    if name == "adapter":
        named = {}
        for path in dict.fromkeys(key.split(".adapter.")[0] for key in method.payload.shapes):
            layer = model.get_submodule(path)
            wrapped = Bottleneck(layer, method._layers[path].widths[1], 4, "tanh")
            model.set_submodule(path, wrapped)
            for part in ("down", "up"):
                for key, p in getattr(wrapped, part).named_parameters():
                    named[f"{path}.adapter.{part}.{key}"] = p
        return model, named
    conv = base.name == "gpt2"
    if name == "lora":
        o = method.options
        config: Any = peft.LoraConfig(r=o.rank, lora_alpha=o.alpha, target_modules=method.targets, fan_in_fan_out=conv)
    else:
        names = [*method.outputs, *method.inputs]
        config = peft.IA3Config(target_modules=names, feedforward_modules=method.inputs, fan_in_fan_out=conv)
    model = peft.get_peft_model(model, config).to(base.dtype)
    found = {p.removeprefix("base_model.model.").replace(".default", ""): v for p, v in model.named_parameters()}
    return model, {key: found[key] for key in method.payload.shapes}


def logits_of(base: Any, model: Any, batch: Any) -> torch.Tensor:
    """The logits of a model of transformers or PEFT at the supervised tokens."""
    if hasattr(batch, "source"):
        given = {"input_ids": batch.source, "attention_mask": batch.mask, "decoder_input_ids": batch.ids}
    else:
        given = {"input_ids": batch.ids}
    logits: torch.Tensor = model(**given).logits.flatten(0, 1)[batch.positions]
    return logits


@pytest.mark.parametrize("family", sorted(ATTENTION))
@pytest.mark.parametrize("name", METHODS)
def test_each_client_of_a_block_trains_as_peft_and_torch_optim_do(name: str, family: str) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="sgd", lr=0.1, steps=3)
    method = on_output(name, base)
    start, group = warm(method, torch.float64), works(3)
    found = start - tiny.train(base, method, tiny.objective(base), start, group, data, config).updates
    for after, work in zip(found, group, strict=True):
        model, named = reference(name, base, method)
        with torch.no_grad():
            for key, value in method.payload.views(start[0]).items():
                named[key].copy_(value)
        rule = torch.optim.SGD(named.values(), lr=0.1)
        for picked in batches(len(work.indices), config.client, 0, 1, work.client_id):
            batch = base.batch(data, work.indices[picked])
            rule.zero_grad()
            torch.nn.functional.cross_entropy(logits_of(base, model, batch), batch.targets).backward()
            rule.step()
        wanted = method.payload.flatten({key: p.detach() for key, p in named.items()})
        assert relative(after, wanted, start[0]) < 1e-9


@pytest.mark.parametrize(
    ("what", "name", "options"),
    [
        ("texts", "lora", {"aggregation": "exact"}),
        ("texts", "lora", {"aggregation": "stack", "ranks": [2, 4, 1]}),
        ("texts", "lora", {"aggregation": "ffa", "dropout": 0.3}),
        ("dpo", "lora", {"dropout": 0.3}),
        ("dpo", "adapter", {}),
    ],
    ids=str,
)
def test_a_block_equals_its_clients_alone_and_piece_by_piece(
    what: str, name: str, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, config = tiny.base("llama"), settings(optimizer="adamw", lr=0.02)
    data, objective = (tiny.examples(), tiny.objective(base)) if what == "texts" else (pairs(), of("dpo", base))
    method, group = on_output(name, base, **options), works(3)
    start = warm(method, torch.float64)
    together = tiny.train(base, method, objective, start, group, data, config, 2, 3)
    monkeypatch.setattr("fedhpc.models.base.LOGITS_AT_ONCE", 7 * tiny.VOCABULARY)
    for i, work in enumerate(group):
        alone = tiny.train(base, method, objective, start, [work], data, config, 2, 3)
        assert relative(start[0] - together.updates[i], start[0] - alone.updates[0], start[0]) < 1e-9
        assert together.loss_sum[i] == pytest.approx(alone.loss_sum[0], rel=1e-9)


def test_packed_rows_train_as_rows_of_their_own() -> None:
    base, data = tiny.base("gpt2"), tiny.examples()
    method = on_output("lora", base)
    start = warm(method, torch.float64)
    apart, packed = (
        tiny.train(
            base, method, tiny.objective(base), start, works(3), data, settings(lr=0.02, packing=packing)
        ).updates
        for packing in (False, True)
    )
    assert float((packed - apart).norm() / apart.norm()) < 1e-9


def test_the_output_layer_can_be_all_that_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Then nothing is backpropagated below it."""
    base, data, config = tiny.base("llama"), tiny.examples(), settings(lr=0.02)
    method = make("lora", base, targets=["lm_head"])
    start = warm(method, torch.float64)
    whole = tiny.train(base, method, tiny.objective(base), start, works(3), data, config).updates
    monkeypatch.setattr("fedhpc.models.base.LOGITS_AT_ONCE", 7 * tiny.VOCABULARY)
    pieces = tiny.train(base, method, tiny.objective(base), start, works(3), data, config).updates
    assert float(whole.norm()) > 1e-2
    torch.testing.assert_close(whole, pieces, rtol=1e-9, atol=1e-12)


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    ("family", "name"), [("llama", "lora"), ("qwen2", "adapter"), ("t5", "ia3-inputs"), ("bart", "lora")]
)
def test_a_mixed_batch_is_evaluated_as_each_row_alone(family: str, name: str) -> None:
    """Losses, labels' scores and texts of three clients in one batch, each with its own payload."""
    base, data = tiny.base(family), tiny.examples(6)
    method = on_output(name, base)
    noise = torch.randn(3, method.payload.size, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    payloads = warm(method, torch.float64) + 0.3 * noise
    owner, indices = torch.tensor([2, 0, 1, 1, 2, 0]), np.arange(6)
    prompts = [data.prompt(i) for i in range(6)]

    def computed(payload: torch.Tensor, rows: torch.Tensor, of_rows: np.ndarray) -> tuple[Any, Any, Any]:
        views = method.payload.views(payload)
        batch = base.batch(data, of_rows)
        labels = base.label_rows(data, of_rows, ["ab", "b"])
        with torch.no_grad(), method.attach(views, views, rows) as attached:
            losses = tiny.objective(base).losses(base, attached, batch)
            texts = base.generate(attached, [prompts[i] for i in of_rows], 6)
        with torch.no_grad(), method.attach(views, views, rows.repeat_interleave(2)) as attached:
            scores = base.label_scores(attached, data, labels, np.arange(2 * len(of_rows)), ["ab", "b"])
        return losses.split(batch.supervised.tolist()), texts, scores.view(-1, 2)

    losses, texts, scores = computed(payloads, owner, indices)
    others = computed(payloads, (owner + 1) % 3, indices)
    for i in range(6):
        one = computed(payloads[owner[i]][None], torch.zeros(1, dtype=torch.int64), indices[i : i + 1])
        torch.testing.assert_close(losses[i], one[0][0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(scores[i], one[2][0], rtol=1e-9, atol=1e-9)
        assert texts[i].tolist() == one[1][0].tolist()
        assert not torch.allclose(losses[i], others[0][i], rtol=1e-3)
    assert texts.tolist() != others[1].tolist()


# ---------------------------------------------------------------- exports


@pytest.mark.parametrize(
    ("family", "name", "options"),
    [
        *((family, "lora", {}) for family in ATTENTION),
        *(("llama", name, {}) for name in METHODS[1:]),
        ("bart", "ia3-outputs", {}),
        ("t5", "adapter", {}),
        ("gpt2", "lora", {"aggregation": "stack"}),
        ("llama", "lora", {"aggregation": "ffa"}),
    ],
    ids=str,
)
def test_an_export_has_the_same_logits(name: str, options: dict[str, Any], family: str, tmp_path: Path) -> None:
    """Also where the output layer is tied to the embeddings, which stay what they are."""
    base, data = tiny.base(family), tiny.examples(4)
    method = on_output(name, base, **options)
    values = warm(method, torch.float64)
    method.export(method.payload.views(values[0]), tmp_path)
    views, batch = method.payload.views(values), base.batch(data, np.arange(4))
    with torch.no_grad(), method.attach(method.start(views), views, torch.zeros(4, dtype=torch.int64)) as attached:
        ours = base.logits(attached, base.states(attached, batch), batch.row)
    plain = copy.deepcopy(base.model)
    loaded = load_adapters(plain, tmp_path) if name == "adapter" else peft.PeftModel.from_pretrained(plain, tmp_path)
    torch.testing.assert_close(logits_of(base, loaded.double().eval(), batch), ours, rtol=1e-6, atol=1e-6)
    assert not torch.allclose(logits_of(base, base.model, batch), ours, atol=1e-2)
    assert torch.equal(plain.get_input_embeddings().weight, base.model.get_input_embeddings().weight)


@pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`:UserWarning")  # PEFT's own
def test_what_peft_saved_is_gone_on_from(tmp_path: Path) -> None:
    """PEFT saves the weight of an adapted output layer too."""
    base = tiny.base("llama")
    method = on_output("lora", base)
    model, named = reference("lora", base, method)
    values = warm(method, torch.float64)[0]
    with torch.no_grad():
        for key, value in method.payload.views(values).items():
            named[key].copy_(value)
    model.save_pretrained(tmp_path)
    taken = method.imported(adapter_config(tmp_path), adapter_tensors(tmp_path, base))
    torch.testing.assert_close(method.payload.flatten(taken), values)
    with pytest.raises(UserError, match=r"holds lm_head.base_layer.weight, which is not that of 'llama'"):
        adapter_tensors(tmp_path, tiny.base("llama", seed=1))


def test_weights_in_the_other_type_of_16_bits_are_the_same_weights() -> None:
    """What float16 and bfloat16 make of the same numbers, the smallest among them, is not equal to the bit."""
    weights = torch.randn(50, 60, generator=torch.Generator().manual_seed(0)) * 0.02
    weights[0, :9] = torch.tensor([0, 1e-9, -3e-8, 5e-8, 6e-7, 1e-5, 3.14159, -800.3, 2e4])
    types = [weights.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64)]
    assert not torch.equal(types[0].to(torch.bfloat16), types[1])
    for one, other in itertools.permutations(types, 2):
        if {one.dtype, other.dtype} != {torch.float32, torch.float64}:
            assert _same_weights(one, other)
            changed = other.clone()
            changed[3, 4] += 0.01
            assert not _same_weights(one, changed)
    assert not _same_weights(types[0], types[1].T) and not _same_weights(types[0], types[1][:1])


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small data set, and a model whose output layer has the weight of the embeddings."""
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    model.config.tie_word_embeddings = True
    model.tie_weights()
    model.save_pretrained(folder / "model")
    return folder


def test_a_run_on_any_number_of_ranks_and_what_it_exports(texts: Path, tmp_path: Path) -> None:
    raw = tree(
        texts,
        model={"dtype": "float64"},
        federation={"rounds": 2},
        client={"optimizer": "adamw", "lr": 0.05, "steps": 4},
        evaluation={"samples": 4, "client_fraction": 0.2},
    ) | {"method": {"name": "lora", "rank": 2, "targets": ["q_proj", "lm_head"]}}
    whole = federate(run_settings(tmp_path / "1", raw))
    federate(run_settings(tmp_path / "3", raw), ranks=3)
    same_results(tmp_path / "1", tmp_path / "3")
    with pytest.raises(Interrupted):
        federate(run_settings(tmp_path / "stopped", raw), stop_at=whole // 2)
    federate(run_settings(tmp_path / "stopped", raw), ranks=2)
    same_results(tmp_path / "1", tmp_path / "stopped", ("rounds", "clients"))

    samples, adapter = table(tmp_path / "1", "samples"), tmp_path / "1" / "adapter"
    prompts, written = samples["prompt"].tolist(), samples["text"].tolist()
    model = fedhpc.load(adapter)
    assert model.generate(prompts, 8) == written
    assert fedhpc.load(texts / "model").generate(prompts, 8) != written
    in_peft = peft.AutoPeftModelForCausalLM.from_pretrained(adapter, dtype="float64").eval()
    assert [text_of(in_peft, model.tokenizer, prompt, 8) for prompt in prompts] == written
    reported = float(table(tmp_path / "1", "test")["loss"])
    assert abs(loss_of(in_peft, model.tokenizer, rows_of(texts)) - reported) < 1e-5
    assert "Do not merge it with PEFT" in (adapter / "README.md").read_text()
