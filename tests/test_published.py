"""The published protocols (configs/published): two rounds of each on rows with its columns and a tiny model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import datasets
import h5py
import numpy as np
import pytest
import torch
import yaml

from fedhpc import config as configuration
from fedhpc.builtin.world import rows
from tests.federations import federate, final

ROOT = Path(__file__).resolve().parents[1]
PUBLISHED = ROOT / "configs" / "published"
PAGE = (PUBLISHED / "README.md").read_text(encoding="utf-8")
# Facts are the instruction and a sentence about them the response; the shortest, since time goes with their tokens.
VENUES = sorted(rows("dining", "train"), key=lambda row: len(row["mr"] + row["ref"]))[:240]
QUICK = ["flowertune_general", "fed_wildchat_multi", "fedpetuning_glue"]  # an instruction, chats, a classifier
CATEGORIES = ["brainstorming", "classification", "closed_qa", "creative_writing", "general_qa", "open_qa"]

Row = Mapping[str, Any]


# ---------------------------------------------------------------- rows as the data sets have them


def write(file: Path, content: Iterable[Row]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(map(json.dumps, content)) + "\n")


def alpaca(folder: Path) -> None:
    texts = [{"instruction": v["mr"], "input": "", "output": v["ref"], "text": v["ref"]} for v in VENUES]
    write(folder / "train.jsonl", texts)


def instructions(folder: Path) -> None:
    texts = [{"instruction": "Describe it.", "input": v["mr"], "output": v["ref"]} for v in VENUES]
    write(folder / "train.jsonl", texts)


def dolly(folder: Path) -> None:
    names = [*CATEGORIES, "summarization"]
    write(
        folder / "train.jsonl",
        (
            {"instruction": "Describe it.", "context": v["mr"], "response": v["ref"], "category": names[i % 7]}
            for i, v in enumerate(VENUES)
        ),
    )


def rte(folder: Path) -> None:
    def pair(i: int, label: int) -> Row:
        return {"sentence1": VENUES[i]["ref"], "sentence2": VENUES[i]["mr"], "label": label, "idx": i}

    splits = {"train": [pair(i, i % 2) for i in range(240)], "validation": [pair(i, i % 2) for i in range(20)]}
    prepare("GLUE", hub={split: datasets.Dataset.from_list(pairs) for split, pairs in splits.items()})


def mnli(folder: Path) -> None:
    for split, count in (("train", 180), ("validation_matched", 20)):
        texts = [
            {"premise": v["ref"], "hypothesis": v["mr"], "label": i % 3, "idx": i} for i, v in enumerate(VENUES[:count])
        ]
        write(folder / f"{split}.jsonl", texts)


def e2e(folder: Path) -> None:
    for split, count in (("train", 48), ("validation", 8), ("test", 8)):
        texts = [{"meaning_representation": v["mr"], "human_reference": v["ref"]} for v in VENUES[:count]]
        write(folder / f"{split}.jsonl", texts)


def aya(folder: Path) -> None:
    more = {"language": "English", "language_code": "eng", "annotation_type": "original-annotations"}
    texts = [
        {"inputs": v["mr"], "targets": v["ref"], **more, "user_id": f"person {i % 110}"} for i, v in enumerate(VENUES)
    ]
    write(folder / "train.jsonl", texts)


def by_client(archive: str, num_clients: int, row: Callable[[Row], Row]) -> Callable[[Path], None]:
    """A file of the archive of FedLLM-Bench: the rows by client; then the folder that the page makes of it."""

    def make(folder: Path) -> None:
        content = {f"client {c}": [row(v) for v in VENUES[c::num_clients]] for c in range(num_clients)}
        file = folder.parent / "data" / archive
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(content))
        prepare("FedLLM-Bench", only={folder.name: archive})

    return make


def answer(venue: Row) -> Row:
    return {"instruction": venue["mr"], "response": venue["ref"]}


def chat(venue: Row) -> Row:
    turns = [venue["mr"], venue["ref"], "And the prices?", "They are low."]
    return {"conversations": [{"from": ("human", "gpt")[i % 2], "value": turn} for i, turn in enumerate(turns)]}


def preference(venue: Row) -> Row:
    return {"prompt": f"{venue['mr']} :", "chosen": f" {venue['ref']}", "rejected": " It is a place."}


def natural_instructions(folder: Path) -> None:
    archive = folder.parent / "natural-instructions-2.8"
    (archive / "tasks").mkdir(parents=True)
    (archive / "splits" / "default").mkdir(parents=True)
    instances = [{"input": v["mr"], "output": [v["ref"]]} for v in VENUES]
    tasks = [f"task{number:03}_venues" for number in range(21)]
    for number, task in enumerate(tasks):
        own = [*instances[10 * number : 10 * number + 25], {"input": "x" * 1024, "output": ["too long"]}]
        (archive / "tasks" / f"{task}.json").write_text(json.dumps({"Definition": ["Describe it."], "Instances": own}))
    (archive / "splits" / "default" / "train_tasks.txt").write_text("\n".join(tasks[:-1]) + "\n")
    (archive / "splits" / "default" / "test_tasks.txt").write_text(f"{tasks[-1]}\n")
    prepare("Natural Instructions")


def oasst(folder: Path) -> None:
    messages = []
    for i, v in enumerate(VENUES):
        question = {"message_id": f"q{i}", "parent_id": None, "user_id": "nobody", "text": v["mr"], "role": "prompter"}
        reply = {"message_id": f"a{i}", "parent_id": f"q{i}", "user_id": f"person {i % 110}", "role": "assistant"}
        messages += [question, {**reply, "text": v["ref"]}]
    prepare("OpenAssistant", hub=messages)


def prepare(title: str, only: Mapping[str, str] | None = None, hub: object = None) -> None:
    """Run what the page says about data to prepare, in the working directory.

    only: the files of the archive, where not all are there. hub: what stands for the data set of the hub.
    """
    code = re.search(rf"^\*\*{title}\*\*.*?```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)
    assert code is not None
    text = code[1]
    if only is not None:
        (folder, file), *_ = only.items()
        assert f'"{folder}": "{file}"' in text
        text = re.sub(r"archive = \{.*?\}", f"archive = {dict(only)!r}", text, flags=re.DOTALL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets, "load_dataset", lambda *names, split=None: hub)
        exec(compile(text, title, "exec"), {})


#: Of every file: what writes its rows, and what has to be another than in the file, for these rows.
CASES: dict[str, tuple[Callable[[Path], None], list[str]]] = {
    "flowertune_general": (alpaca, []),
    "flowertune_finance": (instructions, []),
    "flowertune_medical": (instructions, []),
    "flowertune_code": (instructions, []),
    "openfedllm_general": (alpaca, []),
    "fed_aya": (by_client("Fed-Aya/aya_38c_25k.json", 6, answer), []),
    "fed_chatbot_it": (by_client("Fed-ChatbotIT/chatbotIT_237c_6k.json", 11, answer), []),
    "fed_wildchat": (by_client("Fed-WildChat/single_turn/wildchat_100c_53k.json", 6, answer), []),
    "fed_wildchat_multi": (
        by_client("Fed-WildChat/multi_turn/wildchat_50c.json", 4, chat),
        [f"data.chat_template={PUBLISHED / 'vicuna.jinja'}"],
    ),
    "fed_chatbot_pa": (by_client("Fed-ChatbotPA/chatbotPA_747c_10k.json", 11, preference), []),
    "fedkseed_ni": (natural_instructions, ["client.steps=40"]),  # every step draws all weights three times
    "fedkseed_dolly": (dolly, ["partition.num_clients=10", "client.steps=40"]),
    "fedpetuning_glue": (rte, []),
    "fedsa_lora_glue": (mnli, ["data.subset=null"]),
    "fedex_lora_e2e": (e2e, []),
    "pfl_alpaca": (alpaca, ["partition.num_clients=110"]),
    "pfl_aya": (aya, []),
    "pfl_oasst": (oasst, []),
    "fedit_dolly": (dolly, []),
}


# ---------------------------------------------------------------- tiny models


def save_tiny(folder: Path, family: str) -> None:
    """A random Llama, GPT-2 or RoBERTa, with a tokenizer of bytes that calls its special tokens as the family does."""
    import transformers as tf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    names = ["<pad>", "<s>", "</s>", "<unk>"]
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=names, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    written = [yaml.safe_load(file.read_text())["data"] for file in sorted(PUBLISHED.glob("*.yaml"))]
    prompts = [data[key] for data in written for key in ("prompt", "target") if key in data]
    backend.train_from_iterator([*prompts, *(text for v in VENUES for text in (v["mr"], v["ref"]))] * 2, trainer)
    if family == "roberta":
        backend.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    if family == "roberta":
        special |= {"cls_token": "<s>", "sep_token": "</s>"}
    tf.PreTrainedTokenizerFast(tokenizer_object=backend, **special).save_pretrained(folder)
    torch.manual_seed(0)
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    size = {"vocab_size": backend.get_vocab_size(), **ids}
    layers = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any
    if family == "llama":
        model = tf.LlamaForCausalLM(tf.LlamaConfig(**size, **layers, num_key_value_heads=1))
    elif family == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(**size, n_embd=16, n_layer=1, n_head=2))
    else:
        model = tf.RobertaModel(tf.RobertaConfig(**size, **layers, max_position_embeddings=130))
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny model of the family of a model's name."""
    folder = tmp_path_factory.mktemp("models")

    def of(name: str) -> Path:
        family = next((family for family in ("gpt2", "roberta") if family in name), "llama")
        if not (folder / family).is_dir():
            save_tiny(folder / family, family)
        return folder / family

    return of


