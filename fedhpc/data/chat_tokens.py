"""Chats as tokens: those of the whole text that the template writes, with the assistant's turns as spans."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import TYPE_CHECKING, NamedTuple, cast

import numpy as np

from fedhpc import config
from fedhpc.config import Overlong, TrainOn
from fedhpc.data import chats
from fedhpc.data.chat_template import ChatTemplate
from fedhpc.data.chats import Message
from fedhpc.data.encoding import MARK, encode, encode_parts
from fedhpc.data.partitioners.base import Int64
from fedhpc.data.rows import OnDemand
from fedhpc.data.sources import Table
from fedhpc.data.structured import Json, Structured
from fedhpc.data.tokens import (
    OverlongError,
    Ragged,
    Spans,
    Tokens,
    cached,
    joined,
    offsets_of,
    tokenizer_content,
    update_digest,
)
from fedhpc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 256  # chats tokenised at once: the tokenizer's own library holds 100 bytes and more for each of their tokens
_CACHED = "fedhpc-chats-2"  # counts up with the rules by which chats become tokens


class Chat(NamedTuple):
    """A conversation as a row has it."""

    messages: list[Message]
    tools: list[Json] | None
    location: str  # where it was read, like "train.jsonl:7"
    learned: int = 0  # of pairs: how many of its last turns are the answer; 0: as data.train_on says

    def before_answer(self) -> Chat:
        """The conversation up to the assistant's last turn."""
        last = max(number for number, message in enumerate(self.messages) if message["role"] == "assistant")
        return self._replace(messages=self.messages[:last])


def chats_in(data: config.Data) -> dict[str, Structured]:
    """The columns of `data.messages` and `data.tools`, by these keys, and what is read of them."""
    columns = {}
    if data.messages is not None:
        columns["data.messages"] = Structured(
            data.messages, lambda value, location: [*chats.messages(value, "data.messages", location)]
        )
    if data.tools is not None:
        columns["data.tools"] = Structured(
            data.tools, lambda value, location: chats.tools(value, "data.tools", location)
        )
    return columns


def chats_of(table: Table) -> Sequence[Chat]:
    """The chats of a table. UserError, with the row, for what is none or has no assistant's turn."""

    def some(rows: slice) -> list[Chat]:
        conversations = []
        columns = (messages_in(table, rows, "data.messages"), tools_in(table, rows), table.locations[rows])
        for messages, tools, location in zip(*columns, strict=True):
            if all(message["role"] != "assistant" for message in messages):
                raise UserError(
                    "no message is the assistant's, so there is nothing to learn", key="data.messages", place=location,
                    remedy="mend the row, or take it out of the file",
                )  # fmt: skip
            conversations.append(Chat(messages, tools, location))
        return conversations

    return OnDemand(len(table.rows), some)


def messages_in(table: Table, rows: slice, key: str) -> Iterator[list[Message]]:
    """The messages of some rows in the column that `key` names; none where it names no column."""
    return (cast("list[Message]", value or []) for value in table.structures(key, rows))


def tools_in(table: Table, rows: slice) -> Iterator[list[Json] | None]:
    """The tools of the chats of some rows."""
    return (cast("list[Json] | None", value) for value in table.structures("data.tools", rows))


