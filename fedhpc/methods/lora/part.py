"""A rule that trains some tensors of a payload, and leaves the others as the server sent them."""

from __future__ import annotations

from collections.abc import Collection

from fedhpc.lazy import Tensor
from fedhpc.methods.base import PerClient
from fedhpc.methods.lora.average import Average
from fedhpc.methods.lora.factors import name_a, name_b
from fedhpc.updates.layout import Layout


class Part(Average):
    """The tensors `names` of the payload of `rule` are trained."""

    def __init__(self, rule: Average, names: Collection[str]) -> None:
        super().__init__(rule.factors, rule.options, rule.base)
        self.rule = rule
        self._trainable = Layout({name: shape for name, shape in rule.payload.shapes.items() if name in names})

    @property
    def payload(self) -> Layout:
        return self.rule.payload

    @property
    def trainable(self) -> Layout:
        return self._trainable

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        clients = len(next(iter(trained.values())))
        resting = {n: received[n] for n in self.payload.shapes if n not in trained}
        return {**{n: value.expand(clients, *value.shape[1:]) for n, value in resting.items()}, **trained}

    def term(self, path: str, trained: PerClient, received: PerClient) -> tuple[Tensor, Tensor]:
        a, b = (trained[n] if n in trained else received[n] for n in (name_a(path), name_b(path)))
        return a, b
