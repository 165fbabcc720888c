"""Personalization: the part of the payload that stays on each client, and the fine-tuning after the last round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from functools import cached_property

import torch
from torch import Tensor

from fedhpc.config import Config
from fedhpc.data import Data
from fedhpc.errors import UserError
from fedhpc.methods.base import Method, Tensors
from fedhpc.models.base import Base
from fedhpc.objectives.base import Objective
from fedhpc.training.block import Work, train_block
from fedhpc.training.client_state import PERSONAL
from fedhpc.training.local import LocalTraining
from fedhpc.updates.layout import Layout, Split


class PersonalPart:
    """Which tensors of the payload stay on each client (personalization.parts), and their first values."""

    def __init__(self, config: Config, method: Method, dtype: torch.dtype, adapter: Tensors | None = None) -> None:
        """adapter: the payload before the first round, where it is another than the method's own."""
        self._method, self.dtype, self._adapter = method, dtype, adapter
        #: The payload in two: what is exchanged, and what stays on the client.
        self.split = _split(config, method)

    def initial_payload(self) -> Tensor:
        """The payload before the first round (P,), on the CPU."""
        tensors = self._method.initial() if self._adapter is None else self._adapter
        return self._method.payload.flatten({name: t.to(self.dtype) for name, t in tensors.items()})

    @cached_property
    def _initial(self) -> Tensor:
        if not self.split.personal.shapes:
            return torch.empty(0, dtype=self.dtype)
        return self.split.apart(self.initial_payload())[1]

    @property
    def initial_part(self) -> Tensor:
        """The personal part of a client that was never sampled (P - S,), on the CPU."""
        return self._initial

    @property
    def keeps(self) -> tuple[str, ...]:
        """The names of its tensors in a client's file."""
        return tuple(f"{PERSONAL}.{name}" for name in self.split.personal.shapes)

    def initial(self, name: str) -> Tensor:
        """One of the tensors of a client that was never sampled."""
        return self.split.personal.views(self._initial)[name.removeprefix(f"{PERSONAL}.")]

    def of_clients(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Each client's personal part (K, P - S), of what K clients keep; (1, 0) where there is none."""
        if not self.keeps:
            return self._initial.unsqueeze(0)
        return self.split.personal.flatten({n: tensors[f"{PERSONAL}.{n}"] for n in self.split.personal.shapes})

    def tensors_after(self, tensors: Mapping[str, Tensor], updates: Tensor) -> dict[str, Tensor]:
        """What the clients keep once their personal parts have moved by -`updates` (K, P - S)."""
        if not self.keeps:
            return {}
        views = self.split.personal.views(self.of_clients(tensors) - updates)
        return {f"{PERSONAL}.{name}": view for name, view in views.items()}


def fine_tuned(
    config: Config,
    base: Base,
    method: Method,
    objective: Objective,
    data: Data,
    rounds: int,
    payloads: Tensor,
    clients: Sequence[int],
    fit: int | None = None,
) -> Tensor:
    """(K, P) after personalization.finetune_steps local steps of each client from its row of `payloads` (K, P).

    The optimizer is fresh and the learning rate constant. A client without training examples stays where it is. fit: as
    in `LocalTraining.of`.
    """
    steps = config.personalization.finetune_steps
    works = [Work(c, data.population.indices(c)) for c in clients]
    rows = [i for i, work in enumerate(works) if len(work.indices)]
    if not steps or not rows:
        return payloads
    after = rounds + 1  # so its draws are none that a round has made
    local = LocalTraining.of(config, after, after, fit)
    local = replace(local, steps=steps, epochs=None, schedule="constant", warmup=0.0, packing=config.client.packing)
    tuned = payloads.clone()
    chosen = [works[i] for i in rows]
    tuned[rows] -= train_block(base, method, objective, payloads[rows], chosen, data.train, local).updates
    return tuned


def _split(config: Config, method: Method) -> Split:
    """The payload with what matches personalization.parts apart."""
    names, patterns = list(method.payload.shapes), config.personalization.parts
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            shown = ", ".join([*names[:6], *(["..."] if len(names) > 7 else names[6:7]), *names[7:][-1:]])
            raise UserError(f"personalization.parts: no tensor of the payload matches '{pattern}'; it has: {shown}")
    personal = {n: s for n, s in method.payload.shapes.items() if any(fnmatchcase(n, p) for p in patterns)}
    if len(personal) == len(names):
        raise UserError(
            "personalization.parts: all tensors of the payload match, so nothing would be exchanged: use mode local"
        )
    if personal and method.trainable.shapes != method.payload.shapes:
        raise UserError(
            f"personalization.parts: {config.method.name} with these options trains other parameters than it "
            "exchanges, so none of them can stay on the client; exchange what is trained"
        )
    return Split(method.payload, Layout(personal))
