"""Candidate prompts: what they are made of, and the tokens of a row behind one.

    [bos] instruction separator (input cue answer separator)* input cue | answer [eos]

The part in brackets are demonstrations. A candidate says how many and by which rule; every client fills in its own, so
they never leave it. Only with method.share_demonstrations a candidate carries some that clients have sent.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from fedhpc.approaches.scoring.likelihoods import Int32, Int64
from fedhpc.data.templates import Template
from fedhpc.data.tokens import Examples, Tokens, examples_from
from fedhpc.errors import UserError, nearest
from fedhpc.rng import generator

RULES = ("random", "balanced", "short")


@dataclass(frozen=True)
class Shared:
    """An example that a client has sent: its input, and its target or the place of its label."""

    input: str
    target: str | int


@dataclass(frozen=True)
class Candidate:
    """One prompt."""

    instruction: str = ""
    cue: str = ""  # between the input and the answer
    words: tuple[str, ...] = ()  # of each label, in the order of the data's labels; empty where there are none
    demonstrations: int = 0  # of the client's own, at most
    rule: str = RULES[0]  # how the client chooses them
    draw: int = 0  # tells choices and orders of one rule apart
    shared: tuple[Shared, ...] = ()

    def normal(self) -> Candidate:
        """The same prompt, with nothing said of how demonstrations are chosen where there are none."""
        return self if self.demonstrations else replace(self, rule=RULES[0], draw=0)

    def to_json(self) -> str:
        """The same candidate has the same text."""
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Candidate:
        """The inverse of `to_json`."""
        return cls.from_tree(json.loads(text))

    @classmethod
    def from_tree(cls, tree: Mapping[str, Any]) -> Candidate:
        """The same, already parsed."""
        shared = tuple(Shared(**item) for item in tree["shared"])
        return cls(**{**tree, "words": tuple(tree["words"]), "shared": shared})


@dataclass(frozen=True)
class Writer:
    """The tokens of prompts. All pieces are tokenised apart and joined, as the examples are."""

    tokenizer: Any
    seed: int
    separator: str
    target: Template  # data.target
    label: str | None  # the column of the labels, where targets are made of them alone
    max_prompt_tokens: int  # of instruction, demonstrations, cue and longest answer

    def ids(self, text: str) -> Int32:
        """Token ids of a text, without special ones."""
        found = self.tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return np.array(found, np.int32)

    def answers(self, candidate: Candidate) -> list[Int32]:
        """The answer of each label with eos; none where there are no labels."""
        end = np.array([self.tokenizer.eos_token_id], np.int32)
        return [np.concatenate([self.ids(text), end]) for text in self.answer_texts(candidate)]

    def answer_texts(self, candidate: Candidate) -> list[str]:
        """The target of each label, with the candidate's words for them."""
        if self.label is None:
            return []
        return [self.target.render({self.label: word}) for word in candidate.words]

    def fixed(self, candidate: Candidate) -> Int32:
        """`[bos] instruction separator` and shared demonstrations: what is the same for every client."""
        bos, cue, end = self._bos(), self.ids(candidate.cue), self.ids(self.separator)
        pieces = [bos]
        if candidate.instruction:
            pieces += [self.ids(candidate.instruction), end]
        texts = self.answer_texts(candidate)
        for one in candidate.shared:
            answer = texts[one.target] if isinstance(one.target, int) else one.target
            pieces += [self.ids(one.input), cue, self.ids(answer), end]
        return np.concatenate(pieces)

    def room(self, candidate: Candidate) -> int:
        """Tokens of method.max_prompt_tokens that are left for a client's demonstrations; negative: it is too long."""
        longest = max((len(answer) for answer in self.answers(candidate)), default=0)
        used = len(self.fixed(candidate)) + len(self.ids(candidate.cue)) + longest
        return self.max_prompt_tokens - used

    def own(self, candidate: Candidate, examples: Examples, pool: Int64, client: int) -> Int32:
        """Demonstrations of a client: those of its examples `pool` that the rule takes, as long as there is room."""
        if not candidate.demonstrations or not len(pool):
            return np.empty(0, np.int32)
        cue, end, room = self.ids(candidate.cue), self.ids(self.separator), self.room(candidate)
        answers, pieces = self.answers(candidate), [np.empty(0, np.int32)]
        for example in self._order(candidate, examples, pool, client):
            piece = np.concatenate(
                [self.input(examples, example), cue, self.right(answers, examples, example)[:-1], end]
            )
            if len(piece) <= room:
                pieces.append(piece)
                room -= len(piece)
            if len(pieces) > candidate.demonstrations:
                break
        return np.concatenate(pieces)

    def input(self, examples: Examples, example: int) -> Int32:
        """The tokens of an example's prompt, without bos."""
        return examples.prompt(example)[len(self._bos()) :]

    def right(self, answers: Sequence[Int32], examples: Examples, example: int) -> Int32:
        """The answer that is right for an example, with eos; answers: of each label, as `answers` gives them."""
        if self.label is None:
            return examples.target(example)
        assert examples.labels is not None
        return answers[examples.labels[example]]

    def shared(self, examples: Examples, example: int) -> Shared:
        """An example as it can be sent."""
        text = self.tokenizer.decode(self.input(examples, example).tolist(), clean_up_tokenization_spaces=False)
        if self.label is not None:
            assert examples.labels is not None
            return Shared(text, int(examples.labels[example]))
        ids = examples.target(example)[:-1]
        return Shared(text, self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))

    def rewritten(self, candidate: Candidate, examples: Examples, own: Sequence[Int32]) -> Examples:
        """The examples with the prompt around them; row i has the demonstrations own[i mod len(own)] in front."""
        fixed, cue, answers = self.fixed(candidate), self.ids(candidate.cue), self.answers(candidate)
        pieces, fronts, lengths = [], [], []
        for i in range(len(examples)):
            front = np.concatenate([fixed, own[i % len(own)], self.input(examples, i), cue])
            answer = self.right(answers, examples, i)
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

    def _order(self, candidate: Candidate, examples: Examples, pool: Int64, client: int) -> list[int]:
        drawn = generator(self.seed, "demonstrations", client, candidate.draw).permutation(pool)
        if candidate.rule == "short":
            lengths = examples.lengths_of(drawn)
            return [int(e) for e in drawn[np.argsort(lengths, kind="stable")]]
        if candidate.rule == "balanced" and examples.labels is not None:
            labels = examples.labels[drawn]
            turn = np.array([(labels[:i] == label).sum() for i, label in enumerate(labels)])  # its place in its label
            return [int(e) for e in drawn[np.argsort(turn, kind="stable")]]
        return [int(e) for e in drawn]


