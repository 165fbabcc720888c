"""What a run exports, loaded by transformers and PEFT alone: the same losses and texts as reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from peft import AutoPeftModelForCausalLM, AutoPeftModelForSeq2SeqLM, AutoPeftModelForSequenceClassification, PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedhpc
import fedhpc.customized
from fedhpc.export import __main__ as export
from fedhpc.methods.adapter import load
from fedhpc.models.load import BUILTIN
from tests import federations
from tests.federations import PEFT_FORGETS, federate, final, settings, table, tree, write_texts


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def rows_of(texts: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (texts / "test.jsonl").read_text().splitlines()]


def loss_of(model: Any, tokenizer: Any, rows: list[dict[str, str]]) -> float:
    """Mean loss over the targets' tokens, one text at a time, as `[bos] prompt target [eos]`."""
    total, count = 0.0, 0
    for row in rows:
        prompt = tokenizer(f"{row['mr']} :", add_special_tokens=False).input_ids
        target = [*tokenizer(f" {row['ref']}", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
        ids = torch.tensor([[tokenizer.bos_token_id, *prompt, *target]])
        with torch.no_grad():
            logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0]
        losses = torch.nn.functional.cross_entropy(logits[:-1], ids[0, 1:], reduction="none")
        total += float(losses[-len(target) :].sum())
        count += len(target)
    return total / count


def text_of(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    """The greedy continuation of a prompt."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False).input_ids]])
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=length,
        do_sample=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )[0, ids.shape[1] :].tolist()
    out = out[: out.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in out else out
    text: str = tokenizer.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()


def check(model: Any, tokenizer: Any, run_dir: Path, texts: Path, length: int = 12, writes: bool = True) -> None:
    """The model loses what /test says, unlike the untouched base, and `writes` what /samples shows."""
    model.eval()
    reported = float(table(run_dir, "test")["loss"])
    assert loss_of(model, tokenizer, rows_of(texts)) == pytest.approx(reported, abs=1e-5)
    assert abs(reported - float(table(run_dir, "base")["loss"])) > 1e-3
    samples = table(run_dir, "samples")
    assert len(samples["text"]) == 3  # so many different prompts are in the ten rows
    if writes:
        assert [text_of(model, tokenizer, prompt, length) for prompt in samples["prompt"]] == samples["text"].tolist()


def raw_of(texts: Path, **changes: Any) -> dict[str, Any]:
    common = {
        "client": {"optimizer": "adamw", "lr": 0.05},
        "federation": {"cohort_size": 4},
        "evaluation": {"samples": 4, "max_new_tokens": 12},
    }
    return tree(texts, **{**common, **changes})


EXCHANGES = [
    {"exchange": "raw"},
    {"exchange": "mlp", "hidden_size": 16, "init": "random"},
    {"exchange": "materialised", "hidden_size": 16},
]


@pytest.mark.parametrize("exchange", EXCHANGES, ids=lambda e: e["exchange"])
@pytest.mark.parametrize("name", ["builtin", "tinystories-260k"])
def test_a_prefix_loads_in_peft(
    tmp_path: Path, texts: Path, name: str, exchange: dict[str, Any], request: pytest.FixtureRequest
) -> None:
    folder = BUILTIN
    if name != "builtin":
        folder = request.getfixturevalue("shared") / "models" / name
        if not folder.is_dir():
            pytest.skip(f"no {name} in shared/models")
    source = "builtin" if name == "builtin" else str(folder)
    raw = raw_of(texts, model={"name": source}, data={"max_length": 480}, method=exchange)
    federate(settings(tmp_path, raw), ranks=2)
    about = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert about["prefix_projection"] is False
    base = AutoModelForCausalLM.from_pretrained(about["base_model_name_or_path"])
    tokenizer = AutoTokenizer.from_pretrained(folder)
    untouched = loss_of(base.eval(), tokenizer, rows_of(texts))
    assert untouched == pytest.approx(float(table(tmp_path, "base")["loss"]), abs=1e-5)
    model = PeftModel.from_pretrained(base, tmp_path / "adapter")
    check(model, tokenizer, tmp_path, texts, writes=not PEFT_FORGETS)


@pytest.mark.parametrize("placement", ["houlsby", "pfeiffer"])
def test_adapters_load_into_a_plain_model(tmp_path: Path, texts: Path, placement: str) -> None:
    raw = raw_of(texts, client={"optimizer": "adamw", "lr": 0.05})
    federate(settings(tmp_path, {**raw, "method": {"name": "adapter", "placement": placement}}), ranks=2)
    base = AutoModelForCausalLM.from_pretrained(texts / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(texts / "model")
    check(load(base, tmp_path / "adapter"), tokenizer, tmp_path, texts)


@pytest.mark.parametrize(
    ("dtype", "method"),
    [
        ("float32", {"name": "full"}),
        ("bfloat16", {"name": "full"}),
        ("float32", {"name": "full", "last_layers": 1}),
    ],
    ids=str,
)
def test_a_tuned_model_loads_in_transformers_and_in_the_next_run(
    tmp_path: Path, texts: Path, dtype: str, method: dict[str, Any]
) -> None:
    raw = raw_of(texts, model={"dtype": dtype}, client={"optimizer": "sgd", "lr": 1.0})
    first = tmp_path / "first"
    federate(settings(first, {**raw, "method": method}), ranks=2)
    folder = first / "adapter"
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    assert next(model.parameters()).dtype == getattr(torch, dtype)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if dtype == "float32":
        check(model, tokenizer, first, texts)
    # The base of the next run is what this one ended with.
    second = tmp_path / "second"
    federate(settings(second, {**raw, "model": {"name": str(folder), "dtype": dtype}}))
    ended, begins = float(table(first, "test")["loss"]), float(table(second, "base")["loss"])
    assert begins == pytest.approx(ended, abs=1e-6)


def test_the_clients_of_a_local_run_have_adapters_of_their_own(
    tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = raw_of(texts, mode="local", local={"max_clients": 3}, federation={"rounds": 3})
    federate(settings(tmp_path, raw), ranks=2)
    tokenizer = AutoTokenizer.from_pretrained(texts / "model")
    clients = np.unique(table(tmp_path, "clients")["client_id"])
    losses = []
    for client in clients:
        base = AutoModelForCausalLM.from_pretrained(texts / "model", dtype=torch.float32)
        model = PeftModel.from_pretrained(base, tmp_path / "adapter" / str(client)).eval()
        losses.append(loss_of(model, tokenizer, rows_of(texts)))
    assert len(set(losses)) == 3
    assert np.mean(losses) == pytest.approx(float(table(tmp_path, "test")["loss"]), abs=1e-5)
    assert export.main([str(tmp_path), "--client", str(clients[1]), "--adapter", str(tmp_path / "one")]) == 0
    tensors = [tmp_path / folder / "adapter_model.safetensors" for folder in ("one", f"adapter/{clients[1]}")]
    assert tensors[0].read_bytes() == tensors[1].read_bytes()
    last = table(tmp_path, "rounds")["round"][-1]  # fewer than federation.rounds: as many as it would be sampled for
    assert last < 3 and f"client {clients[1]}, round {last} of {last}." in (tmp_path / "one/README.md").read_text()
    assert export.main([str(tmp_path), "--adapter", str(tmp_path / "all")]) == 2
    assert "where each client has a model; give --client" in capsys.readouterr().err


# ---------------------------------------------------------------- fedhpc.load

METHODS: dict[str, dict[str, Any]] = {
    "prefix": {"name": "prefix", "num_virtual_tokens": 4},
    "prompt": {"name": "prompt", "num_virtual_tokens": 4},
    "p_tuning": {"name": "p_tuning", "num_virtual_tokens": 4, "hidden_size": 8},
    "lora": {"name": "lora", "rank": 2},
    "ia3": {"name": "ia3"},
    "adapter": {"name": "adapter", "bottleneck": 4},
    "full": {"name": "full"},
}
IN_PEFT = [name for name in METHODS if name not in ("adapter", "full")]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, texts: Path) -> dict[str, Path]:
    """A random model of each sort, large enough in its weights that what is trained shows in its texts."""
    folder = tmp_path_factory.mktemp("models")
    (folder / "t5").mkdir()
    (folder / "bert").mkdir()
    federations.save_random_t5(folder / "t5")
    federations.save_random_bert(folder / "bert")
    model = transformers.T5ForConditionalGeneration.from_pretrained(folder / "t5")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4.0 if p.ndim == 2 else 1.0)
    model.save_pretrained(folder / "t5")
    tokenizer = AutoTokenizer.from_pretrained(folder / "bert")
    shape = transformers.ModernBertConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, pad_token_id=0, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.ModernBertModel(shape).double().save_pretrained(folder / "modernbert")
    tokenizer.save_pretrained(folder / "modernbert")
    return {"llama": texts / "model", **{name: folder / name for name in ("t5", "bert", "modernbert")}}


def cases(name: str, quick: list[str]) -> list[Any]:
    """A model with every method; those that are not `quick` are slow."""
    return [pytest.param(name, m, marks=[] if m in quick else pytest.mark.slow) for m in METHODS]


def exported(run_dir: Path, texts: Path, model: Path | str, method: dict[str, Any], **changes: Any) -> Path:
    """The adapter of a short run."""
    raw = raw_of(texts, client={"optimizer": "adamw", "lr": 0.05, "steps": 4}, **changes)
    raw["model"] = {"name": str(model), "dtype": "float64"}
    federate(settings(run_dir, {**raw, "method": method}))
    return run_dir / "adapter"


@pytest.mark.filterwarnings("ignore:Position ids are not supported")  # PEFT's own
@pytest.mark.parametrize(("name", "method"), [*(("llama", m) for m in METHODS), *cases("t5", ["prefix", "lora"])])
def test_a_loaded_export_writes_the_samples(
    tmp_path: Path, texts: Path, models: dict[str, Path], name: str, method: str
) -> None:
    data = {} if name == "llama" else {"prompt": "{mr}", "target": "{ref}"}
    folder = exported(tmp_path, texts, models[name], METHODS[method], data=data)
    samples = table(tmp_path, "samples")
    prompts, written = samples["prompt"].tolist(), samples["text"].tolist()
    assert len({*map(len, prompts)}) > 1 and any(written)  # so the batch is padded
    model = fedhpc.load(folder)
    assert model.generate(prompts, 12) == written
    assert [model.generate([prompt], 12)[0] for prompt in prompts] == written
    base = fedhpc.load(models[name]).generate(prompts, 12)
    assert base != written
    if method in IN_PEFT:
        auto = AutoPeftModelForCausalLM if name == "llama" else AutoPeftModelForSeq2SeqLM
        in_peft = auto.from_pretrained(folder, dtype="float64").eval()
        forgets = PEFT_FORGETS and (method == "prefix" or (name == "llama" and method in ("prompt", "p_tuning")))
        texts_of = text_of if name == "llama" else answer_of
        assert ([texts_of(in_peft, model.tokenizer, p, 12) for p in prompts] == written) != forgets


def answer_of(model: Any, tokenizer: Any, prompt: str, length: int) -> str:
    """The greedy answer of an encoder-decoder."""
    out = model.generate(**tokenizer(prompt, return_tensors="pt"), max_new_tokens=length, do_sample=False)[0]
    text: str = tokenizer.decode(out, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.strip()


# With ModernBERT's head PEFT stores the norm in it, which stays as it is.
@pytest.mark.parametrize(
    ("name", "method"),
    [*cases("bert", ["prefix", "lora", "adapter"]), ("modernbert", "lora"), ("modernbert", "prompt")],
)
def test_a_loaded_classifier_has_the_logits_of_its_own_library(
    tmp_path: Path, texts: Path, models: dict[str, Path], name: str, method: str
) -> None:
    changes = {"data": {"prompt": "{mr}", "max_length": 40}, "evaluation": {"metrics": ["loss"]}}
    folder = exported(tmp_path, texts, models[name], METHODS[method], **changes)
    rows = rows_of(texts)
    model = fedhpc.load(folder)
    logits = model.logits([row["mr"] for row in rows])
    classes = [model.model.config.id2label[i] for i in range(logits.shape[1])]
    right = torch.tensor([classes.index(row["label"]) for row in rows])
    loss = float(torch.nn.functional.cross_entropy(logits, right))
    assert loss == pytest.approx(float(table(tmp_path, "test")["loss"]), abs=1e-9)
    assert loss != pytest.approx(float(table(tmp_path, "base")["loss"]), abs=1e-3)
    if method == "full":
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder, dtype="float64")
    elif method in IN_PEFT:
        names = transformers.AutoConfig.from_pretrained(folder)
        theirs = AutoPeftModelForSequenceClassification.from_pretrained(
            folder, dtype="float64", id2label=names.id2label, label2id=names.label2id
        )
    else:
        return
    if PEFT_FORGETS and method == "prefix":
        with pytest.raises(ValueError, match="does not support past key values"):
            theirs(**model.tokenizer("a", return_tensors="pt"))
        return
    with torch.no_grad():
        alone = [theirs.eval()(**model.tokenizer(row["mr"], return_tensors="pt")).logits[0] for row in rows]
    torch.testing.assert_close(logits, torch.stack(alone), atol=1e-5, rtol=0)  # PEFT keeps adapters in float32
    if method == "lora":  # without its head there would be random numbers
        file = folder / "adapter_model.safetensors"
        save_file({n: t for n, t in load_file(file).items() if not n.endswith("classifier.weight")}, file)
        with pytest.raises(fedhpc.UserError, match=r"lacks classifier\.weight"):
            fedhpc.load(folder)


def test_an_export_is_found_from_any_folder(
    tmp_path: Path, texts: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(models["llama"].parent)
    folder = exported(tmp_path / "run", texts, "./model", METHODS["lora"])
    about = json.loads((folder / "adapter_config.json").read_text())
    assert about["base_model_name_or_path"] == str(models["llama"])
    monkeypatch.chdir("/")
    samples = table(tmp_path / "run", "samples")
    prompt, text = samples["prompt"][0], samples["text"][0]
    assert fedhpc.load(folder).generate([prompt], 12) == [text]
    in_peft = AutoPeftModelForCausalLM.from_pretrained(folder, dtype="float64")
    assert text_of(in_peft, AutoTokenizer.from_pretrained(models["llama"]), prompt, 12) == text


def run_snippets(text: str) -> dict[str, Any]:
    """Run the Python code of a Markdown text that loads an adapter; what it bound."""
    scope: dict[str, Any] = {}
    for snippet in text.split("```python\n")[1:]:
        if "fedhpc.load(" in snippet or "from_pretrained" in snippet:
            exec(snippet.split("```")[0], scope)
    return scope


@pytest.mark.parametrize(("name", "method"), [("llama", "prefix"), ("bert", "lora")])
def test_cards_run_as_they_stand(
    tmp_path: Path, texts: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch, name: str, method: str
) -> None:
    base, changes = models[name], dict[str, Any]()
    if name == "bert":  # with a head of another size, which the adapter's takes the place of
        changes["data"] = {"prompt": "{mr}", "max_length": 40}
        base = tmp_path / "base"
        other = transformers.AutoModelForSequenceClassification.from_pretrained(models[name], num_labels=7)
        other.save_pretrained(base)
        AutoTokenizer.from_pretrained(models[name]).save_pretrained(base)
    folder = exported(tmp_path / "run", texts, base, METHODS[method], **changes)
    card = (folder / "README.md").read_text()
    monkeypatch.chdir(folder)
    model = run_snippets(card)["model"]
    assert isinstance(model, PeftModel)
    if name == "bert":
        stored = json.loads((folder / "config.json").read_text())["id2label"]
        assert list(model.config.id2label.values()) == list(stored.values()) and "LABEL_0" not in stored.values()
        return
    assert "5.24" in card and "`<bos>` (bos)" in card and "does not put that bos there" in card
    assert "position 4, behind the virtual ones" in card and "padded on the right" in card


def test_the_example_in_readme_runs(
    tmp_path: Path, texts: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    exported(tmp_path / "runs" / "mine", texts, models["llama"], METHODS["lora"])
    monkeypatch.chdir(tmp_path)
    readme = (Path(__file__).parents[1] / "README.md").read_text()
    assert isinstance(run_snippets(readme)["model"], fedhpc.customized.Customized)


def test_what_cannot_be_loaded_is_said_in_one_line(tmp_path: Path, texts: Path, models: dict[str, Path]) -> None:
    folder = exported(tmp_path / "run", texts, models["llama"], METHODS["lora"])
    for path, message in (
        (tmp_path / "none", "there is no folder"),
        (tmp_path / "run", f"give '{folder}'"),
        (texts, "no adapter that fedhpc loads"),
    ):
        with pytest.raises(fedhpc.UserError, match=message):
            fedhpc.load(path)
    with pytest.raises(fedhpc.UserError, match="is not a model folder"):
        fedhpc.load(folder, base=str(tmp_path / "none"))
    with pytest.raises(fedhpc.UserError, match="a list of texts"):
        fedhpc.load(folder).generate("one text")  # type: ignore[arg-type]
    with pytest.raises(fedhpc.UserError, match="no logits of classes; use generate"):
        fedhpc.load(folder).logits(["a"])
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "/gone/model"}))
    with pytest.raises(fedhpc.UserError, match="'/gone/model' is not a model folder"):
        fedhpc.load(folder)
    assert fedhpc.load(folder, base=str(models["llama"])).generate(["a"], 2)
    (folder / "adapter_config.json").write_text(json.dumps({**config, "r": 3}))
    with pytest.raises(fedhpc.UserError, match="its tensors do not fit"):
        fedhpc.load(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"half")
    with pytest.raises(fedhpc.UserError, match=r"adapter_model\.safetensors cannot be read"):
        fedhpc.load(folder)


# ---------------------------------------------------------------- how weights are stored


@pytest.mark.parametrize(
    ("dtype", "tied"),
    [
        ("bfloat16", True),
        pytest.param("bfloat16", False, marks=pytest.mark.slow),
        pytest.param("float32", True, marks=pytest.mark.slow),
        pytest.param("float32", False, marks=pytest.mark.slow),
    ],
)
def test_a_model_in_several_files_reloads_as_it_was_tuned(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, tied: bool
) -> None:
    untied = AutoModelForCausalLM.from_pretrained(texts / "model", dtype=torch.float32)
    untied.config.tie_word_embeddings = tied
    if tied:
        untied.tie_weights()
    untied.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(texts / "model").save_pretrained(tmp_path / "base")
    whole = transformers.PreTrainedModel.save_pretrained
    monkeypatch.setattr(
        transformers.PreTrainedModel, "save_pretrained", lambda *a, **k: whole(*a, **{**k, "max_shard_size": "40KB"})
    )
    raw = raw_of(texts, client={"optimizer": "sgd", "lr": 1.0}, model={"name": str(tmp_path / "base"), "dtype": dtype})
    federate(settings(tmp_path / "run", {**raw, "method": {"name": "full"}}))
    folder = tmp_path / "run" / "adapter"
    assert len(list(folder.glob("*.safetensors"))) > 1
    model = AutoModelForCausalLM.from_pretrained(folder)  # in the dtype that it was stored in
    assert model.dtype == getattr(torch, dtype)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    tuned = final(tmp_path / "run")
    for name, p in model.named_parameters():
        assert torch.equal(p, torch.from_numpy(tuned[name]).to(p.dtype)), name
    samples = table(tmp_path / "run", "samples")
    assert fedhpc.load(folder).generate(samples["prompt"].tolist(), 12) == samples["text"].tolist()


@pytest.mark.parametrize("method", ["lora", pytest.param("prefix", marks=pytest.mark.slow)])
def test_an_adapter_of_a_bfloat16_base_is_in_full_precision(tmp_path: Path, texts: Path, method: str) -> None:
    raw = raw_of(texts, model={"dtype": "bfloat16"})
    federate(settings(tmp_path, {**raw, "method": METHODS[method]}))
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    samples = table(tmp_path, "samples")
    model = fedhpc.load(tmp_path / "adapter")
    assert model.model.dtype == torch.bfloat16
    assert model.generate(samples["prompt"].tolist(), 12) == samples["text"].tolist()
