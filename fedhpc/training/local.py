"""How clients train in one round: the numbers and rules that hold for all clients of a block."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from fedhpc import registry
from fedhpc.lazy import Tensor
from fedhpc.training.example_privacy import ExamplePrivacy
from fedhpc.training.optimizers.base import ClientOptimizer

if TYPE_CHECKING:
    from fedhpc.config import Config
    from fedhpc.training.rules.server_momentum import Direction


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
    gradient_accumulation_steps: int = 1
    micro_batch: int | None = None  # None: batch_size
    packing: bool = False  # whether examples may share rows
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    schedule_per: Literal["step", "round"] = "step"
    lr_min: float = 0.0
    warmup: float = 0.0
    layer_lr_decay: float = 1.0
    clip_norm: float | None = None
    proximal: float = 0.0
    proximal_metric: Literal["euclidean", "relative"] = "euclidean"
    privacy: ExamplePrivacy | None = None  # of single examples
    direction: Direction | None = None  # of the server, with client.server_momentum

    seed: int = 0  # of the batches and of all random draws
    round: int = 1
    rounds: int = 1  # of the whole run, for the schedule of the learning rate
    precision: str = "float32"  # autocast of the forward passes
    #: Adds up, in place, what several ranks have that train a client together; None: one trains it alone.
    total: Callable[[Tensor], Tensor] | None = None

    @property
    def examples_at_once(self) -> int:
        """How many examples of a client are in one forward at most."""
        return self.micro_batch or self.batch_size

    @classmethod
    def of(cls, config: Config, round_: int, rounds: int, fit: int | None = None) -> LocalTraining:
        """What a configuration asks of its clients in round `round_` (from 1) of `rounds`.

        fit: for how many examples of a client in one forward there is memory; None: for all that are asked for.
        """
        client = config.client
        return cls(
            optimizer=registry.choice("client_optimizers", client.optimizer)(client),
            lr=client.lr,
            batch_size=client.batch_size,
            epochs=client.epochs,
            steps=client.steps,
            gradient_accumulation_steps=client.gradient_accumulation_steps,
            micro_batch=client.micro_batch if fit is None else fit,
            schedule=client.schedule,
            schedule_per=client.schedule_per,
            lr_min=client.lr_min,
            warmup=client.warmup,
            layer_lr_decay=client.layer_lr_decay,
            clip_norm=client.clip_norm,
            proximal=client.proximal,
            proximal_metric=client.proximal_metric,
            seed=config.run.seed,
            round=round_,
            rounds=rounds,
            precision=config.runtime.precision,
        )
