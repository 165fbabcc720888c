"""How clients train in one round: the numbers and rules that hold for all clients of a block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedhpc import registry
from fedhpc.training.optimizers.base import ClientOptimizer

if TYPE_CHECKING:
    from fedhpc.config import Config


@dataclass(frozen=True)
class LocalTraining:
    """All that `train_block` needs to know beside the model, the clients and their data.

    The first part is the section `client` of the configuration, and means the same.
    """

    optimizer: ClientOptimizer
    lr: float
    batch_size: int
    epochs: int | None = None  # passes over a client's data in the round; this or `steps` is given
    steps: int | None = None  # local steps in the round
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup: float = 0.0
    clip_norm: float | None = None
    proximal: float = 0.0

    seed: int = 0  # of the batches and of all random draws
    round: int = 1
    rounds: int = 1  # of the whole run, for the schedule of the learning rate
    precision: str = "float32"  # autocast of the forward passes

    @classmethod
    def of(cls, config: Config, round_: int, rounds: int) -> LocalTraining:
        """What a configuration asks of its clients in round `round_` (from 1) of `rounds`."""
        client = config.client
        return cls(
            optimizer=registry.choice("client_optimizers", client.optimizer)(client),
            lr=client.lr,
            batch_size=client.batch_size,
            epochs=client.epochs,
            steps=client.steps,
            schedule=client.schedule,
            warmup=client.warmup,
            clip_norm=client.clip_norm,
            proximal=client.proximal,
            seed=config.run.seed,
            round=round_,
            rounds=rounds,
            precision=config.runtime.precision,
        )
