"""Edits and recombines candidates word by word, without a model.

This is as in GPS (Xu et al. 2022, arXiv 2210.17041), with the edits of GrIPS (Prasad et al. 2023, arXiv 2203.07281).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pydantic import Field

from fedhpc.approaches.prompt_search.proposers.base import Proposer
from fedhpc.approaches.scoring.prompts import Candidate, Shared
from fedhpc.registry import Section

_SENTENCE = re.compile(r"(?<=[.!?:])\s+")


class Templates(Proposer):
    """Edits and recombines the candidates, word by word."""

    class Options(Section):
        crossover: float = Field(
            0.3, ge=0, le=1, description="share of candidates that are recombined from two parents"
        )

    def propose(
        self, parents: Sequence[Candidate], shared: Sequence[Shared], count: int, draws: np.random.Generator
    ) -> list[Candidate]:
        candidates = []
        for _ in range(count):
            # Parents are sorted, best first: the smaller of two drawn indices prefers the better ones.
            one = parents[int(draws.integers(len(parents), size=2).min())]
            if draws.random() < self.options.crossover and len(parents) > 1:
                one = _crossed(one, parents[int(draws.integers(len(parents)))], draws)
            else:
                one = self._edited(one, parents, shared, draws)
            candidates.append(one)
        return candidates

    def _edited(
        self, one: Candidate, parents: Sequence[Candidate], shared: Sequence[Shared], draws: np.random.Generator
    ) -> Candidate:
        """Change one part of a candidate; all parts that can be changed are equally likely."""
        space = self.space
        parts = ["instruction"]
        parts += ["cue"] if len(space.cues) > 1 else []
        parts += ["words"] if any(len(words) > 1 for words in space.words) else []
        parts += ["demonstrations"] if space.demonstrations else []
        parts += ["shared"] if shared else []
        part = parts[int(draws.integers(len(parts)))]
        if part == "instruction":
            known = [*space.instructions, *(p.instruction for p in parents)]
            return replace(one, instruction=_reworded(one.instruction, known, draws))
        if part == "cue":
            return replace(one, cue=space.cues[int(draws.integers(len(space.cues)))])
        if part == "words":
            several = [i for i, words in enumerate(space.words) if len(words) > 1]
            i = several[int(draws.integers(len(several)))]
            word = space.words[i][int(draws.integers(len(space.words[i])))]
            return replace(one, words=(*one.words[:i], word, *one.words[i + 1 :]))
        if part == "demonstrations":
            return replace(
                one,
                demonstrations=int(draws.integers(space.demonstrations + 1)),
                rule=space.rules[int(draws.integers(len(space.rules)))],
                draw=int(draws.integers(2**31)),
            )
        return replace(one, shared=_rearranged(one.shared, shared, space.demonstrations, draws))


def _reworded(text: str, known: Sequence[str], draws: np.random.Generator) -> str:
    """Delete, move, insert or replace a word, or take over another instruction or its sentences."""
    words = text.split()
    vocabulary = sorted({word for other in known for word in other.split()})
    others = [other for other in known if other != text]
    edits = ["insert", "replace"] if vocabulary else []
    edits += ["delete", "move"] if len(words) > 1 else []
    edits += ["whole", "sentences"] if others else []
    if not edits:
        return text
    edit = edits[int(draws.integers(len(edits)))]
    position = int(draws.integers(max(len(words), 1)))
    if edit == "whole":
        return others[int(draws.integers(len(others)))]
    if edit == "sentences":
        ours, theirs = _SENTENCE.split(text), _SENTENCE.split(others[int(draws.integers(len(others)))])
        keep, skip = int(draws.integers(len(ours) + 1)), int(draws.integers(len(theirs)))
        return " ".join(part for part in [*ours[:keep], *theirs[skip:]] if part)
    if edit == "delete":
        words.pop(position)
    elif edit == "move":
        words.insert(int(draws.integers(len(words))), words.pop(position))
    else:
        word = vocabulary[int(draws.integers(len(vocabulary)))]
        words[position : position + (edit == "replace")] = [word]
    return " ".join(words)


def _crossed(one: Candidate, other: Candidate, draws: np.random.Generator) -> Candidate:
    """Take each part from one of two parents at random; how demonstrations are chosen is one part."""
    from_first = draws.random(5) < 0.5
    chosen = one if from_first[3] else other
    return Candidate(
        instruction=(one if from_first[0] else other).instruction,
        cue=(one if from_first[1] else other).cue,
        words=(one if from_first[2] else other).words,
        demonstrations=chosen.demonstrations,
        rule=chosen.rule,
        draw=chosen.draw,
        shared=(one if from_first[4] else other).shared,
    )


def _rearranged(
    now: tuple[Shared, ...], known: Sequence[Shared], most: int, draws: np.random.Generator
) -> tuple[Shared, ...]:
    """Add one of the `known` examples, remove one, or change their order."""
    new = [one for one in known if one not in now]
    changes = ["more"] if new and len(now) < most else []
    changes += ["less"] if now else []
    changes += ["order"] if len(now) > 1 else []
    if not changes:
        return now
    change = changes[int(draws.integers(len(changes)))]
    if change == "more":
        position = int(draws.integers(len(now) + 1))
        return (*now[:position], new[int(draws.integers(len(new)))], *now[position:])
    if change == "less":
        position = int(draws.integers(len(now)))
        return (*now[:position], *now[position + 1 :])
    return tuple(now[i] for i in draws.permutation(len(now)))
