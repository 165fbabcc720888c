"""Tokenised examples: tokens of prompt and target (fedhpc.data.encoding), joined as the model (fedhpc.models) does it.

The tokens that a model is trained to predict are the *supervised* ones. They lie in spans, stretches of a row: the
target, or each assistant turn of a chat (fedhpc.data.chat_tokens).

The tokens of a split lie in memory-mapped files under `$FEDHPC_CACHE` (default `~/.cache/fedhpc`), named by a
hash of all they follow from: texts, `model.task`, tokenizer, length limit. Where nothing can be written they stay in
memory.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from fedhpc.config import Overlong
from fedhpc.data.encoding import behind, behind_each, encode, marked, unmarked
from fedhpc.data.partitioners.base import Int32, Int64
from fedhpc.data.rows import AT_ONCE, unnamed_file, write
from fedhpc.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Bool = NDArray[np.bool_]

_KNOWN = 2**22  # characters of the prompts whose tokens are remembered
_PIECE = 2**22  # bytes of an array that are in memory at once
_FORMAT = "fedhpc-tokens-1"  # of the fingerprint
_CACHED = "fedhpc-tokens-3"  # counts up with the rules by which texts become tokens


class Row(NamedTuple):
    """An example in tokens."""

    front: list[int]  # in front of the supervised tokens
    supervised: list[int]
    lost: int  # tokens of the texts that are left out, because there is no room for them
    needed: int  # the data.max_length with which none would be
    cut: int = 0  # supervised tokens that are left out (`data.overlong: truncate`), the end of the text among them


class OverlongError(UserError):
    """A row whose supervised tokens have no room in `data.max_length`; with `needed` they would."""

    def __init__(self, message: str, needed: int = 0, **where: str) -> None:
        super().__init__(message, **where)
        self.needed = needed

    @classmethod
    def target(cls, where: str, tokens: int, max_length: int, needed: int, is_label: bool) -> OverlongError:
        """The error of a target with this number of tokens; one that is a label alone is never cut."""
        others = "set data.overlong to drop" + ("" if is_label else " or truncate")
        return cls(
            f"{where}: the target has {tokens} tokens and does not fit in data.max_length {max_length}; use at least "
            f"{needed}, or {others}",
            needed=needed,
        )


# (ids of the prompt, ids of the target, where the row is) -> the example. UserError, with the place, if there is none.
Join = Callable[[list[int], list[int], str], Row]


class Writing(Protocol):
    """How a model writes an example as a row of tokens; the classes of fedhpc.models do."""

    @property
    def task(self) -> str: ...  # as in `model.task`; part of the cache's key
    @property
    def has_target(self) -> bool: ...
    @property
    def one_text(self) -> bool: ...  # whether a target is read behind its prompt, as one text
    def join(self, tokenizer: Any, max_length: int, room: int = 0, truncate: bool = False) -> Join:
        """How ids of texts become an example. OverlongError where `max_length` has no room for a target, unless
        `truncate` says that it loses its end. room: see `tokenize`."""


class Spans(NamedTuple):
    """The stretches of supervised tokens of each example, in order and apart from each other."""

    offsets: Int64  # [n + 1]; the spans of example e are those from offsets[e] to offsets[e + 1]
    starts: Int32  # [spans]: the first token of a span, counted within its example
    ends: Int32  # [spans]: one behind its last


class Ragged(NamedTuple):
    """Token ids beside those of the examples themselves."""

    ids: Int32  # [total]
    offsets: Int64  # [n + 1]; those of example e are ids[offsets[e]:offsets[e + 1]]; [1] where there are none

    def select(self, examples: Int64) -> Ragged:
        """The ids of some of the examples alone."""
        return Ragged(*_ragged(self.ids, self.offsets, examples)) if len(self.offsets) > 1 else self


class Tokens(NamedTuple):
    """Ragged token ids; the arrays may be memory maps."""

    ids: Int32  # [total]
    offsets: Int64  # [n + 1]; example e is ids[offsets[e]:offsets[e + 1]]
    prompt_lengths: Int32  # [n]; tokens in front of the first span, special ones included; 0 where there are none
    # What became of each text, for those who want to know; no part of the content.
    # Where rows are left out there are fewer examples than texts.
    lost: Int32 | None = None  # [n]; as in `Row`
    needed: Int32 | None = None  # [n]; as in `Row`
    apart: Bool | None = None  # [n]; whether a token would reach over the end of the prompt
    spelled: Bool | None = None  # [n]; whether it has the characters of a special token as text
    cut: Int32 | None = None  # [n]; as in `Row`
    overlong: Int32 | None = None  # [texts]; the data.max_length that a row needs which is left out; 0: it is not
    spans: Spans | None = None  # of chats, as in `Examples`
    questions: Ragged | None = None  # of chats: all up to the assistant's last turn, as the template asks for it
    replies: Ragged | None = None  # of chats: that turn

    def select(self, examples: Int64) -> Tokens:
        """The tokens of some of the examples alone, in this order."""
        ids, offsets = _ragged(self.ids, self.offsets, examples)
        of_each = {name: getattr(self, name) for name in _OF_EACH}
        of_each = {name: array if array is None else array[examples] for name, array in of_each.items()}
        spans, questions, replies = self.spans, self.questions, self.replies
        if spans is not None:
            starts, of_spans = _ragged(spans.starts, spans.offsets, examples)
            spans = Spans(of_spans, starts, _ragged(spans.ends, spans.offsets, examples)[0])
        if questions is not None and replies is not None:
            questions, replies = questions.select(examples), replies.select(examples)
        return Tokens(ids, offsets, **of_each, spans=spans, questions=questions, replies=replies)


#: The arrays of `Tokens` that have a number for each example.
_OF_EACH = ("prompt_lengths", "lost", "needed", "apart", "spelled", "cut")


class Answers(NamedTuple):
    """The tokens of each label's target, as they are behind the prompt of an example."""

    variant: Int32  # [n]; which of `ids` they are
    ids: list[list[list[int]]]  # for each variant and label


