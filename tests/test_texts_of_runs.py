"""What a run makes of its texts: the loss is that of the whole text, and what is cut is said and shown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
import transformers as tf

from fedhpc.approaches.describe import describe
from fedhpc.approaches.prepare import prepare
from fedhpc.config import Config
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from tests.federations import federate, settings, table
from tests.test_encoding import ids, llama

RULE, ROOM = "Rule 7: answer in one word, not two.", 14


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of a classification as text, and a random Llama with a tokenizer in the manner of Llama 2."""
    folder = tmp_path_factory.mktemp("texts")
    for split, count in (("train", 24), ("validation", 4), ("test", 6)):
        lines = [
            {"q": f"Question: is it {'red ' * (i % 3 + 1)}? Answer:", "a": ["yes", "no", "not sure"][i % 3]}
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tokenizer = llama()
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = tf.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=0, initializer_range=0.3,
    )  # fmt: skip
    tf.LlamaForCausalLM(shape).save_pretrained(folder / "model")
    return folder


def config(folder: Path, run: Path, **data: Any) -> Config:
    return settings(
        run,
        {
            "model": {"name": str(folder / "model")},
            "data": {"source": str(folder), "prompt": "{q}", "target": " {a}", "label": "a", "max_length": 64, **data},
            "partition": {"name": "iid", "num_clients": 3},
            "method": {"name": "prefix", "num_virtual_tokens": 2},
            "federation": {"rounds": 1, "cohort_size": 2},
            "client": {"steps": 1, "batch_size": 2},
            "evaluation": {"samples": 2, "max_new_tokens": 3, "metrics": ["loss", "accuracy", "rouge_l"]},
        },
    )


def theirs(folder: Path, prompt: str, target: str) -> tuple[float, int]:
    """transformers' own loss of the target in the whole text, added up, and its tokens."""
    tokenizer = tf.AutoTokenizer.from_pretrained(folder / "model")
    model = tf.AutoModelForCausalLM.from_pretrained(folder / "model")
    row = torch.tensor([[1, *ids(tokenizer, prompt + target), 2]])
    first = 1 + len(ids(tokenizer, prompt))
    labels = torch.where(torch.arange(row.shape[1])[None] < first, -100, row)
    count = row.shape[1] - first
    with torch.no_grad():
        return float(model(input_ids=row, labels=labels).loss) * count, count


def test_losses_and_labels_are_those_of_the_whole_text(folder: Path, tmp_path: Path) -> None:
    federate(config(folder, tmp_path / "run"))
    rows = [json.loads(line) for line in (folder / "test.jsonl").read_text().splitlines()]
    targets = sorted({f" {row['a']}" for row in rows})
    scores = [{target: theirs(folder, row["q"], target) for target in targets} for row in rows]
    right = [score[f" {row['a']}"] for score, row in zip(scores, rows, strict=True)]
    best = [min(score, key=lambda target: score[target][0]) for score in scores]
    with h5py.File(tmp_path / "run" / "results.h5") as file:
        assert abs(file["base/loss"][()] - sum(s for s, _ in right) / sum(n for _, n in right)) < 1e-4
        assert file["base/accuracy"][()] == sum(b == f" {row['a']}" for b, row in zip(best, rows, strict=True)) / 6
    assert table(tmp_path / "run", "samples")["prompt"].tolist()[0] == rows[0]["q"]
    assert not [line for line in table(tmp_path / "run", "events")["message"] if "lose" in line or "apart" in line]


def test_what_is_cut_is_said_and_samples_show_the_rest(folder: Path, tmp_path: Path) -> None:
    tokenizer = tf.AutoTokenizer.from_pretrained(folder / "model")
    asked = config(folder, tmp_path / "run", prompt=RULE + " {q}", max_length=ROOM)
    approach = prepare(asked, LoopbackTransport(), Launch(), write_cache=False)
    lines = [line for line in approach.data.messages if "lose" in line]
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    longest_label = max(len(ids(tokenizer, f"is {a}")) - len(ids(tokenizer, "is")) for a in ("yes", "no", "not sure"))
    needed = [1 + len(ids(tokenizer, f"{RULE} {row['q']}")) + longest_label + 1 for row in rows]
    lost = [max(n - ROOM, 0) for n in needed]
    assert lines[0] == (
        f"data: {sum(n > 0 for n in lost)} of 24 rows of train lose {sum(lost)} tokens of their prompts; the longest "
        f"has {max(needed)} tokens, data.max_length is {ROOM}"
    )
    assert len(lines) == 3 and set(lines) <= set(describe(approach, LoopbackTransport()))  # --check
    federate(asked)
    federate(config(folder, tmp_path / "three", prompt=RULE + " {q}", max_length=ROOM), ranks=3)
    over_rounds, on_three = (table(tmp_path / name, "eval_samples") for name in ("run", "three"))
    assert over_rounds["round"].tolist() == [0, 0, 1, 1] and len(set(over_rounds["prompt"])) == 2
    assert set(json.loads(over_rounds["references"][0])) == {"yes"} and len(set(over_rounds["text"])) > 1
    assert all(list(on_three[name]) == list(over_rounds[name]) for name in over_rounds)
    assert set(lines) <= set(table(tmp_path / "run", "events")["message"])
    for prompt in table(tmp_path / "run", "samples")["prompt"]:
        whole = next(f"{RULE} {row['q']}" for row in rows if f"{RULE} {row['q']}".endswith(prompt))
        left = ROOM - 2 - longest_label
        assert len(prompt) < len(whole) and prompt == tokenizer.decode(ids(tokenizer, whole)[-left:])
