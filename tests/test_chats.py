"""Chats as data sets hold them: every form becomes the same messages, and what is none is refused with its row."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from fedhpc.config import Data
from fedhpc.data import chats, files, rows, sources
from fedhpc.data.chat_pairs import answers_in, chat_pairs, with_a_preference
from fedhpc.data.chat_tokens import chats_in
from fedhpc.data.structured import parsed
from fedhpc.errors import UserError

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
]
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bonn"}}}


def messages(value: Any) -> list[chats.Message]:
    return chats.messages(value, "data.messages", "train.jsonl:7")


@pytest.mark.parametrize(
    "value",
    [
        CHAT,
        json.dumps(CHAT),
        [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        [{**message, "content": [{"type": "text", "text": message["content"], "image": None}]} for message in CHAT],
        [{**message, "content": list(message["content"]), "name": None, "tool_calls": None} for message in CHAT],
    ],
    ids=["messages", "json", "sharegpt", "parts", "nulls"],
)
def test_every_form_becomes_the_same_messages(value: Any) -> None:
    assert messages(value) == CHAT


def test_calls_of_tools() -> None:
    """OpenAI's arguments are JSON text, ShareGPT's calls are values; Arrow gives each call the keys of all."""
    written = {"id": "a", **CALL, "function": {"name": "weather", "arguments": '{"city": "Bonn"}'}}
    arrow = {**CALL, "function": {"name": "weather", "arguments": {"city": "Bonn", "day": None}}}
    called = [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert messages([{"role": "assistant", "tool_calls": [arrow]}]) == called
    assert messages([{"from": "function_call", "value": json.dumps(CALL["function"])}]) == called
    assert messages([{"role": "assistant", "content": None, "tool_calls": [written]}])[0]["tool_calls"] == [
        {"id": "a", **CALL}
    ]
    observed = {"from": "observation", "value": "rain", "tool_call_id": "a"}
    assert messages([observed]) == [{"role": "tool", "content": "rain", "tool_call_id": "a"}]
    schema = {"type": "function", "function": {"name": "weather", "strict": None}}
    tools = chats.tools(json.dumps([schema]), "data.tools", "row")
    assert tools == [{"type": "function", "function": {"name": "weather"}}]
    assert chats.tools(None, "data.tools", "row") is None and chats.tools([], "data.tools", "row") is None


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ([], "the conversation is empty"),
        (None, "holds nothing, not a list of messages"),
        ("[{", "not JSON"),
        ({"role": "user"}, "holds a dict"),
        (["Hi"], "message 1 is a str"),
        ([{"content": "Hi"}], "message 1 has no role"),
        ([*CHAT, {"role": "user"}], "message 4 (user) has no content"),
        ([{"role": "assistant", "content": " "}], "message 1 (assistant) has no content"),
        ([{"role": "asistant", "content": "Hi"}], "message 1 has the role 'asistant'; did you mean 'assistant'?"),
        ([{"role": "user", "content": [{"type": "image"}]}], "message 1 has a part that is image"),
        ([{"role": "user", "content": {"a": 1}}], "message 1 holds a dict"),
        ([{"role": "user", "content": "a\ufdd3b"}], "U+FDD0"),
        ([{"from": "function_call", "value": "{}"}], "message 1 (function_call) is no JSON object with name"),
    ],
)
def test_what_is_no_chat_is_refused_in_one_line_with_its_row(value: Any, words: str) -> None:
    with pytest.raises(UserError) as refused:
        messages(value)
    assert str(refused.value).startswith("train.jsonl:7: data.messages: ")
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_structured_column_is_what_is_read_of_it_or_why_it_cannot_be(tmp_path: Path) -> None:
    wide: chats.Message = {
        "role": "assistant",
        "content": "é",
        "reasoning": "half a \ud83d",
        "weight": 1e-320,
        "n": 2**70,
    }
    given = [{"id": 1, "messages": [*CHAT, wide]}, {"id": 2, "messages": json.dumps(CHAT)}, {"id": 3, "messages": None}]
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, given)))
    source = sources.open_source(Data.model_validate({"source": str(tmp_path)}))
    split = sources.find_split(source, "train")
    assert split is not None
    table = sources.read_table(
        source, split, {"id": "data.where"}, structured=chats_in(Data(messages="messages", source="unused"))
    )
    assert [*table.rows] == [{"id": "1"}, {"id": "2"}, {"id": "3"}]
    read = table.structures("data.messages", slice(None))
    assert next(read) == messages([*CHAT, wide]) and next(read) == messages(CHAT)
    with pytest.raises(UserError) as refused:
        next(read)
    with pytest.raises(UserError) as directly:
        chats.messages(None, "data.messages", f"{tmp_path}/train.jsonl:3")
    assert vars(refused.value) == vars(directly.value) and str(refused.value) == str(directly.value)
    chosen = table.select([1])  # as a filter that leaves the third row out
    assert [*chosen.structures("data.messages", slice(None))] == [messages(CHAT)]
    assert [*chosen.structures("data.tools", slice(None))] == [None]
    with pytest.raises(UserError, match=r"train.jsonl:1: data.messages names the column 'chat', which is not there"):
        sources.read_table(source, split, {}, structured=chats_in(Data(messages="chat", source="unused")))


def test_what_is_nested_too_deeply_is_refused_in_one_line() -> None:
    arguments: dict[str, Any] = {}
    for _ in range(5_000):
        arguments = {"a": arguments}
    written = chats_in(Data(messages="chat"))["data.messages"].written(
        [{"role": "assistant", "content": "yes", "tool_calls": [arguments]}], "train.jsonl:7"
    )
    with pytest.raises(UserError, match=r"^train.jsonl:7: the column 'chat' holds lists and objects within each other"):
        parsed(written)


def test_memory_is_that_of_few_chats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "AT_ONCE", 16)
    monkeypatch.setattr(files, "_PART_BYTES", 2**14)
    with open(tmp_path / "train.jsonl", "w") as file:
        for number in range(500):
            words = f"{number} {'word ' * 200}"
            chat = [{"role": "user", "content": words}, {"role": "assistant", "content": "yes"}]
            file.write(json.dumps({"messages": chat, "good": words, "bad": f"{words} bad"}) + "\n")
    size = (tmp_path / "train.jsonl").stat().st_size
    data = Data(source=str(tmp_path), messages="messages", chosen="good", rejected="bad")
    source = sources.open_source(data)
    tracemalloc.start()
    try:
        table = sources.read_table(source, str(source.find("train")), {}, structured=chats_in(data) | answers_in(data))
        table, _ = with_a_preference(table)
        for chosen, rejected in zip(*chat_pairs(table), strict=True):
            assert chosen.messages[:2] == rejected.messages[:2] != rejected.messages[2:]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(table.rows) == 500
    assert peak < 0.5 * size