@dataclass(frozen=True)
class Examples:
    """The examples of one split.

    labels index label_names and owners index owner_names; prompts and targets are the rendered texts, marked, kept
    where texts are evaluated.
    """

    ids: Int32  # [total]
    offsets: Int64  # [n + 1]
    prompt_lengths: Int32  # [n]
    spans: Spans | None  # None: each example has one span, from its prompt to its end
    labels: Int32 | None  # [n]
    label_names: list[str]
    owners: Int32 | None  # [n]
    owner_names: list[str]
    prompts: list[str] | None
    targets: list[str] | None
    fingerprint: str  # of all of the above
    lost: Int32 | None = None  # [n]; tokens of each text that are left out; None: not known
    answers: Answers | None = None  # where a label's target is not the same tokens behind a prompt as by itself
    questions: Ragged | None = None  # of chats of validation and test, as in `Tokens`
    ends: tuple[int, ...] = ()  # tokens that end an answer beside eos: in a chat a turn may end with another one
    pairs: Examples | None = None  # of preferences: 2n rows; 2e has the better answer of example e, 2e + 1 the worse
    desirable: Bool | None = None  # [n]; of single answers: whether people want them

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def lengths(self) -> Int64:
        """int64[n]: tokens of each example."""
        return np.diff(self.offsets)

    def lengths_of(self, indices: Int64) -> Int64:
        """int64 (len(indices),): tokens of these examples."""
        return self.offsets[indices + 1] - self.offsets[indices]

    def tokens(self, example: int) -> Int32:
        """The token ids of one example."""
        return self.ids[self.offsets[example] : self.offsets[example + 1]]

    def prompt(self, example: int) -> Int32:
        """The token ids in front of the first span of one example."""
        return self.tokens(example)[: self.prompt_lengths[example]]

    def question(self, example: int) -> Int32:
        """The token ids that an answer to one example goes on from: its prompt, or of a chat all before the last turn.

        A template may write these otherwise where it asks for that turn than where it is there.
        """
        if self.questions is None:
            return self.prompt(example)
        offsets = self.questions.offsets
        return self.questions.ids[offsets[example] : offsets[example + 1]]

    def target(self, example: int) -> Int32:
        """The token ids from the first span of one example to its end."""
        return self.tokens(example)[self.prompt_lengths[example] :]

    def num_supervised(self, indices: Int64) -> Int64:
        """int64 (len(indices),): supervised tokens of these examples."""
        if self.spans is None:
            return self.lengths_of(indices) - self._first(indices)
        starts, ends, row = self._spans_of(indices)
        return np.bincount(row, weights=ends - starts, minlength=len(indices)).astype(np.int64)

    def supervised(self, indices: Int64) -> tuple[Int64, Int64]:
        """Where the supervised tokens of these examples are, in order: two arrays int64 (S,).

        Which of `indices` a token belongs to, counted from 0, and its position within that example.
        """
        starts, ends, row = self._spans_of(indices)
        return np.repeat(row, ends - starts), ranges(starts, ends)

    def turns(self, indices: Int64) -> Int64:
        """The supervised stretches of these examples, in order, (n, 2): which of its example, from 0, and its tokens.

        Stretches without tokens are left out.
        """
        starts, ends, row = self._spans_of(indices)
        first = np.searchsorted(row, row)
        there = ends > starts
        return np.stack([np.arange(len(row)) - first, ends - starts], axis=1)[there]

    def _first(self, indices: Int64) -> Int64:
        """int64 (len(indices),): where the first span starts.

        Nothing stands in front of the first token of a row, so nothing can predict it.
        """
        return np.maximum(self.prompt_lengths[indices].astype(np.int64), 1)

    def _spans_of(self, indices: Int64) -> tuple[Int64, Int64, Int64]:
        """Starts and ends of the spans of these examples, and which of `indices` each belongs to."""
        if self.spans is None:
            return self._first(indices), self.lengths_of(indices), np.arange(len(indices))
        first, last = self.spans.offsets[indices], self.spans.offsets[indices + 1]
        chosen = ranges(first, last)
        starts, ends = (bounds[chosen].astype(np.int64) for bounds in (self.spans.starts, self.spans.ends))
        starts = np.maximum(starts, 1)
        return starts, np.maximum(ends, starts), np.repeat(np.arange(len(indices)), last - first)


