"""AdamW's moments from round to round: clients begin with the mean of what the clients of the last round ended with.

As in FedAdamW (arXiv 2510.27486), where the second moment is exchanged, whole or as one mean for each block of
parameters. The server keeps corrected moments and the number t of steps that are in them, zeros before the first round.
A moment v with decay b, of a client that takes K_i steps along x_k (the gradient or its square), goes

    start      v_0 = (1 - b^t) v
    step k     v_k = b v_{k-1} + (1 - b) x_k, corrected v_k / (1 - b^(t + k))
    client     sends v_K / (1 - b^(t + K_i)), and t + K_i
    server     v and t become the weighted means of what accepted clients sent, with the weights of FedAvg

So v is always a mean of the x whose weights add up to 1, also where clients take different numbers of steps; where all
take K, t counts the steps as one AdamW would. A moment that is not exchanged begins at zero in every round, with a
count of its own.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from fedhpc.lazy import Tensor, torch
from fedhpc.training.auxiliary import Exchanged
from fedhpc.training.memory import Memory
from fedhpc.training.optimizers.base import ClientOptimizer
from fedhpc.updates.layout import Layout

_STEPS = "steps"


class Moments(Exchanged):
    """The exchange of moments (client.moments)."""

    name = "moments"
    contents = "moments"

    def __init__(
        self, optimizer: ClientOptimizer, which: str, trainable: Layout, blocks: Mapping[str, int], dtype: torch.dtype
    ) -> None:
        """which: client.moments. trainable: T numbers, of each of whose tensors `blocks` says into how many blocks its
        last axis falls.
        """
        self.optimizer = optimizer
        moments = optimizer.moments
        #: The decay of each exchanged moment, by name.
        self.decays = moments if which == "both" else {name: moments[name] for name in list(moments)[-1:]}
        self._trainable, self._blocks = trainable, blocks if which == "second_by_block" else None
        shapes = trainable.shapes if self._blocks is None else {name: (n,) for name, n in blocks.items()}
        of_moments = {f"{moment}.{name}": shape for moment in self.decays for name, shape in shapes.items()}
        super().__init__(Layout({**of_moments, _STEPS: ()}), dtype)

    def weights(self, shares: np.ndarray, population: int) -> np.ndarray:
        return shares / shares.sum()

    def after(self, current: Tensor, total: Tensor) -> Tensor:
        return total

    def steps(self, received: Tensor) -> float:
        """t, the steps that are in the moments of the vector `received` (A,)."""
        return float(self.layout.views(received)[_STEPS])

    def memory(self, received: Tensor, clients: int) -> tuple[ClientOptimizer, Memory]:
        """The optimizer of a round that begins with `received` (A,), and what it remembers at first of K clients."""
        steps, values = self.steps(received), self.layout.views(received)
        zeros = received.new_zeros(self._trainable.size)
        buffers = dict.fromkeys(self.optimizer.buffers, zeros)
        for moment, decay in self.decays.items():
            tensors = {name: values[f"{moment}.{name}"] for name in self._trainable.shapes}
            buffers[moment] = self._expanded(tensors) * (1 - decay**steps)
        count = torch.zeros(clients, dtype=torch.int64)
        of_clients = {name: buffer.expand(clients, -1) for name, buffer in buffers.items()}
        return self.optimizer.going_on(dict.fromkeys(self.decays, steps)), Memory(of_clients, count)

    def sent(self, received: Tensor, memory: Memory) -> Tensor:
        """What K clients send (K, A) that began with `received` (A,) and now remember `memory`."""
        steps = self.steps(received) + memory.count.double()  # (K,)
        tensors = {_STEPS: steps.to(self.dtype)}
        for moment, decay in self.decays.items():
            corrected = memory.buffers[moment] / (1 - decay**steps).to(self.dtype).unsqueeze(1)
            layout, blocks = self._trainable, self._blocks
            sent = layout.views(corrected) if blocks is None else layout.block_means(corrected, blocks)
            tensors |= {f"{moment}.{name}": value for name, value in sent.items()}
        return self.layout.flatten(tensors)

    def _expanded(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """A moment (T,) of what was sent of its tensors, every number of a block being its mean."""
        if self._blocks is None:
            return self._trainable.flatten(tensors)
        return self._trainable.of_blocks(tensors)
