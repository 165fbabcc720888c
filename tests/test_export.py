"""What a run exports, loaded by transformers and PEFT alone: the same losses and texts as reported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedhpc.methods.adapter import load
from fedhpc.models.load import BUILTIN
from tests.federations import federate, settings, table, tree, write_texts


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


def check(model: Any, tokenizer: Any, run_dir: Path, texts: Path, length: int = 12) -> None:
    """The model loses what /test says and writes what /samples shows; the untouched base does neither."""
    model.eval()
    reported = float(table(run_dir, "test")["loss"])
    assert loss_of(model, tokenizer, rows_of(texts)) == pytest.approx(reported, abs=1e-5)
    assert abs(reported - float(table(run_dir, "base")["loss"])) > 1e-3
    samples = table(run_dir, "samples")
    assert len(samples["text"]) == 3  # so many different prompts are in the ten rows
    for prompt, text in zip(samples["prompt"], samples["text"], strict=True):
        assert text_of(model, tokenizer, prompt, length) == text


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
    check(PeftModel.from_pretrained(base, tmp_path / "adapter"), tokenizer, tmp_path, texts)


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


def test_the_clients_of_a_local_run_have_adapters_of_their_own(tmp_path: Path, texts: Path) -> None:
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