def ranges(starts: Int64, ends: Int64) -> Int64:
    """The whole numbers from each start up to its end, one range after the other: ranges([2, 7], [4, 8]) is 2, 3, 7."""
    counts = ends - starts
    before = np.cumsum(counts) - counts
    numbers: Int64 = np.arange(int(counts.sum())) + np.repeat(starts - before, counts)
    return numbers


def _ragged(values: Int32, offsets: Int64, chosen: Int64) -> tuple[Int32, Int64]:
    """The values of some rows of a ragged array, one behind the other in an unnamed file, and their offsets."""
    starts, ends = offsets[chosen], offsets[chosen + 1]
    with unnamed_file() as file:
        for at in range(0, len(starts), AT_ONCE):
            write(file, values[ranges(starts[at : at + AT_ONCE], ends[at : at + AT_ONCE])].data)
            release(values)
        return mapped(file), offsets_of(ends - starts)


def offsets_of(lengths: Int64) -> Int64:
    """Where rows of these lengths begin, one behind the other, and where the last one ends: int64 (n + 1,)."""
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


class _RaggedBuilder:
    """Writes rows of token ids to an unnamed file, part by part."""

    def __init__(self) -> None:
        self._file, self._lengths = unnamed_file(), [np.zeros(0, np.int64)]

    def add(self, ids: Int32, offsets: Int64) -> None:
        """Put rows behind those that are there."""
        write(self._file, ids.data)
        self._lengths.append(np.diff(offsets))

    def ragged(self) -> Ragged:
        """All rows that were added, in order."""
        with self._file:
            return Ragged(mapped(self._file), offsets_of(np.concatenate(self._lengths)))


