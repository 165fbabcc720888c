"""Chats as a chat template writes them, and which characters of that text the assistant says.

A template is a program that may write a message in another way than it stands there: it trims texts, leaves out the
reasoning of earlier turns, adds a system prompt, merges neighbours. So the assistant's words are not looked for in the
text. The chat is rendered a second time, with marks in place of all that the assistant says. What both texts have in
common is not the assistant's; between two such pieces is a turn, from the end of its header to the special token that
ends it. Where a header ends is told by the template's own prompt for generation at that point. A chat whose two texts
do not fit each other in this way is refused.
"""

from __future__ import annotations

import json
import os
import re
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from fedhpc.data.chats import Message
from fedhpc.data.encoding import AS_TEXT, MARK, as_text, find_added, marked
from fedhpc.data.structured import Json
from fedhpc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_J = TypeVar("_J")  # of JSON
#: What stands in the second text beside its words; Unicode keeps these characters for the inside of programs.
_EDGE = "\ufdd3{}\ufdd3"  # at either end of what others than the assistant say, with the number of the message
_ANSWER = "\ufdd4{}\ufdd5"  # in place of what the assistant says
_MARKS = re.compile("\ufdd3([0-9]+)\ufdd3|\ufdd4([0-9]+)\ufdd5")
#: Where a message may have the assistant's reasoning, which templates write or leave out.
_REASONING = ("reasoning_content", "reasoning", "thinking")
#: The date that templates are told, so that a text is the same tomorrow: the one that Llama's own falls back on.
_TODAY = datetime(2024, 7, 26)
_WRITTEN = "".join(f" | replace('%{code}', '{_TODAY.strftime('%' + code)}')" for code in "aAbBdHIjmMpSyY")
#: In front of a template that asks for the date; transformers' own function of that name knows today's.
_SAME_DATE = f"{{%- macro strftime_now(format) -%}}{{{{ format{_WRITTEN} }}}}{{%- endmacro -%}}"


class Rendered(NamedTuple):
    """A chat as a marked text (fedhpc.data.encoding), and the parts of it that the assistant says."""

    text: str
    turns: list[tuple[int, int]]  # begin and end of each, in characters; the token that ends a turn is a part of it


