"""Puts passages in front of a question, as many as a budget of tokens allows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedhpc.data.templates import Template


def context(tokenizer: Any, passages: Sequence[str], template: Template, budget_tokens: int) -> tuple[str, int, bool]:
    """The text in front of a question: returns the text, how many passages are in it, and whether one was cut.

    passages: best first. They are taken for as long as they fit without a cut; of a first passage that is too long, the
    beginning is taken. The best passage comes last, next to the question, because a prompt that is too long is cut at
    its front.
    """

    def tokens(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    taken: list[str] = []
    used = 0
    for passage in passages:
        text = template.render({"passage": passage})
        needed = len(tokens(text))
        if used + needed > budget_tokens and not taken:
            ids = tokens(passage)
            for length in range(min(len(ids), budget_tokens), -1, -1):
                text = template.render({"passage": tokenizer.decode(ids[:length], skip_special_tokens=True)})
                if len(tokens(text)) <= budget_tokens:
                    return text, 1, True
            return "", 0, True  # the template alone is too long
        if used + needed > budget_tokens:
            break
        taken.append(text)
        used += needed
    return "".join(reversed(taken)), len(taken), False
