"""What starts from real words: virtual tokens and, with EVA, LoRA; and what serves virtual tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhpc.errors import UserError

if TYPE_CHECKING:
    from fedhpc.models.base import Base

INIT_TEXT = "Here are the facts, and then a short text that says the same in plain words."


def tokens_of(base: Base, text: str) -> list[int]:
    """The token ids of a text of `init_text`. UserError where it has none, or one that the base does not embed."""
    ids: list[int] = base.tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise UserError("method.init_text: the tokenizer makes no token of it; give some real words")
    if max(ids) >= base.num_embedded:
        token = base.tokenizer.convert_ids_to_tokens(max(ids))
        raise UserError(f"method.init_text: '{base.name}' does not embed its token {token!r}; take it out")
    return ids


def first_tokens(base: Base, text: str, count: int) -> list[int]:
    """`count` token ids of `text`, which is repeated where it is shorter."""
    ids = tokens_of(base, text)
    return (ids * (count // len(ids) + 1))[:count]


def no_server(what: str, how: str) -> str:
    """What to say of the serving of tensors that stand in front of a text. how: what transformers takes them as."""
    return f"vLLM loads LoRA and no {what}: fedhpc.load serves it, or transformers with {how} (docs/export.md)"
