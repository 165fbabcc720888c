"""`aggregation: dual`: an adapter that all share and one of each client's own, which never leaves it.

FedDPA (Yang et al. 2024, arXiv 2403.19211), iteratively trained (FedDPA-T). In a round a client first trains its own
adapter beside the shared one as it received it, and then the shared one alone:

    own:     h = W x + s (1 - w) B A x + s w B_i A_i x, of which A_i and B_i move
    shared:  h = W x + s B A x, of which A and B move, and go to the mean

with w = `local_weight`. A client is evaluated with both, and whoever has not trained one of its own with the shared one
alone. The paper weighs the two for each text, by how like it is to texts of the client; here w is the same for all.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.methods.base import PerClient, Tensors
from fedhpc.methods.lora.average import Average, needs_mean, shape_of
from fedhpc.methods.lora.factors import Factors, name_a, name_b
from fedhpc.methods.lora.part import Part
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base

_LOCAL = "_local.weight"


def local(name: str) -> str:
    """The name of a factor in the client's own adapter."""
    return name.removesuffix(".weight") + _LOCAL


class Dual(Average):
    """A and B of both adapters are trained, and those of the shared one exchanged."""

    def __init__(self, factors: Factors, options: Any, base: Base) -> None:
        super().__init__(factors, options, base)
        if base.head:
            raise UserError(
                "method.aggregation: dual trains two adapters one after the other, and a classifier's head with each",
                key="method.aggregation", remedy="use average, with personalization.parts",
            )  # fmt: skip

    @cached_property
    def trainable(self) -> Layout:
        shapes = self.factors.layout.shapes
        return Layout({**shapes, **{local(name): shape for name, shape in shapes.items()}})

    def initial(self) -> Tensors:
        of_clients = {local(name): tensor for name, tensor in self.factors.drawn(0, 0).items()}
        return {**self.factors.drawn(), **of_clients}

    def in_round(self, round_: int) -> Sequence[Average]:
        shared = list(self.factors.layout.shapes)
        return [OfClient(self, [local(name) for name in shared]), Part(self, shared)]

    def term(self, path: str, trained: PerClient, received: PerClient) -> tuple[Tensor, Tensor]:
        b = trained[local(name_b(path))]
        return self.both(path, trained, self.options.local_weight * b.flatten(1).any(dim=1).to(b.dtype))

    def both(self, path: str, values: PerClient, weights: Tensor) -> tuple[Tensor, Tensor]:
        """A (1 or K, 2 r, in) and B (1 or K, out, 2 r) of both adapters. weights: w of each client, (1 or K,)."""
        names = name_a(path), name_b(path)
        w = weights.view(-1, 1, 1)
        a = [values[names[0]], values[local(names[0])]]
        b = [(1 - w) * values[names[1]], w * values[local(names[1])]]
        clients = max(map(len, (*a, *b)))
        return (
            torch.cat([factor.expand(clients, -1, -1) for factor in a], dim=1),
            torch.cat([factor.expand(clients, -1, -1) for factor in b], dim=2),
        )

    @classmethod
    def conflict(cls, options: Any, config: Any) -> str | None:
        if problem := needs_mean(options, config, "hands the shared adapter on"):
            return problem
        if config.personalization.parts != [f"*{_LOCAL}"]:
            return f"method.aggregation dual keeps an adapter on each client: give personalization.parts ['*{_LOCAL}']"
        if config.personalization.finetune_steps:
            return "method.aggregation dual has trained each client's adapter: take personalization.finetune_steps out"
        if config.privacy.name == "example":
            return (
                "method.aggregation dual goes through the examples twice in a round, and privacy.name example counts "
                "them once: use average"
            )
        return None

    def imported(self, factors: Factors, values: Tensors) -> Tensors:
        """The adapter is the shared one; the clients' begin afresh."""
        return {**self.initial(), **values}

    def exported(self, values: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """The shared adapter, or a LoRA of twice its rank for a client that has one of its own."""
        shared = {name: values[name] for name in self.factors.layout.shapes}
        if not any(values[local(name_b(path))].any() for path in self.factors.widths):
            return super().exported(shared)
        one = {name: value.unsqueeze(0) for name, value in values.items()}
        tensors: dict[str, Tensor] = {}
        for path in self.factors.widths:
            a, b = self.term(path, one, one)
            tensors |= {name_a(path): a[0], name_b(path): b[0]}
        return tensors, shape_of({path: 2 * rank for path, rank in self.factors.ranks.items()}, self.factors.scales)


class OfClient(Part):
    """The client's adapter is trained beside the shared one."""

    def __init__(self, dual: Dual, names: Sequence[str]) -> None:
        super().__init__(dual, names)
        self._dual = dual

    def term(self, path: str, trained: PerClient, received: PerClient) -> tuple[Tensor, Tensor]:
        names = name_a(path), name_b(path)
        values = {name: received[name] for name in names} | {local(name): trained[local(name)] for name in names}
        return self._dual.both(path, values, values[names[0]].new_full((1,), self.options.local_weight))
