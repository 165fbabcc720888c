"""Runs on chats: what is trained, evaluated, written and loaded again, and what is refused before."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

import fedhpc
from fedhpc import evaluate
from fedhpc.approaches.describe import first_chat
from fedhpc.builtin.world import rows
from fedhpc.config import Model
from fedhpc.data.load import Data, load_data
from fedhpc.errors import UserError
from fedhpc.main import main
from fedhpc.models.base import Base
from fedhpc.models.causal_lm import CausalLM
from fedhpc.models.encoder import Classifier
from fedhpc.models.load import load_tokenizer
from tests.federations import Interrupted, federate, final, settings, table

CHATS = [
    {"messages": json.loads(row["messages"]), "client": row["client"], "label": row["label"]}
    for row in rows("chats", "train")[:38]
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    for split, part in (("train", CHATS[:26]), ("validation", CHATS[26:32]), ("test", CHATS[32:])):
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, part)))
    return folder


def tree(folder: Path, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "data": {"source": str(folder), "messages": "messages"},
        "partition": {"name": "iid", "num_clients": 4},
        "method": {"name": "lora", "rank": 4},
        "federation": {"rounds": 2, "cohort_size": 3},
        "client": {"lr": 0.01, "batch_size": 4},
        "evaluation": {"every": 1, "samples": 2, "max_new_tokens": 12, "client_fraction": 0.2},
    }
    for section, values in changes.items():
        made[section] = values if "name" in values else {**made.get(section, {}), **values}
    return made


def loaded(raw: dict[str, Any], write_cache: bool = False, model: type[Base] = CausalLM) -> Data:
    config = settings(Path("unused"), raw)
    return load_data(config, tokenizer(), model, write_cache)


@cache
def tokenizer() -> Any:
    return load_tokenizer(Model.model_validate({"name": "builtin"}))


# ---------------------------------------------------------------- data


def test_every_form_of_the_same_chats_gives_the_same_examples(folder: Path, tmp_path: Path) -> None:
    """Also as a text in CSV, from Parquet with keys for nulls, and in the built-in task."""
    import pandas

    fingerprints = {loaded(tree(folder)).fingerprint}
    names = {"user": "human", "assistant": "gpt"}
    for form in ("csv", "sharegpt", "parquet"):
        (tmp_path / form).mkdir()
        for split in ("train", "validation", "test"):
            part = [json.loads(line) for line in (folder / f"{split}.jsonl").read_text().splitlines()]
            file = tmp_path / form / split
            if form == "csv":
                texts = [{**row, "messages": json.dumps(row["messages"])} for row in part]
                pandas.DataFrame(texts).to_csv(file.with_suffix(".csv"), index=False)
            elif form == "parquet":
                part[0]["messages"][0]["name"] = None
                pandas.DataFrame(part).to_parquet(file.with_suffix(".parquet"))
            else:
                for row in part:
                    row["messages"] = [{"from": names[m["role"]], "value": m["content"]} for m in row["messages"]]
                file.with_suffix(".jsonl").write_text("\n".join(map(json.dumps, part)))
        fingerprints.add(loaded(tree(tmp_path / form)).fingerprint)
    assert len(fingerprints) == 1


def test_the_first_example_is_shown_with_what_is_learned(folder: Path) -> None:
    question, answer = (CHATS[0]["messages"][i]["content"] for i in (0, 1))
    line = first_chat(tokenizer(), loaded(tree(folder)).train)
    assert line.startswith("first training example, 28 of 56 tokens learned (>>> <<<): ")
    assert line.endswith(f": <bos> {question} :>>>{answer}<eos><<<")


def test_the_cache_has_the_same_examples(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHPC_CACHE", str(tmp_path))
    made = [loaded(tree(folder), write_cache=True) for _ in range(2)]
    assert len(list((tmp_path / "tokens").iterdir())) == 3
    for first, second in zip(made[0].splits.values(), made[1].splits.values(), strict=True):
        assert first.fingerprint == second.fingerprint and first.spans is not None and second.spans is not None
        assert all(np.array_equal(a, b) for a, b in zip(first.spans, second.spans, strict=True))
        if first.questions is not None and second.questions is not None:
            assert all(np.array_equal(a, b) for a, b in zip(first.questions, second.questions, strict=True))
        assert (first.questions is None) == (first is made[0].train)
    changed = loaded(tree(folder, data={"train_on": "last_assistant"}), write_cache=True)
    assert changed.fingerprint != made[0].fingerprint


def test_questions_and_answers(folder: Path) -> None:
    """What is asked is all before the last turn, and ends as a turn does."""
    test = loaded(tree(folder)).test
    chat = CHATS[32]["messages"]
    assert test.targets[0] == chat[-1]["content"] and test.prompts[0].endswith(f"{chat[-2]['content']} :")
    assert test.question(0).tolist() == test.tokens(0)[: test.spans.starts[test.spans.offsets[1] - 1]].tolist()
    assert test.ends == (2,)
    every = loaded(tree(folder, data={"train_on": "all"})).test
    assert every.targets == test.targets and every.questions.ids.tolist() == test.questions.ids.tolist()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"prompt": "{x}"}}, "data.messages and data.prompt are two ways to write an example: give one"),
        ({"evaluation": {"metrics": ["accuracy"]}, "data": {"label": "label"}}, "accuracy chooses between labels"),
        ({"data": {"messages": None, "train_on": "all"}}, "data.train_on is of chats and needs data.messages"),
        ({"data": {"chat_template": "none.jinja"}}, "data.chat_template: 'none.jinja' cannot be read"),
        ({"data": {"tools": "tools"}}, "train.jsonl:1: data.tools names the column 'tools', which is not there"),
        ({"data": {"messages": "client"}}, "train.jsonl:1: data.messages: holds a text that is not JSON"),
    ],
)
def test_what_does_not_go_together(folder: Path, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as refused:
        loaded(tree(folder, **change))
    assert words in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "the conversation is empty"),
        ([{"role": "user", "content": "Hi"}], "no message is the assistant's"),
        ([{"role": "user"}, {"role": "assistant", "content": "Hi"}], "message 1 (user) has no content"),
        ([{"content": "Hi"}], "message 1 has no role"),
    ],
)
def test_bad_chats_are_refused_with_file_and_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], messages: Any, words: str
) -> None:
    lines = [CHATS[0], {"messages": messages}, *CHATS[1:]]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    overrides = [f"data.source={tmp_path}", "data.messages=messages", "partition.name=iid", f"run.dir={tmp_path}/run"]
    path = tmp_path / "c.yaml"
    path.write_text("run: {name: bad}\n")
    assert main([str(path), *overrides, "partition.num_clients=1"]) == 2
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert f"{tmp_path}/train.jsonl:2: data.messages: {words}" in error
    assert not (tmp_path / "run").exists()


def test_a_chat_is_no_text_for_other_models_and_methods(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data\.messages: chats are for decoder-only language models, and "):
        loaded(tree(folder, data={"label": "label"}), model=Classifier)
    raw = {"method": {"name": "prompt_search"}, "data": {"messages": "messages"}}
    with pytest.raises(UserError, match=r"data\.messages: method.name prompt_search does not read it"):
        fedhpc.load_config({**raw, "run": {"name": "a"}})


# ---------------------------------------------------------------- runs


@pytest.mark.slow
@pytest.mark.parametrize("method", [{"name": "lora", "rank": 4}, {"name": "prefix", "num_virtual_tokens": 4}])
def test_runs_on_chats_learn_and_are_the_same_on_three_ranks(
    method: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    raw = tree(folder, method=method, **({"client": {"lr": 0.1}} if method["name"] == "prefix" else {}))
    collectives = federate(settings(tmp_path / "one", raw))
    losses = table(tmp_path / "one", "rounds")["eval_loss"]
    assert losses[-1] < 0.95 * losses[0]
    federate(settings(tmp_path / "three", raw), ranks=3)
    others = ["three"]
    if method["name"] == "prefix":
        with pytest.raises(Interrupted):
            federate(settings(tmp_path / "again", raw), stop_at=collectives // 2)
        federate(settings(tmp_path / "again", raw))
        others.append("again")
    for other in others:
        assert all(
            np.array_equal(tensor, final(tmp_path / other)[name]) for name, tensor in final(tmp_path / "one").items()
        )
        assert np.array_equal(table(tmp_path / other, "rounds")["eval_loss"], losses)
    with h5py.File(tmp_path / "three" / "results.h5") as file:
        turns = {name: column[:] for name, column in file["tables/turns"].items()}
        mean, clients = file["test/loss"][()], file["client_eval/loss"][:]
        texts = [text.decode() for text in file["samples/text"][:]]
    assert turns["turn"].tolist() == [1, 2, 3] and turns["num_examples"][0] == 6
    assert np.average(turns["loss"], weights=turns["tokens"]) == pytest.approx(mean, rel=1e-12)
    assert np.isfinite(clients).all()
    assert evaluate.main([str(tmp_path / "three"), "--out", str(tmp_path / "out.json")]) == 0
    again = json.loads((tmp_path / "out.json").read_text())["turns"]
    assert again["tokens"] == turns["tokens"].tolist() and again["loss"] == pytest.approx(turns["loss"], abs=1e-9)
    model = fedhpc.load(tmp_path / "three" / "adapter")
    asked = [chat["messages"][:-1] for chat in (CHATS[32], CHATS[35])]
    assert model.generate(asked, max_new_tokens=12) == texts


@pytest.mark.slow
def test_a_template_of_ones_own_goes_with_the_export(folder: Path, tmp_path: Path) -> None:
    template = tmp_path / "mine.jinja"
    template.write_text(
        "{% for m in messages %}{{ bos_token ~ m.content ~ eos_token }}{% endfor %}"
        "{{ bos_token if add_generation_prompt }}"
    )
    raw = tree(folder, data={"chat_template": str(template)}, federation={"rounds": 1})
    federate(settings(tmp_path / "run", raw))
    adapter = tmp_path / "run" / "adapter"
    assert (adapter / "chat_template.jinja").read_text() == template.read_text()
    assert "A row was a chat as `chat_template.jinja` has it" in (adapter / "README.md").read_text()
    with h5py.File(tmp_path / "run" / "results.h5") as file:
        texts = [text.decode() for text in file["samples/text"][:]]
    asked = [chat["messages"][:-1] for chat in (CHATS[32], CHATS[35])]
    assert fedhpc.load(adapter).generate(asked, max_new_tokens=12) == texts
