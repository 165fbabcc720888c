"""Token ids of texts: what is a special token and what is text, and the ids of a target behind its prompt.

A special token, such as the end of a text, is one where a template of the configuration names it. The same characters
in a column of the data are text. So templates are marked: in a marked text a special token stands as its id between
two characters that Unicode keeps for the inside of programs and no text has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fedhpc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_AT_ONCE = 512  # texts whose tokens the tokenizer's own library holds at once
_PAIRS = 65536  # of prompt and target that are joined at once: bounds the Python lists
#: A special token in a marked text.
MARK = re.compile("\ufdd0([0-9]+)\ufdd1")
#: Within the name of a special token, which stays text.
AS_TEXT = "\ufdd2"
#: The end of a prompt from the last space between two words on, and the beginning of a target up to the first.
#: In front of the space is a letter, digit or mark of punctuation: none that tokenizers leave out or take for a space.
_LAST_WORD = re.compile("(?s).*[\\w!-~\u2010-\u2027\u3001-\u301f\uff01-\uff60]( \\w.*)")
_FIRST_WORD = re.compile("(?s)(.*?[^\\s\ufdd1]) \\w")
#: What of a target's start says whether a word begins where it is put behind a prompt.
_START = re.compile(" ?\\w")
#: A token in which a space, however tokenizers write it, comes after something else.
_SPACE_WITHIN = re.compile("[^\\s\u2581\u0120\u010a\u010d\u010b][\u2581\u0120 ]")


@dataclass(frozen=True)
class _Specials:
    """The special tokens of a tokenizer."""

    ids: dict[str, int]  # by name
    pattern: re.Pattern[str] | None  # finds a name in a text; None where there are no special tokens
    only_marked: frozenset[int]  # ids that a text has where it is marked so alone; not that of unknown words


@lru_cache(maxsize=8)
def _specials(tokenizer: Any) -> _Specials:
    names = {token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values() if token.special}
    names.update(getattr(tokenizer, "all_special_tokens", ()))
    # A mark of punctuation or a line break that a tokenizer calls its padding or its end is ordinary text.
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in names if any(c.isalnum() for c in name)}
    ids = {name: token for name, token in ids.items() if token is not None}
    longest_first = sorted(ids, key=lambda name: (-len(name), name))
    return _Specials(
        ids,
        re.compile("|".join(map(re.escape, longest_first))) if ids else None,
        frozenset(ids.values()) - {getattr(tokenizer, "unk_token_id", None), _unknown(tokenizer)},
    )


def _unknown(tokenizer: Any) -> int | None:
    """The id that words which the vocabulary lacks have, also where the tokenizer does not call it its unk token."""
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    name = getattr(model, "unk_token", None)
    return getattr(model, "unk_id", None) if name is None else tokenizer.convert_tokens_to_ids(name)


def marked(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """Mark the special tokens that a text of the configuration names. UserError where it has the marks' characters."""
    if "\ufdd0" in text or "\ufdd1" in text:
        raise UserError("a text has U+FDD0 or U+FDD1, which Unicode keeps for the inside of programs; take it out")
    specials = _specials(tokenizer)
    if specials.pattern is None:
        return text
    return specials.pattern.sub(lambda name: f"\ufdd0{specials.ids[name[0]]}\ufdd1", text)