def joined(parts: Iterable[Tokens]) -> Tokens:
    """The tokens of chats that come in parts, of which one is in memory at a time."""
    ids, questions, replies = _RaggedBuilder(), _RaggedBuilder(), _RaggedBuilder()
    of_each: dict[str, list[NDArray[Any]]] = {name: [] for name in (*_OF_EACH, "overlong")}
    spans: list[Spans] = []
    for part in parts:
        ids.add(part.ids, part.offsets)
        for name, arrays in of_each.items():
            arrays.append(getattr(part, name))
        assert part.spans is not None and part.questions is not None and part.replies is not None
        spans.append(part.spans)
        questions.add(*part.questions)
        replies.add(*part.replies)
    counts = np.concatenate([np.diff(one.offsets) for one in spans])
    starts, ends = (np.concatenate([getattr(one, name) for one in spans]) for name in ("starts", "ends"))
    return Tokens(
        *ids.ragged(),
        **{name: np.concatenate(arrays) for name, arrays in of_each.items()},
        spans=Spans(offsets_of(counts), starts, ends),
        questions=questions.ragged(),
        replies=replies.ragged(),
    )


def examples_from(
    tokens: Tokens,
    *,
    spans: Spans | None = None,
    labels: Int32 | None = None,
    label_names: Sequence[str] = (),
    owners: Int32 | None = None,
    owner_names: Sequence[str] = (),
    prompts: list[str] | None = None,
    targets: list[str] | None = None,
    answers: Answers | None = None,
    ends: tuple[int, ...] = (),
    paired: bool = False,
    desirable: Bool | None = None,
) -> Examples:
    """Examples with the fingerprint of their content. spans: where an example has another number of them than one.

    paired: tokens (and spans) are of two rows for each example, the better and the worse answer to its prompt. By
    itself, such an example is both rows, one behind the other.
    """
    pairs, each = (examples_from(tokens, spans=spans), 2) if paired else (None, 1)
    questions = tokens.questions if tokens.questions is not None and len(tokens.questions.offsets) > 1 else None
    if questions is not None and paired:
        questions = questions.select(np.arange(0, len(tokens.prompt_lengths), 2))
    digest = hashlib.sha256(_FORMAT.encode())
    for numbers in (tokens.ids, tokens.offsets, tokens.prompt_lengths, *(spans or ()), labels, owners):
        for piece in [b"-"] if numbers is None else pieces_of(numbers):
            digest.update(piece)
    if desirable is not None:
        digest.update(desirable.tobytes())
    if paired:
        digest.update(b"pairs")
    for texts in (label_names, owner_names, prompts or (), targets or ()):
        update_digest(digest, texts)
    return Examples(
        ids=tokens.ids,
        offsets=tokens.offsets[::each],
        prompt_lengths=tokens.prompt_lengths[::each],
        spans=None if paired else spans,
        labels=labels,
        label_names=list(label_names),
        owners=owners,
        owner_names=list(owner_names),
        prompts=prompts,
        targets=targets,
        fingerprint=digest.hexdigest(),
        lost=None if tokens.lost is None else tokens.lost[::each],
        answers=answers,
        questions=questions,
        ends=ends,
        pairs=pairs,
        desirable=desirable,
    )


def group_references(examples: Examples, indices: Int64 | None = None) -> list[tuple[int, list[str]]]:
    """(first example, targets) per distinct rendered prompt, in order of first appearance.

    Of some examples, or of all. For splits that keep their texts: validation and test, and train where clients are
    evaluated on texts.
    """
    if examples.prompts is None or examples.targets is None:
        raise ValueError("these examples keep no texts")
    groups: dict[str, tuple[int, list[str]]] = {}
    for number in range(len(examples)) if indices is None else indices.tolist():
        groups.setdefault(examples.prompts[number], (number, []))[1].append(examples.targets[number])
    return list(groups.values())