class _Mark(NamedTuple):
    begin: int
    end: int
    message: int
    is_answer: bool  # whether it is in place of what the assistant says


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """The chat template of a tokenizer, or one from a file."""

    tokenizer: PreTrainedTokenizerBase
    source: str | None  # Jinja; None: the tokenizer's own
    key: str  # of the configuration, for errors of the template itself

    @classmethod
    def load(cls, tokenizer: PreTrainedTokenizerBase, file: str | None) -> ChatTemplate:
        """The template in a file, or the tokenizer's own. UserError where there is none, or chats cannot have it."""
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(
                "the model's tokenizer cannot say which characters its tokens stand for, so a chat's turns are not "
                "found", key="data.messages", remedy="choose a model with a fast tokenizer",
            )  # fmt: skip
        if file is not None:
            try:
                return cls(tokenizer, Path(os.path.expanduser(file)).read_text(encoding="utf-8"), "data.chat_template")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"'{file}' cannot be read: {error}", key="data.chat_template") from None
        if not tokenizer.chat_template:
            raise UserError(
                "the model's tokenizer has no chat template", key="data.messages",
                remedy="give data.chat_template (a file), or choose a model that was made for chats",
            )  # fmt: skip
        return cls(tokenizer, None, "data.messages")

    def program(self, tools: list[Json] | None = None) -> str:
        """The Jinja source of the template; some tokenizers have another one for chats with tools."""
        chosen = self.tokenizer.get_chat_template(tools=tools) if self.source is None else self.source
        return (_SAME_DATE if "strftime_now" in chosen else "") + chosen

    @cached_property
    def endings(self) -> tuple[str, ...]:
        """What ends an assistant's turn: special tokens, marked. UserError where the last turn of a chat has none.

        Those behind the last turn and behind one that a question follows, as far as they are the same; else both.
        """
        user: Message = {"role": "user", "content": _EDGE.format(2)}
        chat: list[Message] = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER.format(1)}]
        at_end = self._render(chat, None, "").partition(_ANSWER.format(1))[2]
        if MARK.search(at_end) is None:
            raise self._refusal("ends an assistant's turn with no special token of the model's tokenizer", "")
        within = self._render([*chat, user], None, "").partition(_ANSWER.format(1))[2].partition(_EDGE.format(2))[0]
        common = [*MARK.finditer(_common(at_end, within))]
        if common:
            return (at_end[common[0].start() : common[-1].end()],)
        return tuple(dict.fromkeys(first[0] for first in (MARK.search(at_end), MARK.search(within)) if first))

    @cached_property
    def _takes_objects(self) -> bool:
        """Whether arguments of calls are objects for this template; some take JSON text instead."""
        call: Json = {"id": "a" * 9, "type": "function", "function": {"name": "a", "arguments": {"a": "a"}}}
        chat: list[Message] = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        try:
            self._render(chat, None, "")
        except UserError:
            return False
        return True

    # ---- texts

    def question(self, messages: Sequence[Message], tools: list[Json] | None, location: str) -> str:
        """The marked text that the assistant's next turn goes on from: the messages and the prompt for generation."""
        text = self._render(self._ready(messages), tools, location, asks=True)
        return text.replace(AS_TEXT, "")

    def rendered(self, messages: Sequence[Message], tools: list[Json] | None, location: str) -> Rendered:
        """The marked text of a chat, and where the assistant's turns are in it.

        Turns that the template merges are one. UserError where the template refuses the chat, or writes it so that the
        assistant's turns cannot be told from the rest.
        """
        messages = self._ready(messages)
        text = self._render(messages, tools, location)
        turns = self._turns(text, messages, tools, location)
        removed = [at for at, character in enumerate(text) if character == AS_TEXT]
        moved = [(begin - bisect_left(removed, begin), end - bisect_left(removed, end)) for begin, end in turns]
        return Rendered(text.replace(AS_TEXT, ""), moved)

    def _ready(self, messages: Sequence[Message]) -> list[Message]:
        """The messages as the template takes them, with names of special tokens as text."""
        called = any("tool_calls" in message for message in messages) and not self._takes_objects
        return [_spelled(_as_json(message) if called else message, self.tokenizer) for message in messages]

    def _turns(
        self, text: str, messages: Sequence[Message], tools: list[Json] | None, location: str
    ) -> list[tuple[int, int]]:
        """Begin and end of the assistant's turns in the text of these messages."""
        hidden = [_hidden(message, number) for number, message in enumerate(messages)]
        second = self._render(hidden, tools, location)
        marks = _marks(second)
        answered = {mark.message for mark in marks if mark.is_answer}
        for number, message in enumerate(messages):
            if message["role"] == "assistant" and number not in answered:
                raise self._refusal(f"leaves out message {number + 1} (assistant)", location)
        turns, reached, cut = [], 0, 0  # in the text, and how much of the second text that is
        for turn in _groups(marks, second):
            first, last = turn[0], turn[-1]
            start, header, asked = self._header(first, marks, second, hidden, tools, location)
            reached = self._shared(text, reached, second[cut:start], first, location)
            written = text[reached : reached + len(header)]
            reached += self._length(header, asked, written, hidden[: first.message], tools, location)
            ends = self._end(last, marks, second, location)
            end = text.find(ends[0], reached)
            if end < 0:
                raise self._unlike(first, location)
            turns.append((reached, end + len(ends[0])))
            reached, cut = end, ends.start()
        if self._shared(text, reached, second[cut:], None, location) != len(text):
            raise self._unlike(None, location)
        return turns

    def _header(
        self,
        first: _Mark,
        marks: Sequence[_Mark],
        second: str,
        hidden: Sequence[Message],
        tools: list[Json] | None,
        location: str,
    ) -> tuple[int, str, str]:
        """What stands in the second text in front of a turn, behind the last words of others, and where that begins.

        Also what the template writes there when it asks for the turn.
        """
        previous = next((mark for mark in reversed(marks) if mark.end <= first.begin), None)
        start = previous.end if previous else 0
        header = second[start : first.begin]
        if first.message == 0:
            return start, header, header[: self._behind_first_header(header, location)]
        asking = self._render(hidden[: first.message], tools, location, asks=True)
        latest = next(reversed(_marks(asking)), None)
        if (latest and latest.message) != (previous and previous.message):
            raise self._refusal(f"writes other messages in front of message {first.message + 1} than before", location)
        return start, header, _tail(asking)

    def _length(
        self,
        header: str,
        asked: str,
        written: str,
        before: Sequence[Message],
        tools: list[Json] | None,
        location: str,
    ) -> int:
        """How much of what stands in front of a turn is its header; the rest is a part of the turn.

        header, written: in the second text and in the first. asked: where the template asks for the turn. The header is
        what they have in common, and a whole header where the template does not write it when it asks. Where they go on
        in other ways, as with reasoning or without, it must have a token of its own, and end between words.
        """
        common = _common(header, asked, written)
        if common not in (header, asked):
            of_others = _common(common, _tail(self._render(before, tools, location)))
            beyond, goes_on = common[len(of_others) :], (header[len(common) :], asked[len(common) :])
            if not find_added(beyond, self.tokenizer) or all(one[:1].isalnum() for one in goes_on):
                raise self._refusal(
                    f"begins message {len(before) + 1} (assistant) otherwise than where it asks for it", location
                )
        again = header.rfind(self._opening, len(common)) if self._opening else -1
        if again >= 0 and written.startswith(header[: again + len(self._opening)]):
            return again + len(self._opening)
        return len(common)

    @cached_property
    def _opening(self) -> str:
        """What the template writes behind a user's words only where it asks for an answer; empty for some."""
        user: list[Message] = [{"role": "user", "content": _EDGE.format(0)}]
        asked = _tail(self._render(user, None, "", asks=True))
        return asked[len(_common(asked, _tail(self._render(user, None, "")))) :]

    def _behind_first_header(self, header: str, location: str) -> int:
        """Where the turn begins of an assistant who speaks first: behind as much of a later header as is there."""
        user: Message = {"role": "user", "content": _EDGE.format(0)}
        asked = _tail(self._render([user], None, location, asks=True))
        for start in range(len(asked)):
            at = header.rfind(asked[start:])
            if at >= 0 and any(character.isalnum() for character in asked[start:]):
                return at + len(asked) - start
        raise self._refusal("does not say where an assistant begins who speaks first", location)

    def _end(self, last: _Mark, marks: Sequence[_Mark], second: str, location: str) -> re.Match[str]:
        """What ends a turn behind the assistant's last words in the second text.

        A call of tools may have other special tokens in front of it, or in its place.
        """
        following = next((mark.begin for mark in marks if mark.begin >= last.end), len(second))
        usual = re.compile("|".join(map(re.escape, self.endings))).search(second, last.end, following)
        ends = usual or MARK.search(second, last.end, following)
        if ends is None:
            raise self._refusal(f"ends message {last.message + 1} (assistant) with no special token", location)
        return ends

    def _shared(self, text: str, at: int, piece: str, turn: _Mark | None, location: str) -> int:
        """Where a piece of the second text ends in the first, in which it must stand at `at`."""
        piece = _MARKS.sub("", piece)
        if not text.startswith(piece, at):
            raise self._unlike(turn, location)
        return at + len(piece)

    # ---- what a template does

    def _render(self, messages: Sequence[Message], tools: list[Json] | None, location: str, asks: bool = False) -> str:
        """What the template writes, with special tokens marked. asks: with the prompt for generation at the end."""
        try:
            text = self.tokenizer.apply_chat_template(
                [*messages],  # type: ignore[arg-type]  # JSON, of which messages are made
                tools=_spelled(tools, self.tokenizer),
                chat_template=self.program(tools),
                add_generation_prompt=asks,
                tokenize=False,
            )
        except Exception as error:  # a template is a program, which may raise anything
            from jinja2 import TemplateSyntaxError  # as late as transformers imports it

            if isinstance(error, TemplateSyntaxError):
                raise UserError(
                    f"the chat template is not valid Jinja: {error.message} (line {error.lineno} of it)", key=self.key,
                    remedy="give another data.chat_template" if self.source is None else "mend it",
                ) from None  # fmt: skip
            reason = str(error).strip() or type(error).__name__
            raise UserError(
                f"the chat template refuses it: {reason}", key=self.key, place=location,
                remedy="mend the row, or give another data.chat_template",
            ) from None  # fmt: skip
        return marked(str(text), self.tokenizer)

    def _unlike(self, turn: _Mark | None, location: str) -> UserError:
        what = "the end" if turn is None else f"what stands in front of message {turn.message + 1}"
        return self._refusal(f"makes {what} depend on what the assistant says", location)

    def _refusal(self, what: str, location: str) -> UserError:
        return UserError(
            f"the chat template {what}, so the assistant's turns cannot be told from the rest", key=self.key,
            place=location, remedy="give a data.chat_template that writes every turn the same way",
        )  # fmt: skip


