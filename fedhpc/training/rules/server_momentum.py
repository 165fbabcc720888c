"""FedCM: every local step is in part the direction in which the last round went (Xu et al. 2021, arXiv 2106.10874).

Algorithm 2 with 1 - alpha = beta (client.server_momentum), where the optimizer steps along d (SGD: the gradient):

    local step     y <- y - lr ((1 - beta) d + beta Delta_t)
    server         Delta_{t+1} = g / (sum_i p_i K_i lr)

g is the pseudo-gradient of the round and p_i the client's weight; K_i lr is the sum of the rates that were used.
Delta_0 is zero. With AdamW d is its own direction, as in FedLADA (Sun et al. 2023, arXiv 2308.00522), so both parts of
a step are of one size. A client is sent twice the payload.
"""

from __future__ import annotations

from dataclasses import dataclass

from fedhpc.lazy import Tensor
from fedhpc.training.auxiliary import Auxiliary


@dataclass(frozen=True)
class Direction:
    """What a block's local steps take over from the server."""

    values: Tensor  # (T,): Delta_t
    share: float  # beta

    def on(self, like: Tensor) -> Direction:
        """The same on the device of `like`."""
        return Direction(self.values.to(like.device), self.share)

    def move(self, parameters: Tensor, rates: Tensor) -> None:
        """Go the server's part of a step, in place. parameters (k, T), rates (k, 1)."""
        parameters.sub_(self.share * rates * self.values)


class ServerMomentum(Auxiliary):
    """The direction Delta_t (S,), which goes down and is made of the updates."""

    name = "server_momentum"
    contents = "numbers of the server's direction"

    def after(self, gradient: Tensor, distance: float) -> Tensor:
        """Delta_{t+1}, float64 (S,). gradient: float64 (S,), the pseudo-gradient; distance: the mean sum of rates.

        Zeros where all rates are 0, so that nobody has moved.
        """
        return gradient / distance if distance else gradient.new_zeros(len(gradient))