@dataclass(frozen=True)
class Space:
    """What candidates can be made of."""

    writer: Writer
    instructions: tuple[str, ...]  # hand-written
    cues: tuple[str, ...]
    words: tuple[tuple[str, ...], ...]  # of each label: the hand-written one first
    demonstrations: int  # at most; 0: none
    rules: tuple[str, ...]

    @property
    def first(self) -> tuple[str, ...]:
        """The hand-written word of each label."""
        return tuple(words[0] for words in self.words)

    def hand_written(self) -> list[Candidate]:
        """The prompts that a person has written: every instruction with the first cue and words."""
        return [Candidate(text, self.cues[0], self.first) for text in self.instructions]

    def fits(self, candidate: Candidate) -> bool:
        """Whether it is within method.max_prompt_tokens and tells the labels apart."""
        answers = [tuple(ids.tolist()) for ids in self.writer.answers(candidate)]
        return self.writer.room(candidate) >= 0 and len(set(answers)) == len(answers)


def label_words(
    given: Mapping[str, Sequence[str]], names: Sequence[str], writer: Writer
) -> tuple[tuple[str, ...], ...]:
    """The words of each label in the order of `names`; the labels' own names where none are given.

    UserError where a label is unknown or without words, or words cannot be told apart.
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
                    f"method.label_words: '{word}' is a word of both '{other}' and '{name}', which it could not tell "
                    "apart; take it from one of them"
                )
    return tuple(tuple(given[name]) for name in names)
