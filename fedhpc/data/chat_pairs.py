"""Preferences between chats: two conversations with a common beginning, or two answers to one conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile

from fedhpc import config
from fedhpc.data import chats
from fedhpc.data.chat_tokens import Chat
from fedhpc.data.chats import Message
from fedhpc.data.pairs import without_ties
from fedhpc.data.sources import Table, find_split, open_source
from fedhpc.errors import UserError

#: How a chat as JSON text begins. A text may begin with a bracket too.
_CHAT = re.compile(r"\s*\[\s*\{")


def holds_chats(data: config.Data) -> bool:
    """Whether `data.chosen` is a column of chats, by its first row."""
    if data.chosen is None or "{" in data.chosen:
        return False
    source = open_source(data)
    for name in (find_split(source, split) for split in (data.train, data.test)):
        if name is not None:
            first: Mapping[str, object] = next((values for _, values in source.read(name)), {})
            value = first.get(data.chosen)
            return isinstance(value, list) or (isinstance(value, str) and _CHAT.match(value) is not None)
    return False


def chat_pairs(table: Table, data: config.Data) -> tuple[list[Chat], list[Chat]]:
    """The better and the worse conversation of each row, each with how many turns its answer has.

    What both begin with is the prompt. UserError, with the row, where they have no beginning in common, and for a
    conversation that has no answer behind it.
    """
    given = [[]] * len(table.rows) if data.messages is None else table.values[data.messages]
    tools = [None] * len(table.rows) if data.tools is None else table.values[data.tools]
    chosen: list[Chat] = []
    rejected: list[Chat] = []
    for row, location in enumerate(table.locations):
        before = chats.messages(given[row], "data.messages", location) if data.messages is not None else []
        pair = [
            [*before, *_answer(table.values[str(column)][row], key, location, data.messages is not None)]
            for key, column in (("data.chosen", data.chosen), ("data.rejected", data.rejected))
        ]
        common = len(before) or sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(*pair, strict=False)))
        if not common:
            raise UserError(
                "the two chats do not begin with the same message, so that there is no prompt", key="data.rejected",
                place=location, remedy="mend the row, or take it out of the file",
            )  # fmt: skip
        of_tools = chats.tools(tools[row], "data.tools", location)
        for messages, listed, key in zip(pair, (chosen, rejected), ("data.chosen", "data.rejected"), strict=True):
            turns = sum(message["role"] == "assistant" for message in messages[common:])
            if not turns and pair[0] != pair[1]:
                raise UserError(
                    "behind what both chats begin with, no message is the assistant's", key=key, place=location,
                    remedy="mend the row, or take it out of the file",
                )  # fmt: skip
            listed.append(Chat(messages, of_tools, location, turns))
    return chosen, rejected


def _answer(value: object, key: str, location: str, may_be_text: bool) -> Sequence[Message]:
    """The messages of an answer, or of a chat; a text is one that the assistant says."""
    if may_be_text and isinstance(value, str):
        value = [{"role": "assistant", "content": value}]
    messages = chats.messages(value, key, location)
    if may_be_text and messages[0]["role"] != "assistant":
        raise UserError(
            f"an answer to the conversation in data.messages begins with a message of role {messages[0]['role']}",
            key=key, place=location, remedy="leave data.messages out where answers are whole conversations",
        )  # fmt: skip
    return messages


def with_a_preference(table: Table, data: config.Data) -> tuple[Table, str | None]:
    """The rows whose two chats differ, and a line for the log where others are left out."""
    chosen, rejected = chat_pairs(table, data)
    differ = [
        row for row, pair in enumerate(zip(chosen, rejected, strict=True)) if pair[0].messages != pair[1].messages
    ]
    return without_ties(table, differ)