@dataclass(frozen=True)
class Writer:
    """How the chats of a run become tokens."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    train_on: TrainOn
    max_length: int
    overlong: Overlong

    def tokens(self, conversations: Sequence[Chat], asks: bool) -> Tokens:
        """The tokens of chats, with spans. asks: also the questions that their last turns answer, and these.

        A chat that is too long for `max_length` loses its end behind the last turn, and then its front up to the first
        turn. UserError as `ChatTemplate.rendered`, for a chat whose turns do not fit, unless `overlong` says what
        becomes of it, and for an answer that is a turn with what is in front of it.
        """
        return joined(
            self._some_tokens(conversations[at : at + _CHUNK], asks) for at in range(0, len(conversations), _CHUNK)
        )

    def _some_tokens(self, conversations: Sequence[Chat], asks: bool) -> Tokens:
        """`tokens` of a few chats."""
        rows = list(self._rows(conversations))
        fitting = [row for row in rows if isinstance(row, _Row)]
        bounds = np.concatenate([np.empty((0, 2), np.int64), *(row.turns for row in fitting)]).astype(np.int32)
        asked = [chat for chat, row in zip(conversations, rows, strict=True) if asks and isinstance(row, _Row)]
        return Tokens(
            ids=np.fromiter(chain.from_iterable(row.ids for row in fitting), np.int32),
            offsets=_offsets([len(row.ids) for row in fitting]),
            prompt_lengths=np.array([row.turns[0, 0] for row in fitting], np.int32),
            lost=np.array([row.lost for row in fitting], np.int32),
            needed=np.array([row.needed for row in fitting], np.int32),
            apart=np.array([row.is_apart for row in fitting], bool),
            spelled=np.array([row.is_spelled for row in fitting], bool),
            cut=np.array([row.cut for row in fitting], np.int32),
            overlong=np.array([row.needed if isinstance(row, OverlongError) else 0 for row in rows], np.int32),
            spans=Spans(_offsets([len(row.turns) for row in fitting]), bounds[:, 0].copy(), bounds[:, 1].copy()),
            questions=_ragged(self.question_ids(self.question_texts(asked)) if asked else []),
            replies=_ragged([row.reply for row in fitting] if asks else []),
        )

    @property
    def ends(self) -> tuple[int, ...]:
        """The tokens that end an assistant's turn."""
        return tuple(dict.fromkeys(int(mark[1]) for one in self.template.endings for mark in MARK.finditer(one)))

    def answers(self, tokens: Tokens) -> list[str]:
        """The last turn of each chat, for a reader; special tokens are left out."""
        assert tokens.replies is not None
        ids, offsets = tokens.replies
        return [
            str(
                self.tokenizer.decode(
                    ids[start:end].tolist(), skip_special_tokens=True, clean_up_tokenization_spaces=False
                )
            )
            for start, end in pairwise(offsets)
        ]

    def question_texts(self, conversations: Sequence[Chat]) -> list[str]:
        """The marked text that the last turn of each chat goes on from, with the prompt for generation."""
        before = (chat.before_answer() for chat in conversations)
        return [self.template.question(*chat[:3]) for chat in before]

    def question_ids(self, texts: Sequence[str]) -> list[list[int]]:
        """The tokens of such texts; one that leaves no room for an answer loses its front."""
        room = self.max_length - 1
        return [
            ids if len(ids) <= room else [*self._bos(ids), *ids[len(self._bos(ids)) - room :]]
            for ids in encode(self.tokenizer, texts)[0]
        ]

    def _bos(self, ids: Sequence[int]) -> list[int]:
        """The token that a row begins with, if it is the tokenizer's bos: it stays in front of what is cut."""
        return [*ids[:1]] if list(ids[:1]) == [self.tokenizer.bos_token_id] else []

    def _rows(self, conversations: Sequence[Chat]) -> Iterator[_Row | OverlongError]:
        """The rows of chats, or why they are left out."""
        rendered = [self.template.rendered(*chat[:3]) for chat in conversations]
        for chat, one in zip(conversations, rendered, strict=True):
            if chat.learned and len(one.turns) != sum(message["role"] == "assistant" for message in chat.messages):
                raise UserError(
                    "the chat template makes one turn of several, so the answer cannot be told from what is in front",
                    key="data.chosen", place=chat.location, remedy="mend the row, or give another data.chat_template",
                )  # fmt: skip
        where, learned = [chat.location for chat in conversations], [chat.learned for chat in conversations]
        encoded = encode_parts(self.tokenizer, [one.text for one in rendered], [one.turns for one in rendered], where)
        for ids, turns, is_apart, is_spelled, location, count in zip(*encoded, where, learned, strict=True):
            try:
                reply = ids[turns[-1, 0] : turns[-1, 1]]
                yield self._fitted(_Row(ids, turns[-count:], reply, is_apart, is_spelled, 0, len(ids), 0), location)
            except OverlongError as error:
                if self.overlong != "drop":
                    raise
                yield error

    def _fitted(self, row: _Row, location: str) -> _Row:
        """A row with the turns that are learned, cut to `max_length`. OverlongError where they do not fit."""
        ids, turns = row.ids, row.turns
        if self.train_on == "all":
            turns = np.array([[0, len(ids)]])
        elif self.train_on == "last_assistant":
            turns = turns[-1:]
        if len(ids) <= self.max_length:
            return row._replace(turns=turns)
        first, last, bos = int(turns[0, 0]), int(turns[-1, 1]), self._bos(ids)
        left = self.max_length - (last - first)  # tokens in front of the first turn
        if left < min(max(len(bos), 1), first):
            needed = last - first + min(max(len(bos), 1), first)
            if self.overlong != "truncate":
                raise OverlongError(
                    f"{location}: the turns to learn and what lies between them have {last - first} tokens and do not "
                    f"fit in data.max_length {self.max_length}; use at least {needed}, or set data.overlong to drop or "
                    "truncate",
                    needed=needed,
                )
            left = min(first, self.max_length // 2)
        left = min(left, first)
        moved = first - left
        fitting = [*bos, *ids[len(bos) + moved : last]][: self.max_length] if moved else ids[: self.max_length]
        shifted = np.minimum(turns - moved, self.max_length)
        shifted = shifted[shifted[:, 0] < shifted[:, 1]]
        cut = int(np.diff(turns).sum() - np.diff(shifted).sum())
        return row._replace(ids=fitting, turns=shifted, lost=len(ids) - len(fitting) - cut, cut=cut)


class _Row(NamedTuple):
    """A chat as a row of tokens."""

    ids: list[int]
    turns: Int64  # (turns, 2): begin and end of each that is learned
    reply: list[int]  # the assistant's last turn, in full
    is_apart: bool  # whether a token reaches over the beginning of a turn
    is_spelled: bool  # whether it has the characters of a special token as text
    lost: int  # as in fedhpc.data.tokens.Row
    needed: int
    cut: int


def _ragged(rows: Sequence[list[int]]) -> Ragged:
    return Ragged(np.fromiter(chain.from_iterable(rows), np.int32), _offsets([len(row) for row in rows]))


def _offsets(lengths: Sequence[int]) -> Int64:
    return offsets_of(np.array(lengths, np.int64))


def cached_chats(
    conversations: Sequence[Chat], writer: Writer, asks: bool, write: bool = True
) -> tuple[Tokens, str | None]:
    """`Writer.tokens`, or the tokens from the cache; also a message if they could not be cached.

    write: whether to put tokens into the cache that are not in it.
    """
    tokenizer, template = writer.tokenizer, writer.template
    program = template.source if template.source is not None else json.dumps(tokenizer.chat_template, sort_keys=True)
    settings = [writer.max_length, writer.train_on, writer.overlong, asks, tokenizer_content(tokenizer), program]
    names = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    digest = hashlib.sha256(json.dumps([_CACHED, *settings, names], sort_keys=True).encode())

    def as_json(rows: slice) -> list[str]:
        of_chats = ([chat.messages, chat.tools, chat.learned] for chat in conversations[rows])
        return [json.dumps(one, sort_keys=True) for one in of_chats]

    update_digest(digest, OnDemand(len(conversations), as_json))
    return cached(digest, len(conversations), lambda: writer.tokens(conversations, asks), write, chats=True)
