"""Conversations as data sets hold them, in the one form that chat templates take.

A chat is a list of messages, `{role, content}` or ShareGPT's `{from, value}`, or such a list as JSON text. Its messages
become dictionaries with `role` and `content`, which is one text, and whatever else they have that is not null, such as
`tool_calls` and `reasoning_content`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TypeAlias

from fedhpc.data.structured import Json
from fedhpc.data.values import text
from fedhpc.errors import UserError, nearest

Message: TypeAlias = dict[str, Json]

#: What data sets call the speakers, by what chat templates call them.
_NAMES = {
    "system": ("system",),
    "developer": ("developer",),
    "user": ("user", "human"),
    "assistant": ("assistant", "gpt", "chatgpt", "bing", "bard", "model"),
    "tool": ("tool", "function", "observation", "function_response", "ipython"),
}
_ROLES = {name: role for role, names in _NAMES.items() for name in names}
_CALL = "function_call"  # ShareGPT's role of an assistant whose value is a call as JSON
#: Unicode keeps these for the inside of programs: fedhpc.data.encoding and chat_template mark texts with them.
_RESERVED = re.compile("[\ufdd0-\ufdd5]")


def messages(value: object, key: str, location: str) -> list[Message]:
    """The messages of a chat. UserError, with the place `location`, where it is none or one of them is not complete.

    key: the configuration key that names the column.
    """
    listed = _parsed(value, key, location)
    if not isinstance(listed, list):
        raise _error(f"holds {_what(listed)}, not a list of messages ({{role, content}})", key, location)
    if not listed:
        raise _error("the conversation is empty", key, location)
    return [_message(one, number, key, location) for number, one in enumerate(listed, 1)]


def tools(value: object, key: str, location: str) -> list[Json] | None:
    """The tools of a chat, as JSON schemas; None where it has none. UserError where they are something else."""
    listed = _parsed(value, key, location) if value not in (None, "") else None
    if listed is not None and not (isinstance(listed, list) and all(isinstance(one, dict) for one in listed)):
        raise _error(f"holds {_what(listed)}, not a list of JSON schemas", key, location)
    return [_cleaned(one, key, location) for one in listed] if listed else None


def _message(value: object, number: int, key: str, location: str) -> Message:
    if not isinstance(value, Mapping):
        raise _error(f"message {number} is {_what(value)}, not {{role, content}}", key, location)
    given = {str(name): one for name, one in value.items() if one is not None}
    name = given.pop("role", None) or given.pop("from", None)
    content = given.pop("content", None)
    content = given.pop("value", None) if content is None else content
    if not isinstance(name, str):
        raise _error(f"message {number} has no role ({', '.join(value)})", key, location)
    rest = {name: _cleaned(one, key, location) for name, one in given.items()}
    if name not in (*_ROLES, _CALL):
        remedy = nearest(name, [*_ROLES, _CALL])
        raise UserError(f"message {number} has the role '{name}'", key=key, place=location, remedy=remedy)
    if name == _CALL:
        rest["tool_calls"], content = _calls(content, number, key, location), ""
    elif "tool_calls" in rest:
        rest["tool_calls"] = _with_parsed_arguments(rest["tool_calls"])
    role = _ROLES.get(name, "assistant")
    written = _text(content, number, key, location)
    silent = content is None or (role == "assistant" and not written.strip())
    if silent and not rest.get("tool_calls"):
        raise _error(f"message {number} ({name}) has no content", key, location)
    return {"role": role, "content": written, **rest}


def _text(content: object, number: int, key: str, location: str) -> str:
    """The content of a message as one text: parts of it are joined as they stand."""
    if isinstance(content, list):
        return "".join(_part(part, number, key, location) for part in content)
    try:
        written = text(content)
    except ValueError as error:
        raise _error(f"message {number} holds {error}", key, location) from None
    return _checked(written, key, location)


def _part(part: object, number: int, key: str, location: str) -> str:
    if isinstance(part, Mapping):
        if part.get("type", "text") != "text" or not isinstance(part.get("text"), str):
            what = part.get("type", "no text")
            raise _error(f"message {number} has a part that is {what}; chats are of texts alone", key, location)
        part = part["text"]
    return _text(part, number, key, location)


def _calls(content: object, number: int, key: str, location: str) -> list[Json]:
    """ShareGPT's call of functions, one or a list, as `tool_calls`."""
    parsed = _cleaned(_parsed(content, key, location), key, location)
    calls = parsed if isinstance(parsed, list) else [parsed]
    if not calls or not all(isinstance(call, dict) and "name" in call for call in calls):
        raise _error(f"message {number} ({_CALL}) is no JSON object with name and arguments", key, location)
    return [{"type": "function", "function": call} for call in calls]


def _with_parsed_arguments(calls: Json) -> Json:
    """Calls whose arguments are objects where they were JSON text: templates write them as JSON, and not twice."""
    if isinstance(calls, list):
        return [_with_parsed_arguments(call) for call in calls]
    if not isinstance(calls, dict):
        return calls
    arguments = calls.get("arguments")
    if isinstance(arguments, str):
        try:
            parsed = json.loads(arguments)
        except ValueError:
            parsed = arguments  # a model's own words, which are no JSON: templates write texts too
        return {**calls, "arguments": parsed}
    return {**calls, "function": _with_parsed_arguments(calls["function"])} if "function" in calls else calls


def _cleaned(value: object, key: str, location: str) -> Json:
    """A value of JSON without nulls, which Arrow gives every row for the keys of others."""
    if isinstance(value, Mapping):
        return {str(name): _cleaned(one, key, location) for name, one in value.items() if one is not None}
    if isinstance(value, list):
        return [_cleaned(one, key, location) for one in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    return _checked(value if isinstance(value, str) else str(value), key, location)


def _checked(written: str, key: str, location: str) -> str:
    if _RESERVED.search(written):
        raise _error("holds U+FDD0 to U+FDD5, which Unicode keeps for the inside of programs", key, location)
    return written


def _parsed(value: object, key: str, location: str) -> object:
    """A value, or what it is where it is JSON text."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise _error(f"holds a text that is not JSON ({error})", key, location) from None


def _what(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


def _error(message: str, key: str, location: str) -> UserError:
    return UserError(message, key=key, place=location, remedy="mend the row, or take it out of the file")
