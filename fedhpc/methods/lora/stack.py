"""`aggregation: stack`: the sum D of all products is exchanged alone, and clients may have ranks of their own.

Everybody begins every round with a fresh A and B = 0, and returns D + s B_i A_i. The mean is the product of the stacked
A_i and w_i B_i that FLoRA adds to the frozen weight (Wang et al. 2024, arXiv 2409.05976).

The layer computes (W + D) x + s B_i A_i x, and W, which may be quantised, is not touched. A client need not send its
sum, which follows from A_i and B_i.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedhpc.lazy import Tensor
from fedhpc.methods.base import PerClient, Tensors
from fedhpc.methods.lora.average import needs_server
from fedhpc.methods.lora.exact import Exact
from fedhpc.methods.lora.factors import name_a, name_sum
from fedhpc.updates.layout import Layout


class Stack(Exact):
    """Fresh factors are trained in every round; D is exchanged."""

    @property
    def payload(self) -> Layout:
        return self.sums

    takes_ranks = True

    @classmethod
    def conflict(cls, options: Any, config: Any) -> str | None:
        return needs_server(options, config)

    def initial(self) -> Tensors:
        return self.zeros()

    def start(self, received: PerClient, round_: int, clients: Sequence[int]) -> PerClient:
        like = next(iter(received.values()))
        fresh = {n: like.new_zeros(len(clients) or len(like), *shape) for n, shape in self.trainable.shapes.items()}
        for row, client in enumerate(clients):
            # Rows of zeros stay zeros, since B has zeros against them and the other way round.
            drawn = self.factors.drawn(round_, client)
            for path in self.factors.widths:
                rank, name = self.rank(client, path), name_a(path)
                fresh[name][row, :rank] = drawn[name][:rank].to(like)
        return fresh

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        values = super().finish(trained, received)
        return {name: values[name] for name in self.sums.shapes}

    def gained(self, path: str, received: PerClient) -> Tensor:
        return received[name_sum(path)]