# ---------------------------------------------------------------- the tests


def test_every_file_is_in_the_page_and_names_its_source() -> None:
    files = {file.stem: file.read_text() for file in PUBLISHED.glob("*.yaml")}
    assert set(files) == set(CASES)
    for name, text in files.items():
        assert f"`{name}.yaml`" in PAGE
        assert re.search(r"^# Source: .*github\.com/[\w./-]+ at [0-9a-f]{7}", text, re.MULTILINE), name


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in CASES])
def test_two_rounds(name: str, tiny: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = PUBLISHED / f"{name}.yaml"
    as_published = configuration.load(str(file), [])
    monkeypatch.chdir(tmp_path)
    make, others = CASES[name]
    folder = tmp_path / Path(as_published.data.source).name
    make(folder)
    changes = [
        f"model.name={tiny(as_published.model.name)}",
        "model.dtype=float32",  # two bytes are slow on most CPUs
        f"data.source={folder}",
        "federation.rounds=2",
        f"run.dir={tmp_path / 'run'}",
        *others,
    ]
    config = configuration.load(str(file), changes)
    federate(config)
    payload = final(tmp_path / "run")
    assert payload and all(np.isfinite(tensor).all() for tensor in payload.values())
    with h5py.File(tmp_path / "run" / "results.h5") as results:
        trained = results["clients/status"][:]
        assert len(trained) >= 2 and (trained == 0).all()
        assert np.isfinite(results["test/loss"][()]).all()