def _marks(text: str) -> list[_Mark]:
    return [_Mark(*match.span(), int(match[1] or match[2]), match[2] is not None) for match in _MARKS.finditer(text)]


def _tail(text: str) -> str:
    """What stands behind the last mark."""
    marks = _marks(text)
    return text[marks[-1].end if marks else 0 :]


def _common(*texts: str) -> str:
    """What texts begin with, all alike; a marked special token is in it or not, but never in part."""
    shortest = min(texts, key=len)
    same = next((i for i, c in enumerate(shortest) if any(one[i] != c for one in texts)), len(shortest))
    start = shortest.rfind("\ufdd0", 0, same)
    return shortest[: start if start >= 0 and "\ufdd1" not in shortest[start:same] else same]


def _groups(marks: Sequence[_Mark], text: str) -> Iterator[list[_Mark]]:
    """The marks of each turn: those of one message, and of the next where no special token ends the first."""
    group: list[_Mark] = []
    for mark in marks:
        if group and (
            not mark.is_answer
            or (mark.message != group[-1].message and MARK.search(text, group[-1].end, mark.begin) is not None)
        ):
            yield group
            group = []
        if mark.is_answer:
            group.append(mark)
    if group:
        yield group


def _spelled(value: _J, tokenizer: PreTrainedTokenizerBase) -> _J:
    """A value of JSON whose texts have no special tokens, only the names of some as text (`as_text`)."""
    if isinstance(value, list):
        return [_spelled(one, tokenizer) for one in value]  # type: ignore[return-value]
    if isinstance(value, dict):
        return {name: _spelled(one, tokenizer) for name, one in value.items()}  # type: ignore[return-value]
    return as_text(value, tokenizer) if isinstance(value, str) else value  # type: ignore[return-value]


