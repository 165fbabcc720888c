"""`aggregation: flex`: the mean of the products is taken apart again, for every client in factors of its own rank.

FlexLoRA (Bai et al. 2024, arXiv 2402.11505). Client i returns D_i = s B_i A_i. The server takes the singular values of
their mean D = U S V^T, and a client of rank r begins with the first r of them: A = V_r^T and s B = U_r S_r, the best
approximation of rank r. The model that is evaluated and exported is that of the largest rank, to which D is cut.
A client need not send D_i, which follows from A_i and B_i, nor get more than its own factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fedhpc.lazy import Tensor
from fedhpc.methods.base import PerClient, Tensors
from fedhpc.methods.lora.average import needs_last_state, needs_mean, shape_of
from fedhpc.methods.lora.exact import Summed
from fedhpc.methods.lora.factors import Factors, leading_of_sum, name_a, name_b, name_sum


class Flex(Summed):
    """A and B of the client's rank are trained; D goes up, and its factors down."""

    takes_ranks = True

    def start(self, received: PerClient, round_: int, clients: Sequence[int]) -> PerClient:
        largest = {name: received[name] for name in self.trainable.shapes}
        if not self.options.ranks or not clients:  # an evaluation is of no client
            return largest
        cut = {name: value.expand(len(clients), -1, -1).clone() for name, value in largest.items()}
        for path in self.factors.widths:
            for row, client in enumerate(clients):
                # Rows of zeros stay zeros, since B has zeros against them and the other way round.
                rank = self.rank(client, path)
                cut[name_a(path)][row, rank:] = 0
                cut[name_b(path)][row, :, rank:] = 0
        return cut

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        values: dict[str, Tensor] = {}
        for path in self.factors.widths:
            product = self.factors.product(path, trained)
            for name in (name_a(path), name_b(path)):
                values[name] = received[name].expand(len(product), -1, -1)
            values[name_sum(path)] = product
        return values

    def numbers_received(self, client: int) -> int:
        return self.numbers_sent(client, 1)

    def on_server(self, values: Tensors) -> Tensors:
        made: dict[str, Tensor] = dict(values)
        for path, rank in self.factors.ranks.items():
            d = values[name_sum(path)]
            if d.any():  # else nothing was learnt, and A stays as it was drawn
                u, s, vt = leading_of_sum(d, rank)
                b = u * (s / self.factors.scales[path])
                made |= {name_a(path): vt.to(d.dtype), name_b(path): b.to(d.dtype)}
                made[name_sum(path)] = self.factors.product(path, made)
        return made

    @classmethod
    def conflict(cls, options: Any, config: Any) -> str | None:
        return needs_mean(options, config) or needs_last_state(options, config)

    def imported(self, factors: Factors, values: Tensors) -> Tensors:
        """The adapter's products are D, of which the factors are made."""
        return self.on_server(super().imported(factors, values))

    def exported(self, values: Tensors) -> tuple[Tensors, dict[str, Any]]:
        tensors = {name: values[name] for name in self.trainable.shapes}
        return tensors, shape_of(self.factors.ranks, self.factors.scales)