def as_text(text: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """A text in which `marked` finds no special tokens: AS_TEXT stands within their names. Take it out afterwards."""
    pattern = _specials(tokenizer).pattern
    return text if pattern is None else pattern.sub(lambda name: name[0][0] + AS_TEXT + name[0][1:], text)


def find_added(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a marked text has a token beyond words: a special one, or another that was added to the vocabulary."""
    names = (token.content for token in getattr(tokenizer, "added_tokens_decoder", {}).values())
    return MARK.search(text) is not None or any(name in text for name in names if any(c.isalnum() for c in name))


def unmarked(text: str, tokenizer: PreTrainedTokenizerBase | None = None) -> str:
    """A marked text for a reader: special tokens by their names, or left out where no tokenizer is given."""
    if "\ufdd0" not in text:
        return text
    return MARK.sub("" if tokenizer is None else lambda mark: _name(tokenizer, int(mark[1])), text)


def _name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    return str(tokenizer.convert_ids_to_tokens(token))


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], locations: Sequence[str] | None = None
) -> tuple[list[list[int]], list[bool]]:
    """The token ids of marked texts, and whether each has the characters of a special token as text.

    These are the tokenizer's own ids of the whole text but where such characters have to stay text. locations: where
    each text was read. UserError where the tokenizer takes text for a special token, whatever is done.
    """
    specials = _specials(tokenizer)
    if specials.pattern is None:
        return _ids(tokenizer, texts), [False] * len(texts)
    ids = _ids(tokenizer, [unmarked(text, tokenizer) for text in texts])
    rows = _spelled(specials, texts, ids)
    if rows:
        again = [texts[row] for row in rows]
        of_text = _ids_of_text(tokenizer, again)
        _refuse_taken(tokenizer, again, of_text, [locations[row] for row in rows] if locations else None)
        for row, its_ids in zip(rows, of_text, strict=True):
            ids[row] = its_ids
    return ids, _at(rows, len(texts))


def encode_parts(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    parts: Sequence[Sequence[tuple[int, int]]],
    locations: Sequence[str],
) -> tuple[list[list[int]], list[NDArray[np.int64]], list[bool], list[bool]]:
    """`encode` of marked texts, and which tokens some parts of each have: (parts, 2), begin and end.

    parts: begin and end of each in characters of the marked text. A token that reaches over the beginning of a part
    belongs to it; the third result says which texts have one, the fourth which have the characters of a special token
    as text. For fast tokenizers.
    """
    encodings = list(_batch(tokenizer, [unmarked(text, tokenizer) for text in texts]).encodings)
    specials = _specials(tokenizer)
    rows = [] if specials.pattern is None else _spelled(specials, texts, [one.ids for one in encodings])
    if rows:
        again = [texts[row] for row in rows]
        of_text = _renamed(tokenizer).encode_batch(again, add_special_tokens=False)
        _refuse_taken(tokenizer, again, [one.ids for one in of_text], [locations[row] for row in rows])
        for row, its_tokens in zip(rows, of_text, strict=True):
            encodings[row] = its_tokens
    spelled, tokens, apart = _at(rows, len(texts)), [], []
    for text, its_parts, encoding, is_spelled in zip(texts, parts, encodings, spelled, strict=True):
        bounds = np.array(its_parts, np.int64).reshape(-1, 2)
        if not is_spelled:  # then names of special tokens stood in place of their marks
            bounds = _in_unmarked(text, bounds, tokenizer)
        begins, ends = np.array(encoding.offsets, np.int64).reshape(-1, 2).T
        first = np.searchsorted(np.maximum.accumulate(ends), bounds[:, 0], side="right")
        last = np.searchsorted(np.maximum.accumulate(begins), bounds[:, 1], side="left")
        tokens.append(np.stack([first, last], axis=1))
        apart.append(bool((begins[first] < bounds[:, 0]).any()))
    return [list(one.ids) for one in encodings], tokens, apart, spelled


def _in_unmarked(text: str, positions: NDArray[np.int64], tokenizer: PreTrainedTokenizerBase) -> NDArray[np.int64]:
    """Positions in a marked text, none of them within a mark, as positions in its `unmarked` text."""
    marks = list(MARK.finditer(text))
    grown = np.cumsum([0, *(len(_name(tokenizer, int(mark[1]))) - len(mark[0]) for mark in marks)])
    moved: NDArray[np.int64] = positions + grown[np.searchsorted([mark.end() for mark in marks], positions, "right")]
    return moved


def _at(rows: Sequence[int], count: int) -> list[bool]:
    """For each of `count` rows whether it is one of these."""
    return np.isin(np.arange(count), np.array(rows, np.int64)).tolist()


def _spelled(specials: _Specials, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[int]:
    """The texts that have the characters of a special token as text: by themselves, or by what became of them."""
    rows = set(_taken_for_special(specials, texts, ids))  # by another way of writing the same, or in a text around it
    if specials.pattern is not None and specials.pattern.search("\n".join(texts)):
        rows |= {row for row, text in enumerate(texts) if specials.pattern.search(text)}
    return sorted(rows)


def _refuse_taken(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    ids: Sequence[Sequence[int]],
    locations: Sequence[str] | None,
) -> None:
    """UserError where the tokenizer has taken text for a special token, though it was given marks for those."""
    specials = _specials(tokenizer)
    wrong = _taken_for_special(specials, texts, ids)
    if wrong:
        one = next(i for i in ids[wrong[0]] if i in specials.only_marked)
        where = f"{locations[wrong[0]]}: " if locations else ""
        raise UserError(
            f"{where}the text has {_name(tokenizer, one)!r}, which the model's tokenizer takes for its special "
            "token; take it out of the text, or leave the row out with data.where_not"
        )


def _taken_for_special(specials: _Specials, texts: Sequence[str], ids: Sequence[Sequence[int]]) -> list[int]:
    """The texts that have more or fewer special tokens than they are marked with."""
    flat = np.fromiter(chain.from_iterable(ids), np.int64)
    is_special = np.isin(flat, list(specials.only_marked))
    expected = np.array([text.count("\ufdd0") for text in texts])
    if not is_special.any() and not expected.any():
        return []
    row = np.repeat(np.arange(len(texts)), [len(one) for one in ids])
    return np.flatnonzero(np.bincount(row[is_special], minlength=len(texts)) != expected).tolist()


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    if not _is_plain(tokenizer):
        encoded: list[list[int]] = _batch(tokenizer, texts)["input_ids"]
        return encoded
    # The ids that `_batch` gives, without all that it makes beside them.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    ids: list[list[int]] = []
    for start in range(0, len(texts), _AT_ONCE):
        batch = backend.encode_batch_fast(texts[start : start + _AT_ONCE], add_special_tokens=False)
        ids += [one.ids for one in batch]
    return ids


@lru_cache(maxsize=8)
def _is_plain(tokenizer: Any) -> bool:
    """Whether a tokenizer does nothing to a text but what its fast tokenizer does."""
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

    kind = type(tokenizer)
    plain = getattr(kind, "_encode_plus", None) is getattr(PreTrainedTokenizerFast, "_encode_plus", None)
    return plain and issubclass(kind, PreTrainedTokenizerFast) and kind.__call__ is PreTrainedTokenizerBase.__call__


def _batch(tokenizer: Any, texts: Sequence[str]) -> Any:
    return tokenizer(
        list(texts),
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )


def _ids_of_text(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """The ids of marked texts, in which nothing but marks becomes a special token."""
    renamed = _renamed(tokenizer)
    if renamed is not None:
        return [list(one.ids) for one in renamed.encode_batch(list(texts), add_special_tokens=False)]
    # A tokenizer in Python: the text between two marks by itself.
    rows = []
    for text in texts:
        row: list[int] = []
        for number, piece in enumerate(MARK.split(text)):
            if number % 2:
                row.append(int(piece))
            elif piece:
                row += tokenizer(piece, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        rows.append(row)
    return rows


@lru_cache(maxsize=8)
def _renamed(tokenizer: Any) -> Any:
    """A copy of a fast tokenizer whose special tokens are called by their marks, with the same ids; None for others.

    `split_special_tokens` is not enough: where the vocabulary itself has a special token's name as a piece (Unigram,
    words), the text still becomes the token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    content = json.loads(backend.to_str())
    marks = {name: f"\ufdd0{token}\ufdd1" for name, token in _specials(tokenizer).ids.items()}
    for token in content["added_tokens"]:
        if token["content"] in marks:
            # Found before the text is normalised, which might change the mark.
            token.update(content=marks[token["content"]], normalized=False)
    model = content["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {marks.get(piece, piece): token for piece, token in model["vocab"].items()}
    else:
        model["vocab"] = [[marks.get(piece, piece), *rest] for piece, *rest in model["vocab"]]
    if model.get("unk_token") in marks:
        model["unk_token"] = marks[model["unk_token"]]
    content.update(post_processor=None, truncation=None, padding=None)
    return type(backend).from_str(json.dumps(content))


@lru_cache(maxsize=8)
def _keeps_words_apart(tokenizer: Any) -> bool:
    """Whether no token reaches from a word over the space behind it, so that what is on either side is independent."""
    if getattr(tokenizer, "backend_tokenizer", None) is None:
        return False
    if len({*map(tuple, _ids(tokenizer, ["aa", "a a"]))}) == 1:
        return False  # spaces are left out before there are tokens
    names = _specials(tokenizer).ids
    return not any(_SPACE_WITHIN.search(token) for token in tokenizer.get_vocab() if token not in names)


def _start(target: str) -> str:
    """What `_end` needs to know of a target: whether it starts with a word, or a space and a word."""
    match = _START.match(target)
    return "" if match is None else match[0][:-1] + "a"


def _end(tokenizer: Any, prompt: str, start: str) -> str:
    """As much of a prompt's end as decides how its last tokens and a target's first ones come out.

    It begins with a word that stands for all in front of it, and is that word alone where the target, which starts
    with `start`, begins with a space and a word.
    """
    match = _LAST_WORD.match(prompt + start) if _keeps_words_apart(tokenizer) else None
    return prompt if match is None else "a" + prompt[match.start(1) :]


def _beginning(tokenizer: Any, target: str) -> str:
    """As much of a target's beginning as decides how it is joined to a prompt."""
    match = _FIRST_WORD.match(target) if _keeps_words_apart(tokenizer) else None
    return target if match is None else match[1]


def behind(
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    targets: Sequence[str],
    prompt_ids: Sequence[list[int]],
    target_ids: Sequence[list[int]],
) -> tuple[list[list[int]], list[bool]]:
    """The ids of each target behind its prompt: those that the whole text has behind the prompt's own ids.

    Where the whole text does not begin with the prompt's ids, because a token reaches over the end of the prompt, they
    are the target's own; the second list says where. prompt_ids, target_ids: of each text by itself.
    """
    parts = {target: (_start(target), _beginning(tokenizer, target)) for target in dict.fromkeys(targets)}
    of_rows = [(prompt, *parts[target]) for prompt, target in zip(prompts, targets, strict=True)]
    ends = {(p, start): _end(tokenizer, p, start) for p, start in {(p, start) for p, start, _ in of_rows}}
    pairs = [(ends[prompt, start], beginning) for prompt, start, beginning in of_rows]
    ids = _by_text(tokenizer, chain.from_iterable((p, t, p + t) for p, t in dict.fromkeys(pairs)))
    filler = len(_by_text(tokenizer, ["a"])["a"])
    odd = [
        row
        for row, (end, beginning) in enumerate(pairs)
        if (end != prompts[row] and not _ends_with(prompt_ids[row], ids[end][filler:]))
        or target_ids[row][: len(ids[beginning])] != ids[beginning]
    ]
    if odd:  # words that are joined after all, by how the text is normalised: the whole texts decide
        for row in odd:
            pairs[row] = prompts[row], targets[row]
        ids |= _by_text(tokenizer, chain.from_iterable((p, t, p + t) for p, t in {pairs[row] for row in odd}))
    results, apart = [], []
    for (end, beginning), alone in zip(pairs, target_ids, strict=True):
        front, joined = ids[end], ids[end + beginning]
        is_apart = joined[: len(front)] != front
        apart.append(is_apart)
        results.append(alone if is_apart else joined[len(front) :] + alone[len(ids[beginning]) :])
    return results, apart


def behind_each(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], targets: Sequence[str], target_ids: Sequence[list[int]]
) -> tuple[NDArray[np.int32], list[list[list[int]]]]:
    """The ids of every one of `targets` behind every prompt, as `behind` gives them: (n,) indices into a list of lists.

    Prompts with the same end share theirs.
    """
    starts, count = list(dict.fromkeys(map(_start, targets))), len(targets)
    ends = [tuple(_end(tokenizer, prompt, start) for start in starts) for prompt in prompts]
    example = dict(zip(ends, prompts, strict=True))
    variants: dict[str, int] = {}
    distinct: list[list[list[int]]] = []
    number = {}
    at_once = max(_PAIRS // count, 1)
    for first in range(0, len(example), at_once):
        chosen = dict(list(example.items())[first : first + at_once])
        of_prompts = [ids for ids in encode(tokenizer, list(chosen.values()))[0] for _ in targets]
        asked = [prompt for prompt in chosen.values() for _ in targets]
        results, _ = behind(tokenizer, asked, [*targets] * len(chosen), of_prompts, [*target_ids] * len(chosen))
        for i, end in enumerate(chosen):
            its_ids = results[i * count : (i + 1) * count]
            number[end] = variants.setdefault(str(its_ids), len(variants))
            if len(distinct) < len(variants):
                distinct.append(its_ids)
    return np.array([number[end] for end in ends], np.int32), distinct


def _ends_with(ids: list[int], tail: list[int]) -> bool:
    return ids[max(len(ids) - len(tail), 0) :] == tail


def _by_text(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> dict[str, list[int]]:
    distinct = list(dict.fromkeys(texts))
    return dict(zip(distinct, encode(tokenizer, distinct)[0], strict=True))
