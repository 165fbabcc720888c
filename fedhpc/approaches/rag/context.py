"""Passages in front of a question, within a budget of tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedhpc.data.templates import Template


def context(tokenizer: Any, passages: Sequence[str], template: Template, budget_tokens: int) -> tuple[str, int, bool]:
    """What stands in front of a question: the text, how many of the passages are in it, and whether one is cut.

    Passages, best first, are taken while they fit whole; where not even the first does, its beginning is. The best one
    stands last, next to the question: what is too long loses its front.
    """

    def tokens(text: str) -> list[int]:
        found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    taken: list[str] = []
    used = 0
    for passage in passages:
        text = template.render({"passage": passage})
        needed = len(tokens(text))
        if used + needed > budget_tokens and not taken:
            own = tokens(passage)
            for room in range(min(len(own), budget_tokens), -1, -1):
                text = template.render({"passage": tokenizer.decode(own[:room], skip_special_tokens=True)})
                if len(tokens(text)) <= budget_tokens:
                    return text, 1, True
            return "", 0, True  # the template alone is too long
        if used + needed > budget_tokens:
            break
        taken.append(text)
        used += needed
    return "".join(reversed(taken)), len(taken), False
