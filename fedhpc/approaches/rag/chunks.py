"""Cuts passages into overlapping chunks of words, so that no chunk is longer than what the encoder reads."""

from __future__ import annotations

import re

_WORD = re.compile(r"\S+")


def chunks(text: str, size_words: int, overlap_words: int) -> list[str]:
    """Cut a text into windows of `size_words` words, each of which shares `overlap_words` words with the next.

    Windows keep the text's own spaces, and the last one ends with the text, so it may be shorter: "a b c d e" with
    windows of 3 words and an overlap of 1 gives "a b c" and "c d e". A text without words gives no chunks.
    """
    words = list(_WORD.finditer(text))
    if not words:
        return []
    step = size_words - overlap_words
    starts = range(0, max(len(words) - overlap_words, 1), step)
    return [text[words[first].start() : words[min(first + size_words, len(words)) - 1].end()] for first in starts]
