"""Preferences between chats: two conversations with a common beginning, or two answers to one conversation."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile

import numpy as np

from fedhpc import config
from fedhpc.data import chats
from fedhpc.data.chat_tokens import Chat, messages_in, tools_in
from fedhpc.data.chats import Message
from fedhpc.data.pairs import without_ties
from fedhpc.data.rows import OnDemand
from fedhpc.data.sources import Table, find_split, open_source
from fedhpc.data.structured import Structured
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


def answers_in(data: config.Data) -> dict[str, Structured]:
    """The columns of chats in `data.chosen` and `data.rejected`, by these keys, and what is read of them."""
    may_be_text = data.messages is not None

    def column(key: str, name: str) -> Structured:
        return Structured(name, lambda value, location: [*_answer(value, key, location, may_be_text)])

    return {
        key: column(key, str(name)) for key, name in (("data.chosen", data.chosen), ("data.rejected", data.rejected))
    }


def chat_pairs(table: Table) -> tuple[Sequence[Chat], Sequence[Chat]]:
    """The better and the worse conversation of each row, each with how many turns its answer has.

    What both begin with is the prompt. UserError, with the row, where they have no beginning in common, and for a
    conversation that has no answer behind it.
    """
    count = len(table.rows)
    return (
        OnDemand(count, lambda rows: [chosen for chosen, _ in _pairs(table, rows)]),
        OnDemand(count, lambda rows: [rejected for _, rejected in _pairs(table, rows)]),
    )


def _pairs(table: Table, rows: slice) -> Iterator[tuple[Chat, Chat]]:
    """Both conversations of some rows."""
    given, *answers = (messages_in(table, rows, f"data.{name}") for name in ("messages", "chosen", "rejected"))
    columns = (given, *answers, tools_in(table, rows), table.locations[rows])
    for before, chosen, rejected, tools, location in zip(*columns, strict=True):
        pair = ([*before, *chosen], [*before, *rejected])
        common = len(before) or sum(1 for _ in takewhile(lambda both: both[0] == both[1], zip(*pair, strict=False)))
        if not common:
            raise UserError(
                "the two chats do not begin with the same message, so that there is no prompt", key="data.rejected",
                place=location, remedy="mend the row, or take it out of the file",
            )  # fmt: skip
        turns = [sum(message["role"] == "assistant" for message in messages[common:]) for messages in pair]
        for count, key in zip(turns, ("data.chosen", "data.rejected"), strict=True):
            if not count and pair[0] != pair[1]:
                raise UserError(
                    "behind what both chats begin with, no message is the assistant's", key=key, place=location,
                    remedy="mend the row, or take it out of the file",
                )  # fmt: skip
        yield Chat(pair[0], tools, location, turns[0]), Chat(pair[1], tools, location, turns[1])


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


def with_a_preference(table: Table) -> tuple[Table, str | None]:
    """The rows whose two chats differ, and a line for the log where others are left out."""
    pairs = OnDemand(len(table.rows), lambda rows: [*_pairs(table, rows)])
    return without_ties(table, np.fromiter((one.messages != other.messages for one, other in pairs), bool, len(pairs)))
