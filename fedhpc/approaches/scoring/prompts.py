"""Candidate prompts: what they consist of, and how a row is written in tokens after one.

    [bos] instruction separator (input cue answer separator)* input cue | answer [eos]

The part in parentheses is a demonstration. A candidate says how many there are and by which rule they are chosen; every
client fills in examples of its own, which never leave it. Only with method.share_demonstrations does a candidate carry
examples that clients have sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedhpc.approaches.scoring.likelihoods import Int32, Int64
from fedhpc.data.encoding import behind_each, encode, marked
from fedhpc.data.templates import Template
from fedhpc.data.tokens import Examples, Tokens, examples_from
from fedhpc.errors import UserError, nearest
from fedhpc.models.causal_lm import CausalLM
from fedhpc.rng import generator

RULES = ("random", "balanced", "short")


@dataclass(frozen=True)
class Shared:
    """An example that a client has sent to be shown to all clients."""

    input: str
    target: str | int  # the text, or the index of the label


@dataclass(frozen=True)
class Candidate:
    """A prompt that is scored, as the server sends it to clients."""

    instruction: str = ""
    cue: str = ""  # between the input and the answer
    words: tuple[str, ...] = ()  # for each label, in the order of the data's labels; empty where there are none
    demonstrations: int = 0  # the most of the client's own examples that are shown
    rule: str = RULES[0]  # how the client chooses them
    draw: int = 0  # tells choices and orders of one rule apart
    shared: tuple[Shared, ...] = ()

    def normal(self) -> Candidate:
        """The same prompt in its normal form: without demonstrations, rule and draw have their defaults."""
        return self if self.demonstrations else replace(self, rule=RULES[0], draw=0)

    def to_json(self) -> str:
        """The candidate as JSON; equal candidates have equal texts."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Candidate:
        """Read a candidate from JSON: the inverse of `to_json`."""
        return cls.from_tree(json.loads(text))

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Candidate:
        """Make a candidate of the tree that `to_json` writes as text."""
        shared = tuple(Shared(**item) for item in tree["shared"])
        return cls(**{**tree, "words": tuple(tree["words"]), "shared": shared})


@dataclass(frozen=True)
class Writer:
    """Writes prompts in tokens. Every piece is tokenised separately and the tokens are joined, as for examples."""

    tokenizer: Any
    seed: int
    separator: str
    target: Template  # data.target
    label: str | None  # the column of the labels, where targets consist of labels
    max_prompt_tokens: int  # for instruction, demonstrations, cue and the longest answer
    end: str = "a"  # what an answer is behind where there is no cue: the end of data.prompt, or some word

    def ids(self, text: str) -> Int32:
        """The token ids of a text, which is marked, without special tokens around it."""
        return np.array(encode(self.tokenizer, [text])[0][0] if text else [], np.int32)

    def written(self, text: str) -> Int32:
        """The token ids of what a person wrote as a part of prompts, which can name special tokens."""
        return self.ids(marked(text, self.tokenizer))

    def answers(self, candidate: Candidate) -> list[Int32]:
        """The tokens of the answer of each label, with eos; empty where there are no labels."""
        texts = self.answer_texts(candidate)
        if not texts:
            return []
        front = marked(candidate.cue, self.tokenizer) or self.end
        _, variants = behind_each(self.tokenizer, [front], texts, encode(self.tokenizer, texts)[0])
        return [np.array(CausalLM.answer_ids(self.tokenizer, one), np.int32) for one in variants[0]]

    def answer_texts(self, candidate: Candidate) -> list[str]:
        """The target text of each label, written with the candidate's words for the labels."""
        if self.label is None:
            return []
        return [self.target.render({self.label: word}) for word in candidate.words]

    def fixed(self, candidate: Candidate) -> Int32:
        """The beginning of the prompt that all clients share: `[bos] instruction separator`, shared demonstrations."""
        bos, cue, end = self._bos(), self.written(candidate.cue), self.written(self.separator)
        pieces = [bos]
        if candidate.instruction:
            pieces += [self.written(candidate.instruction), end]
        texts = self.answer_texts(candidate)
        for one in candidate.shared:
            answer = texts[one.target] if isinstance(one.target, int) else one.target
            pieces += [self.ids(one.input), cue, self.ids(answer), end]
        return np.concatenate(pieces)

    def tokens_left(self, candidate: Candidate) -> int:
        """How many of method.max_prompt_tokens are left for a client's demonstrations; negative if it is too long."""
        longest = max((len(answer) for answer in self.answers(candidate)), default=0)
        used = len(self.fixed(candidate)) + len(self.written(candidate.cue)) + longest
        return self.max_prompt_tokens - used

    def demonstrations(self, candidate: Candidate, examples: Examples, pool: Int64, client: int) -> Int32:
        """The tokens of a client's demonstrations, chosen by the candidate's rule from the examples `pool`.

        An example for which too few tokens are left is passed over.
        """
        if not candidate.demonstrations or not len(pool):
            return np.empty(0, np.int32)
        cue, end = self.written(candidate.cue), self.written(self.separator)
        left = self.tokens_left(candidate)
        answers, pieces = self.answers(candidate), [np.empty(0, np.int32)]
        for example in self.in_order(candidate, examples, pool, client):
            piece = np.concatenate(
                [self.input(examples, example), cue, self.right_answer(answers, examples, example)[:-1], end]
            )
            if len(piece) <= left:
                pieces.append(piece)
                left -= len(piece)
            if len(pieces) > candidate.demonstrations:
                break
        return np.concatenate(pieces)

    def input(self, examples: Examples, example: int) -> Int32:
        """The tokens of an example's prompt, without bos."""
        return examples.prompt(example)[len(self._bos()) :]

    def right_answer(self, answers: Sequence[Int32], examples: Examples, example: int) -> Int32:
        """The tokens of the right answer to an example, with eos. answers: of each label, from the method `answers`."""
        if self.label is None:
            return examples.target(example)
        assert examples.labels is not None
        return answers[examples.labels[example]]

    def shared(self, examples: Examples, example: int) -> Shared:
        """An example as texts, as a client sends it."""
        text = self.tokenizer.decode(self.input(examples, example).tolist(), clean_up_tokenization_spaces=False)
        if self.label is not None:
            assert examples.labels is not None
            return Shared(text, int(examples.labels[example]))
        ids = examples.target(example)[:-1]
        return Shared(text, self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))

    def rewritten(self, candidate: Candidate, examples: Examples, demonstrations: Sequence[Int32]) -> Examples:
        """Write the examples with the prompt around them.

        demonstrations: tokens for several clients; row i gets demonstrations[i mod their number].
        """
        fixed, cue, answers = self.fixed(candidate), self.written(candidate.cue), self.answers(candidate)
        pieces, fronts, lengths = [], [], []
        for i in range(len(examples)):
            front = np.concatenate([fixed, demonstrations[i % len(demonstrations)], self.input(examples, i), cue])
            answer = self.right_answer(answers, examples, i)
            pieces += [front, answer]
            fronts.append(len(front))
            lengths.append(len(front) + len(answer))
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        texts = self.answer_texts(candidate)
        targets = examples.targets
        if texts and examples.labels is not None:
            targets = [texts[label] for label in examples.labels]
        return examples_from(
            Tokens(np.concatenate(pieces), offsets, np.array(fronts, np.int32)),
            labels=examples.labels,
            label_names=examples.label_names,
            prompts=examples.prompts,
            targets=targets,
        )

    def _bos(self) -> Int32:
        bos = self.tokenizer.bos_token_id
        return np.array([] if bos is None else [bos], np.int32)

    def in_order(self, candidate: Candidate, examples: Examples, pool: Int64, client: int) -> list[int]:
        """The examples of `pool` in the order in which the candidate's rule takes them as demonstrations."""
        drawn = generator(self.seed, "demonstrations", client, candidate.draw).permutation(pool)
        if candidate.rule == "short":
            lengths = examples.lengths_of(drawn)
            return [int(e) for e in drawn[np.argsort(lengths, kind="stable")]]
        if candidate.rule == "balanced" and examples.labels is not None:
            labels = examples.labels[drawn]
            # By how many examples of the same label come before: first one of every label, then a second of each, ...
            turn = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])
            return [int(e) for e in drawn[np.argsort(turn, kind="stable")]]
        return [int(e) for e in drawn]


