"""Short answers as SQuAD compares them (Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1)."""

from __future__ import annotations

import re
import string

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words(text: str) -> list[str]:
    """The words of an answer in lower case, without ASCII punctuation and without articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def within(part: list[str], text: list[str]) -> bool:
    """Whether the words of `part`, if there are any, occur in `text` one after another."""
    return bool(part) and any(text[i : i + len(part)] == part for i in range(len(text) - len(part) + 1))