def tokenize(
    prompts: Sequence[str],
    targets: Sequence[str],
    locations: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    writing: Writing,
    room: int = 0,
    overlong: Overlong = "error",
) -> Tokens:
    """Tokenise rendered texts, which are marked; an example has at most `max_length` tokens.

    locations: where each row was read ("train.csv:7"), for the UserError about an empty target or texts that make no
    example. room: as many tokens as a prompt leaves free for a target, even where its own is shorter. overlong: what
    becomes of a row whose target does not fit, as in `data.overlong`.
    """
    join = writing.join(tokenizer, max_length, room, truncate=overlong == "truncate")
    recurring = _Recurring(tokenizer)
    lengths, prompt_lengths, lost, needed, cut, too_long = (np.zeros(len(prompts), np.int32) for _ in range(6))
    apart, spelled = (np.zeros(len(prompts), bool) for _ in range(2))
    with unnamed_file() as file:
        for start in range(0, len(prompts), AT_ONCE):
            chunk = slice(start, min(start + AT_ONCE, len(prompts)))
            of_rows, its_targets, where = prompts[chunk], targets[chunk], locations[chunk]
            of_prompts, prompt_spelled = recurring.encode(of_rows, where)
            of_targets, target_spelled = encode(tokenizer, its_targets, where)
            spelled[chunk] = np.array(prompt_spelled) | np.array(target_spelled)
            if writing.one_text:
                of_targets, apart[chunk] = behind(tokenizer, of_rows, its_targets, of_prompts, of_targets)
            pieces: list[list[int]] = []
            rows = zip(of_prompts, of_targets, its_targets, where, strict=True)
            for number, (of_prompt, of_target, target, location) in enumerate(rows, start):
                if writing.has_target and (not of_target or not unmarked(target).strip()):
                    raise UserError(f"{location}: data.target is empty here; leave the row out with data.where_not")
                try:
                    row = join(of_prompt, of_target, location)
                except OverlongError as error:
                    if overlong != "drop":
                        raise
                    too_long[number] = error.needed
                    continue
                pieces += row[:2]
                prompt_lengths[number], lost[number], needed[number] = len(row.front), row.lost, row.needed
                cut[number] = row.cut
                lengths[number] = len(row.front) + len(row.supervised)
            write(file, np.fromiter(chain.from_iterable(pieces), np.int32).data)
        ids = mapped(file)
    fits = too_long == 0
    return Tokens(
        ids,
        offsets_of(lengths[fits]),
        prompt_lengths[fits],
        lost=lost[fits],
        needed=needed[fits],
        apart=apart[fits],
        spelled=spelled[fits],
        cut=cut[fits],
        overlong=too_long,
    )


