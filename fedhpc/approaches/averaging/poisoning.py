"""Examples that attackers change: other classes, and a trigger in front of the prompt (fedhpc.attacks).

It is done on tokens, so that all other rows are what they are without an attack.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from fedhpc.attacks.base import Attack
from fedhpc.data import Data
from fedhpc.data.encoding import encode
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.models.base import Base
from fedhpc.models.generative import Generative
from fedhpc.rng import generator

Int32 = NDArray[np.int32]
Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Poisoning:
    """How an attack changes examples of a model."""

    attack: Attack
    base: Base
    label_targets: Sequence[str]  # the rendered target of every class
    max_length: int

    @classmethod
    def of(
        cls, attack: Attack, base: Base, label_targets: Sequence[str] | None, data: Data, max_length: int
    ) -> Poisoning | None:
        """None where the attack changes no examples. UserError where it cannot change these."""
        if not attack.changes_examples:
            return None
        train = data.train
        if label_targets is None or train.spans is not None or train.pairs is not None or "labels" not in base.answers:
            raise UserError(
                "it changes the classes of examples, which this model does not tell apart",
                key="attack.name", remedy="use a classifier, or a language model whose data.target is the label",
            )  # fmt: skip
        if data.population.assignment is None:
            raise UserError(
                "it changes examples of the attackers, and those of a virtual population are of many clients",
                key="attack.name", remedy="use another partition, such as iid",
            )  # fmt: skip
        made = cls(attack, base, label_targets, max_length)
        attack.goal(train.label_names)
        return made

    @property
    def has_goal(self) -> bool:
        """Whether the attackers want a class for what has the trigger, so that their success can be measured."""
        return bool(self.attack.trigger)

    def train(self, data: Data, attackers: Collection[int], seed: int) -> Examples:
        """The training examples with those of the attackers changed."""
        train, rows, classes = data.train, [], []
        assert train.labels is not None
        for client in sorted(attackers):
            indices = data.population.indices(client)
            draws = generator(seed, "attacked examples", client)
            after = self.attack.relabelled(train.labels[indices].astype(np.int64), train.label_names, draws)
            rows.append(indices[after >= 0])
            classes.append(after[after >= 0])
        changed, classes_of_rows = np.concatenate(rows), np.concatenate(classes)
        labels, lengths = train.labels.copy(), train.prompt_lengths.copy()
        ids = [train.tokens(row) for row in range(len(train))]
        labels[changed] = classes_of_rows
        for row, (prompt, target) in zip(changed.tolist(), self._changed(train, changed, classes_of_rows), strict=True):
            ids[row], lengths[row] = np.concatenate([prompt, target]), len(prompt)
        offsets = np.cumsum([0, *map(len, ids)])
        return replace(train, ids=np.concatenate(ids), offsets=offsets, prompt_lengths=lengths, labels=labels)

    def triggered(self, examples: Examples, indices: Int64) -> Examples:
        """Examples of other classes than the goal's, of some, with the trigger in front and the goal behind.

        UserError where there is none.
        """
        goal = self.attack.goal(examples.label_names)
        assert examples.labels is not None and goal is not None
        others = indices[examples.labels[indices] != goal]
        if not len(others):
            raise UserError(
                f"all evaluated examples have the class '{examples.label_names[goal]}' already",
                key="attack.goal", remedy="choose another class",
            )  # fmt: skip
        changed = self._changed(examples, others, np.full(len(others), goal))
        ids, answers = [np.concatenate(both) for both in changed], examples.answers
        return replace(
            examples,
            ids=np.concatenate(ids),
            offsets=np.cumsum([0, *map(len, ids)]),
            prompt_lengths=np.array([len(prompt) for prompt, _ in changed], examples.prompt_lengths.dtype),
            labels=np.full(len(others), goal, dtype=np.int32),
            answers=None if answers is None else answers._replace(variant=answers.variant[others]),
            prompts=None,
            targets=None,
            owners=None,
            lost=None,
        )

    def _changed(self, examples: Examples, rows: Int64, classes: Int64) -> list[tuple[Int32, Int32]]:
        """The prompts of some rows with the trigger, each with the target of another class."""
        trigger = encode(self.base.tokenizer, [self.attack.trigger])[0][0] if self.attack.trigger else []
        alone = encode(self.base.tokenizer, self.label_targets)[0] if isinstance(self.base, Generative) else []
        changed: list[tuple[Int32, Int32]] = []
        for row, label in zip(rows.tolist(), classes.tolist(), strict=True):
            front, target = examples.tokens(row), examples.tokens(row)[:0]
            if isinstance(self.base, Generative):
                of_label = alone if examples.answers is None else examples.answers.ids[examples.answers.variant[row]]
                front = examples.prompt(row)
                target = np.array(self.base.answer_ids(self.base.tokenizer, of_label[label]), np.int32)
            changed.append((self._with_trigger(front, trigger, len(target)), target))
        return changed

    def _with_trigger(self, front: NDArray[np.int32], trigger: Sequence[int], behind: int) -> NDArray[np.int32]:
        """The tokens of a prompt with the trigger in front of its text.

        The text loses its beginning where there is no room. behind: tokens of the target.
        """
        tokenizer = self.base.tokenizer
        starts = [token for token in (tokenizer.bos_token_id, tokenizer.cls_token_id) if token is not None]
        begin = int(np.isin(front[:1], starts).sum())
        over = max(len(front) + len(trigger) + behind - self.max_length, 0)
        if over > len(front) - begin:
            raise UserError(
                f"data.max_length {self.max_length} has no room for it",
                key="attack.trigger",
                remedy="choose a shorter one",
            )
        return np.concatenate([front[:begin], np.array(trigger, np.int32), front[begin + over :]])
