"""The embedded default: the text world's rows and the base that was pretrained on its general text."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedhpc.builtin import SPLITS, TASKS, base_path, rows
from fedhpc.errors import UserError

COLUMNS = {
    "dining": {"mr", "ref", "name", "client", "label"},
    "chats": {"messages", "label", "client"},
    "preferences": {"mr", "chosen", "rejected", "client", "label"},
    "topics": {"text", "label", "client"},
    "passages": {"id", "title", "text", "client"},
    "questions": {"question", "answer", "passage_id", "passage", "client"},
    "general": {"text", "genre"},
}
COLUMNS["library"] = COLUMNS["questions"]  # of the questions; its train are the passages
SMALL_SPLITS = [(task, split) for task in TASKS for split in SPLITS[task] if (task, split) != ("general", "train")]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(base_path())


@pytest.fixture(scope="module")
def model():
    torch.set_num_threads(1)
    return AutoModelForCausalLM.from_pretrained(base_path()).eval()


def digest(task: str, split: str) -> str:
    return hashlib.sha256(json.dumps(rows(task, split)).encode()).hexdigest()


def mean_loss(model, tokenizer, texts: list[str]) -> float:
    batch = tokenizer(["<bos>" + text + "<eos>" for text in texts], padding=True, return_tensors="pt")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    with torch.no_grad():
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).item()


def test_rows_are_the_same_in_a_fresh_process_that_imports_no_torch():
    program = (
        "import hashlib, json, sys\n"
        "from fedhpc.builtin import rows\n"
        f"for task, split in {SMALL_SPLITS!r}:\n"
        "    print(hashlib.sha256(json.dumps(rows(task, split)).encode()).hexdigest())\n"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout.split() == [digest(task, split) for task, split in SMALL_SPLITS]


@pytest.mark.parametrize(("task", "split"), SMALL_SPLITS)
def test_columns(task, split):
    written = rows(task, split)
    assert written
    columns = COLUMNS["passages" if (task, split) == ("library", "train") else task]
    assert all(set(row) == columns for row in written)
    assert all(isinstance(value, str) and value for row in written for value in row.values())


def test_unknown_task_and_split_name_the_nearest():
    with pytest.raises(UserError, match="did you mean 'dining'"):
        rows("dinning", "train")
    with pytest.raises(UserError, match="did you mean 'validation'"):
        rows("dining", "validatoin")


def test_dining_sizes_clients_and_labels():
    train = rows("dining", "train")
    sizes = Counter(row["client"] for row in train)
    assert len(train) == 2400
    assert len(sizes) >= 24
    assert max(sizes.values()) >= 5 * min(sizes.values())
    assert set(Counter(row["label"] for row in train)) == {"pub", "cafe", "restaurant", "bakery"}
    assert {row["client"] for row in rows("dining", "test")} == set(sizes)


def test_chats_are_the_rows_of_dining_in_turns():
    chats = [json.loads(row["messages"]) for row in rows("chats", "train")]
    pairs = [(a["content"], b["content"]) for chat in chats for a, b in zip(chat[::2], chat[1::2], strict=True)]
    assert sorted(pairs) == sorted((row["mr"], row["ref"]) for row in rows("dining", "train"))
    assert {len(chat) for chat in chats} == {2, 4, 6}
    assert {tuple(m["role"] for m in chat[:2]) for chat in chats} == {("user", "assistant")}


def test_dining_splits_share_no_list_and_test_has_several_references():
    lists = {split: [row["mr"] for row in rows("dining", split)] for split in SPLITS["dining"]}
    sets = [set(values) for values in lists.values()]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert len(sets[0]) == len(lists["train"])
    assert np.mean(list(Counter(lists["test"]).values())) > 3


def test_dining_references_say_what_the_list_says():
    for row in rows("dining", "test"):
        slots = dict(slot.rstrip("]").split("[") for slot in row["mr"].split(" , "))
        assert slots["name"] == row["name"] and slots["type"] == row["label"]
        for slot in {"name", "type", "food", "rating", "near"} & set(slots):
            assert slots[slot] in row["ref"]


def test_clients_differ_in_domain_and_wording():
    train = rows("dining", "train")
    largest = [client for client, _ in Counter(row["client"] for row in train).most_common(4)]
    kinds = np.array([[Counter(r["label"] for r in train if r["client"] == c)[k] for k in
                       ("pub", "cafe", "restaurant", "bakery")] for c in largest], dtype=float)  # fmt: skip
    assert (kinds.max(1) / kinds.sum(1)).min() > 0.6
    openings = {Counter(r["ref"].replace(r["name"], "X").split()[0] for r in train if r["client"] == c)
                .most_common(1)[0][0] for c in {r["client"] for r in train}}  # fmt: skip
    assert len(openings) >= 4


def test_topics_have_six_labels_and_no_label_in_the_text():
    train = rows("topics", "train")
    labels = {row["label"] for row in train}
    assert len(train) == 2000 and len(labels) == 6
    texts = {split: {row["text"] for row in rows("topics", split)} for split in SPLITS["topics"]}
    assert not (texts["train"] & texts["test"] or texts["train"] & texts["validation"])
    assert not any(label in row["text"].lower().split() for row in train for label in labels)


def test_answers_are_in_their_passage_and_the_question_fits_no_other():
    passages = {row["id"]: row for row in rows("passages", "train")}
    questions = [row for split in SPLITS["questions"] for row in rows("questions", split)]
    assert len(passages) >= 300 and len(questions) >= 750
    assert len({row["question"] for row in questions}) == len(questions)
    assert len({row["title"] for row in passages.values()}) == len(passages)
    for row in questions:
        passage = passages[row["passage_id"]]
        assert row["answer"] in passage["text"]
        assert row["client"] == passage["client"]


def test_general_text_never_describes_a_list():
    """A list ends a document or is followed by a diary: no wording of a description comes after it."""
    texts = [row["text"] for row in rows("general", "validation")]
    after = [text.rsplit("]", 1)[1] for text in texts if "]" in text]
    assert len(after) > 50
    described = ("that serves", "on the menu", "you will find", " called ", " try ", "rating", "prices", "?")
    assert not any(words in text for text in after for words in described)
    assert not any("?" in text and "]" in text for text in texts)


def test_base_is_small_and_declares_distinct_special_tokens(model, tokenizer):
    assert sum(path.stat().st_size for path in base_path().iterdir()) <= 8 * 2**20
    special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert None not in special and len(set(special)) == 3
    assert (model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id) == special
    assert 512 <= len(tokenizer) == model.config.vocab_size <= 1024
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_tokenizer_gives_back_what_it_was_given(tokenizer):
    texts = [value for task, split in SMALL_SPLITS for row in rows(task, split)[::10] for value in row.values()]
    texts += ["Ünheard-of näme 12.50 €", "[ x ] [[y] two  spaces\nnew line \u4f60\u597d"]
    for text in texts:
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    joined = tokenizer("name[The Red Fox] :")["input_ids"] + tokenizer(" The Red Fox is")["input_ids"]
    assert tokenizer.decode(joined) == "name[The Red Fox] : The Red Fox is"


def test_words_of_the_tasks_are_single_tokens_and_examples_are_short(tokenizer):
    for task in ("dining", "topics", "passages", "questions"):
        for row in rows(task, SPLITS[task][0])[::7]:
            for column in set(row) - {"client", "id", "passage_id"}:
                assert not any(token.startswith("<0x") for token in tokenizer.tokenize(row[column]))
    lengths = [len(tokenizer(f"{row['mr']} : {row['ref']}")["input_ids"]) for row in rows("dining", "train")[::10]]
    assert 50 < np.mean(lengths) < 90 and max(lengths) <= 110


def test_base_knows_the_language_and_not_the_task(model, tokenizer):
    texts = [row["text"] for row in rows("general", "validation")[:100]]
    rng = np.random.default_rng(0)
    shuffled = [" ".join(rng.permutation(text.split())) for text in texts]
    known = mean_loss(model, tokenizer, texts)
    assert known < 1.0
    assert mean_loss(model, tokenizer, shuffled) > known + 3