class _Recurring:
    """Encodes texts that come again and again, as prompts with several references do; each is tokenised once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer, self.characters = tokenizer, 0
        self._known: dict[str, tuple[array[int], bool]] = {}  # ids, and whether special tokens are spelled out

    def encode(self, texts: Sequence[str], locations: Sequence[str]) -> tuple[list[list[int]], list[bool]]:
        """`fedhpc.data.encoding.encode` of these texts."""
        if self.characters > _KNOWN:
            self._known, self.characters = {}, 0
        first: dict[str, str] = {}
        for text, location in zip(texts, locations, strict=True):
            if text not in self._known:
                first.setdefault(text, location)
        if first:
            for text, ids, spelled in zip(first, *encode(self.tokenizer, [*first], [*first.values()]), strict=True):
                self._known[text] = array("i", ids), spelled
                self.characters += len(text)
        known = [self._known[text] for text in texts]
        return [ids.tolist() for ids, _ in known], [spelled for _, spelled in known]


def answers_behind(
    prompts: Sequence[str], texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, writing: Writing
) -> tuple[Answers | None, int]:
    """The tokens of the labels' targets `texts` behind each prompt, and how many the longest of them has.

    None where they are everywhere those of the texts by themselves.
    """
    alone = encode(tokenizer, texts)[0]
    if not writing.one_text:
        return None, max(map(len, alone))
    variant, ids = behind_each(tokenizer, prompts, texts, alone)
    longest = max(len(one) for of_labels in ids for one in of_labels)
    return (None if ids == [alone] else Answers(variant, ids)), longest


def prompt_ids(
    prompts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, writing: Writing
) -> list[Int32]:
    """The token ids of prompts without a target, special ones included: as `tokenize` makes them.

    prompts: as a template renders them; a name of a special token is the token.
    """
    join = writing.join(tokenizer, max_length)
    encoded = encode(tokenizer, [marked(prompt, tokenizer) for prompt in prompts])[0] if prompts else []
    return [np.array(join(ids, [], f"prompt {number}")[0], np.int32) for number, ids in enumerate(encoded, 1)]


def cached_tokens(
    prompts: Sequence[str],
    targets: Sequence[str],
    locations: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    writing: Writing,
    write: bool = True,
    room: int = 0,
    overlong: Overlong = "error",
) -> tuple[Tokens, str | None]:
    """`tokenize`, or read the tokens from the cache; also a message if they could not be cached.

    write: whether to put tokens into the cache that are not in it.
    """
    content = f"{_CACHED} {writing.task} {max_length} {room} {overlong} {tokenizer_content(tokenizer)}"
    digest = hashlib.sha256(content.encode())
    update_digest(digest, prompts)
    update_digest(digest, targets)

    def make() -> Tokens:
        return tokenize(prompts, targets, locations, tokenizer, max_length, writing, room, overlong)

    return cached(digest, len(prompts), make, write)


def cached(
    digest: hashlib._Hash, count: int, make: Callable[[], Tokens], write: bool, chats: bool = False
) -> tuple[Tokens, str | None]:
    """The tokens of `count` texts that the cache has under a digest, or those that `make` makes.

    Also a message if they could not be cached. write: whether to put tokens into the cache that are not in it.
    """
    try:
        folder = cache_dir() / digest.hexdigest()
    except RuntimeError as error:  # a user without a home directory
        return make(), f"tokens are not cached: {error}"
    if (loaded := _load(folder, count, chats)) is not None:
        return loaded, None
    tokens = make()
    if not write:
        return tokens, None
    try:
        save_tokens(folder, tokens)
    except OSError as error:
        return tokens, f"tokens are not cached in {folder.parent}: {error.strerror or error}"
    # What was made here is dropped for the files, which the processes of a machine share.
    return _load(folder, count, chats) or tokens, None


def cache_dir() -> Path:
    """Where tokens are kept: `$FEDHPC_CACHE/tokens`, by default `~/.cache/fedhpc/tokens`."""
    return Path(os.environ.get("FEDHPC_CACHE") or Path("~/.cache/fedhpc").expanduser()) / "tokens"


def tokenizer_content(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides how the tokenizer splits a text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        content = json.loads(backend.to_str())
        # Calls with padding or truncation leave their settings behind; ours use neither.
        content["truncation"] = content["padding"] = None
    else:
        content = [
            type(tokenizer).__name__,
            sorted(tokenizer.get_vocab().items()),
            repr(tokenizer.init_kwargs),
        ]
    special = [tokenizer.bos_token_id, tokenizer.eos_token_id, sorted(map(str, tokenizer.all_special_tokens))]
    text = json.dumps([content, special], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def update_digest(digest: hashlib._Hash, texts: Sequence[str]) -> None:
    """Add texts to a digest."""
    # Lengths first: ["ab", "c"] and ["a", "bc"] differ.
    lengths = np.zeros(len(texts) + 1, np.int64)
    lengths[0] = len(texts)
    for start in range(0, len(texts), AT_ONCE):
        encoded = [text.encode("utf-8", "surrogatepass") for text in texts[start : start + AT_ONCE]]
        lengths[start + 1 : start + 1 + len(encoded)] = [*map(len, encoded)]
    digest.update(lengths.data)
    for start in range(0, len(texts), AT_ONCE):
        digest.update("".join(texts[start : start + AT_ONCE]).encode("utf-8", "surrogatepass"))


def mapped(file: BinaryIO) -> Int32:
    """The ids in an unnamed file, as a memory map."""
    size = os.fstat(file.fileno()).st_size
    return np.memmap(file, np.int32, "r") if size else np.zeros(0, np.int32)


def pieces_of(array: NDArray[Any]) -> Iterator[memoryview]:
    """The bytes of an array, piece by piece; those of a memory map do not stay in memory."""
    flat = np.ascontiguousarray(array).reshape(-1)
    each = max(_PIECE // flat.itemsize, 1)
    for start in range(0, len(flat), each):
        yield flat[start : start + each].data
        release(array)


def release(array: NDArray[Any]) -> None:
    """Let the pages of a memory map leave memory; they are read again where they are needed."""
    if isinstance(array.base, mmap.mmap):
        array.base.madvise(mmap.MADV_DONTNEED)


def _load(folder: Path, count: int, chats: bool = False) -> Tokens | None:
    """The tokens in a cache folder; None where it is absent or damaged."""

    def read(*names: str) -> list[Any]:
        return [np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names]

    try:
        tokens = Tokens(*read(*_FLAT))
        if chats:
            spans = Spans(*read(*_files("spans", Spans)))
            questions, replies = (Ragged(*read(*_files(name, Ragged))) for name in ("questions", "replies"))
            tokens = tokens._replace(spans=spans, questions=questions, replies=replies)
    except (OSError, ValueError, EOFError):
        return None
    examples = len(tokens.offsets) - 1
    if tokens.overlong is None or len(tokens.overlong) != count:
        return None
    of_each = [getattr(tokens, name) for name in _OF_EACH]
    if np.count_nonzero(tokens.overlong == 0) != examples or any(a is None or len(a) != examples for a in of_each):
        return None
    if chats and not (
        len(spans.offsets) == examples + 1
        and spans.offsets[-1] == len(spans.starts) == len(spans.ends)
        and all(len(part.offsets) in (1, examples + 1) for part in (questions, replies))
        and all(part.offsets[-1] == len(part.ids) for part in (questions, replies))
    ):
        return None
    return tokens if tokens.offsets[-1] == len(tokens.ids) else None


#: The files of a cache folder, but for those of chats.
_FLAT = ("ids", "offsets", *_OF_EACH, "overlong")


def _files(name: str, nested: type[Spans | Ragged]) -> list[str]:
    """The files of a part of Tokens that has several arrays."""
    return [f"{name}.{field}" for field in nested._fields]


def save_tokens(folder: Path, tokens: Tokens) -> None:
    """Write all files beside `folder`, then rename: a reader finds them whole or not at all."""
    arrays: dict[str, Any] = {name: getattr(tokens, name) for name in _FLAT}
    for name, part in (("spans", tokens.spans), ("questions", tokens.questions), ("replies", tokens.replies)):
        if part is not None:
            arrays |= dict(zip(_files(name, type(part)), part, strict=True))
    folder.parent.mkdir(parents=True, exist_ok=True)
    written = Path(tempfile.mkdtemp(prefix="writing-", dir=folder.parent))
    try:
        for name, array in arrays.items():
            with open(written / f"{name}.npy", "wb") as file:
                np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
                for piece in pieces_of(array):
                    file.write(piece)
                file.flush()
                os.fsync(file.fileno())
        if folder.is_dir() and _load(folder, len(arrays["overlong"]), tokens.spans is not None) is None:
            shutil.rmtree(folder)  # damaged; a sound one is never removed, others may have it mapped
        try:
            written.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another process was quicker, with the same content
                raise
    finally:
        shutil.rmtree(written, ignore_errors=True)
