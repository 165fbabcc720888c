"""Passages in chunks of words that overlap, so that none is longer than what reads it."""

from __future__ import annotations

import re

_WORD = re.compile(r"\S+")


def chunks(text: str, size_words: int, overlap_words: int) -> list[str]:
    """Windows of `size_words` words of the text as they stand in it, each sharing `overlap_words` with the next.

    The last window ends with the text. No words, no chunks.
    """
    words = list(_WORD.finditer(text))
    if not words:
        return []
    step = size_words - overlap_words
    starts = range(0, max(len(words) - overlap_words, 1), step)
    return [text[words[s].start() : words[min(s + size_words, len(words)) - 1].end()] for s in starts]