def _hidden(message: Message, number: int) -> Message:
    """A message with marks in place of what the assistant says, and at either end of what others say."""
    content = str(message["content"])
    words = content.strip()
    if message["role"] != "assistant":
        edge = _EDGE.format(number)
        return {**message, "content": content.replace(words, f"{edge}{words}{edge}") if words else content}
    answer = _ANSWER.format(number)
    hidden = {name: value for name, value in message.items() if name not in _REASONING}
    hidden["content"] = answer if words else content
    if "tool_calls" in message:
        hidden["tool_calls"] = _hidden_call(message["tool_calls"], answer)
    return hidden


def _as_json(message: Message) -> Message:
    """A message whose calls of tools have their arguments as JSON text."""

    def written(value: Json) -> Json:
        if isinstance(value, list):
            return [written(one) for one in value]
        if not isinstance(value, dict):
            return value
        return {
            name: json.dumps(one, ensure_ascii=False) if name == "arguments" and isinstance(one, dict) else written(one)
            for name, one in value.items()
        }

    return {**message, "tool_calls": written(message["tool_calls"])} if "tool_calls" in message else message


def _hidden_call(value: Json, answer: str) -> Json:
    """Calls of tools with a mark in place of every text in their arguments; of their names where there is none.

    Templates write a tool's name again in front of what it answers.
    """
    if isinstance(value, list):
        return [_hidden_call(one, answer) for one in value]
    if not isinstance(value, dict):
        return value
    if "name" not in value:
        return {name: _hidden_call(one, answer) for name, one in value.items()}
    arguments = _replaced(value.get("arguments"), answer)
    if arguments == value.get("arguments"):
        return {**value, "name": answer}
    return {**value, "arguments": arguments}


def _replaced(value: Json, answer: str) -> Json:
    if isinstance(value, list):
        return [_replaced(one, answer) for one in value]
    if isinstance(value, dict):
        return {name: _replaced(one, answer) for name, one in value.items()}
    return answer if isinstance(value, str) else value
