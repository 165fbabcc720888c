"""Reads an array of JSON element by element, so that it may be larger than memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterable, Iterator
from itertools import chain

from fedhpc.errors import UserError

_SPACE = re.compile(r"[ \t\n\r]*")
_DECODER = json.JSONDecoder()
#: How far from its end a text may have an error that more of it would mend, like a \ud83d\ude00 that is broken off.
_BROKEN_OFF = 16


class JsonArray:
    """The elements of an array, which is decoded and parsed as they are asked for."""

    def __init__(self, parts: Iterable[bytes], location: str) -> None:
        """parts: the content, piece by piece. location: its file, for the UserError where it is no JSON."""
        rest, first = iter(parts), b""
        while len(first) < 4 and (part := next(rest, b"")):  # four bytes tell how characters are encoded
            first += part
        self._parts, self._location, self._encoding = chain([first], rest), location, json.detect_encoding(first)
        self._decoder = codecs.getincrementaldecoder(self._encoding)("surrogatepass")
        self._text, self._at = "", 0  # what is decoded and not yet forgotten, and how far it is parsed
        self._lines, self._columns = 0, 0  # what is forgotten: lines, and characters of the last one
        self._bytes = 0  # that are decoded

    def begins(self) -> bool:
        """Whether there is an array."""
        return self._next() == "["

    def __iter__(self) -> Iterator[object]:
        self._at += 1
        if self._next() != "]":
            yield self._element()
            while self._next() == ",":
                self._at += 1
                self._next()
                yield self._element()
            if self._next() != "]":
                raise self._error("Expecting ',' delimiter", self._at)
        self._at += 1
        if self._next():
            raise self._error("Extra data", self._at)

    def _next(self) -> str:
        """The next character that is no white space; none at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            assert space is not None
            self._at = space.end()
            if self._at < len(self._text):
                return self._text[self._at]
            if not self._read_on():
                return ""

    def _element(self) -> object:
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:
                cut = error.pos > len(self._text) - _BROKEN_OFF or error.msg.startswith("Unterminated string")
                behind = error.pos - self._at
                if cut and self._read_on():
                    continue
                raise self._error(error.msg, self._at + behind) from None
            except (ValueError, RecursionError) as error:
                raise UserError(f"{self._location}: not valid JSON: {error}") from None
            may_go_on = isinstance(value, (int, float)) and end > len(self._text) - _BROKEN_OFF
            length = end - self._at
            if not may_go_on or not self._read_on():
                self._at += length
                return value

    def _read_on(self) -> bool:
        """Forget what is parsed, and decode as much again as is left. Whether there was more."""
        before, self._text = self._text[: self._at], self._text[self._at :]
        self._columns = len(before) - before.rfind("\n") - 1 + (0 if "\n" in before else self._columns)
        self._lines, self._at = self._lines + before.count("\n"), 0
        pieces: list[str] = [self._text]
        part: bytes | None = b""
        while sum(map(len, pieces)) <= 2 * len(self._text) and part is not None:
            part = next(self._parts, None)
            pieces.append(self._decoded(part or b"", part is None))
        self._text = "".join(pieces)
        return len(self._text) > len(pieces[0])

    def _decoded(self, part: bytes, is_last: bool) -> str:
        pending = len(self._decoder.getstate()[0])
        try:
            text = self._decoder.decode(part, is_last)
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self._location}: not valid JSON: byte {self._bytes - pending + error.start} is not "
                f"{self._encoding}: {error.reason}"
            ) from None
        self._bytes += len(part)
        return text

    def _error(self, message: str, at: int) -> UserError:
        before = self._text[:at]
        line = self._lines + before.count("\n") + 1
        column = at - before.rfind("\n") + (0 if "\n" in before else self._columns)
        of_line = f"line {line}, " if line > 1 else ""
        return UserError(f"{self._location}: not valid JSON: {message} at {of_line}column {column}")