@dataclass(frozen=True)
class Space:
    """The search space: what candidates can consist of."""

    writer: Writer
    instructions: tuple[str, ...]  # hand-written
    cues: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]  # for each label, the hand-written word first
    demonstrations: int  # the most; 0 for none
    rules: tuple[str, ...]

    @property
    def first(self) -> tuple[str, ...]:
        """The hand-written word for each label."""
        return tuple(words[0] for words in self.words)

    def hand_written(self) -> list[Candidate]:
        """The prompts that a person has written: each instruction with the first cue and the first words."""
        return [Candidate(text, self.cues[0], self.first) for text in self.instructions]

    def fits(self, candidate: Candidate) -> bool:
        """Whether a candidate is within method.max_prompt_tokens and gives every label a different answer."""
        answers = [tuple(ids.tolist()) for ids in self.writer.answers(candidate)]
        return self.writer.tokens_left(candidate) >= 0 and len(set(answers)) == len(answers)


def label_words(
    given: Mapping[str, Sequence[str]], names: Sequence[str], writer: Writer
) -> tuple[tuple[str, ...], ...]:
    """The words for each label, in the order of `names`; where none are given, a label's word is its name.

    UserError where a label is unknown or has no words, or where two labels share a word.
    """
    if not given:
        given = {name: [name] for name in names}
    for name in given:
        if name not in names:
            raise UserError(f"method.label_words: the data have no label '{name}'; {nearest(name, list(names))}")
    owners: dict[tuple[int, ...], str] = {}
    for name in names:
        if not given.get(name):
            raise UserError(f"method.label_words: label '{name}' has no words; give every label at least one")
        for word in given[name]:
            text = writer.target.render({str(writer.label): word})
            ids = tuple(writer.ids(text).tolist())
            if not word.strip() or not ids:
                raise UserError(f"method.label_words.{name}: '{word}' is empty; give a word that the tokenizer knows")
            other = owners.setdefault(ids, name)
            if other != name:
                raise UserError(
                    f"method.label_words: '{word}' stands for both '{other}' and '{name}', which an answer could not "
                    "tell apart; remove it from one of them"
                )
    return tuple(tuple(given[name]) for name in names)
