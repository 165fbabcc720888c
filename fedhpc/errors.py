"""The errors that fedhpc raises on purpose."""

from __future__ import annotations

import re
from typing import TypeVar

_Error = TypeVar("_Error", bound="UserError")


class UserError(Exception):
    """A mistake of the user's, explained in one line: what is wrong, where, and what to do.

    place: where it is, as file and line or 'command line'. key: the configuration key that it is about. remedy: what to
    do. The printed line is `place: key: message; remedy`, without the parts that are empty, and without the key if the
    message names it: "demo.yaml:7: client.lr: must be at least 0; set 0 or more". If nothing was written yet, it ends
    the program with exit code 2, otherwise with 1.
    """

    def __init__(self, message: str, *, key: str = "", place: str = "", remedy: str = "") -> None:
        self.message, self.key, self.place, self.remedy = " ".join(message.split()), key, place, remedy
        named = f"{key}: " if key and not _mention(key).search(self.message) else ""
        text = f"{place}: " if place else ""
        text += named + self.message + (f"; {remedy}" if remedy else "")
        super().__init__(" ".join(text.split()))

    def but(self: _Error, *, key: str | None = None, place: str | None = None, remedy: str | None = None) -> _Error:
        """This error with another key, place or remedy. If the message names the key, it is renamed there too."""
        message = self.message
        if key is not None and self.key:
            renamed = key
            message = _mention(self.key).sub(lambda _: renamed, message)
        return type(self)(
            message,
            key=self.key if key is None else key,
            place=self.place if place is None else place,
            remedy=self.remedy if remedy is None else remedy,
        )


def _mention(key: str) -> re.Pattern[str]:
    """Where a text names a key; `data.where` is not named by `data.where_not` or `other.data.where`."""
    return re.compile(rf"(?<![\w.]){re.escape(key)}(?!\w|\.\w)")


def nearest(word: str, valid: list[str], shown: int | None = None) -> str:
    """A hint for an unknown `word`: the closest valid one, and the list of them, or its first `shown`."""
    import difflib

    if not valid:
        return "there is none in the package: give a file of your own, like ./mine.py"
    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    listed = ", ".join(valid[:shown]) + ", ..." * (shown is not None and len(valid) > shown)
    return f"{hint}valid: {listed}"
