"""The errors that fedhpc raises on purpose."""

from __future__ import annotations


class UserError(Exception):
    """A mistake that a person can mend.

    The message is one line that says what is wrong, where (file, line or key) and what to do. Raised before
    anything was written it ends the program with exit code 2, later with 1 (DESIGN: exit codes).
    """

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


def nearest(word: str, valid: list[str]) -> str:
    """A hint for an unknown `word`: the closest valid one, and the whole list."""
    import difflib

    close = difflib.get_close_matches(word, valid, n=1, cutoff=0.5)
    hint = f"did you mean '{close[0]}'? " if close else ""
    return f"{hint}valid: {', '.join(valid)}"
