"""`aggregation: average`: A and B are averaged apart from each other.

As in FedIT (Zhang et al. 2023, arXiv 2305.05644). The product of the means is not the mean of the products.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from fedhpc.lazy import Tensor, torch
from fedhpc.methods.base import PerClient, Tensors
from fedhpc.methods.lora.factors import Factors, name_a, name_b
from fedhpc.updates.layout import Layout

if TYPE_CHECKING:
    from fedhpc.models.base import Base


class Average:
    """A and B are trained and exchanged; the other rules derive from this one and say where they differ.

    Its members mean what those of `Method` mean.
    """

    def __init__(self, factors: Factors, options: Any, base: Base) -> None:
        self.factors, self.options, self.base = factors, options, base

    @property
    def trainable(self) -> Layout:
        """Names and shapes of what a client's optimizer trains."""
        return self.factors.layout

    @property
    def payload(self) -> Layout:
        """Names and shapes of what server and clients exchange."""
        return self.trainable

    def in_round(self, round_: int) -> Sequence[Average]:
        """The rules by which a client trains in a round, one after the other."""
        return [self]

    def initial(self) -> Tensors:
        """The payload before the first round."""
        return {name: self.factors.first[name] for name in self.payload.shapes}

    def start(self, received: PerClient, round_: int, clients: Sequence[int]) -> PerClient:
        """The factors with which local training starts."""
        return {name: received[name] for name in self.trainable.shapes}

    def finish(self, trained: PerClient, received: PerClient) -> PerClient:
        """The payload after local training."""
        return trained

    def on_server(self, values: Tensors) -> Tensors:
        """What the server makes of the payload after its own step."""
        return values

    def numbers_sent(self, client: int, round_: int) -> int:
        """How many numbers a client has to send back: its own factors, as far as it has trained them."""
        return sum(rule.trainable.size for rule in self.in_round(round_))

    def numbers_received(self, client: int) -> int:
        """How many numbers of the payload a client needs to begin a round."""
        return self.payload.size

    def term(self, path: str, trained: PerClient, received: PerClient) -> tuple[Tensor, Tensor]:
        """A (1 or K, r, in) and B (1 or K, out, r) of a layer."""
        return trained[name_a(path)], trained[name_b(path)]

    def gained(self, path: str, received: PerClient) -> Tensor | None:
        """What a layer's weight has gained beside the trained term: (1 or K, out, in), or None."""
        return None

    def lost(self, path: str) -> tuple[Tensor, Tensor] | None:
        """A (1, r, in) and B (1, out, r) whose product a layer's weight is without, or None."""
        return self._lost[path] if self._lost else None

    @cached_property
    def _lost(self) -> dict[str, tuple[Tensor, Tensor]]:
        if not self.factors.taken:
            return {}
        first = {
            name: tensor.to(self.base.device, self.base.payload_dtype) for name, tensor in self.factors.first.items()
        }
        return {path: (first[name_a(path)][None], first[name_b(path)][None]) for path in self.factors.widths}

    @classmethod
    def conflict(cls, options: Any, config: Any) -> str | None:
        """Why the rule cannot go with the configuration, None where it can."""
        return None

    #: Whether clients may have ranks of their own.
    takes_ranks: ClassVar[bool] = False
    #: Whether training can go on from an adapter of another rank or scale.
    takes_any_rank: ClassVar[bool] = False

    @property
    def exported_rank(self) -> int | None:
        """The largest rank of an export; None where it is known at the end of a run alone."""
        return max(self.factors.ranks.values()) * (2 if self.factors.taken else 1)

    def imported(self, factors: Factors, values: Tensors) -> Tensors:
        """The payload that stands for the A and B of an adapter, `values`, whose shapes and scale `factors` has."""
        return values

    def exported(self, values: Tensors) -> tuple[Tensors, dict[str, Any]]:
        """A and B of every layer as PEFT takes them, and the keys of its LoraConfig that say their ranks and scales.

        What a weight has lost is the other half of the factors, B and -B_0 beside A and A_0, on the untouched base.
        """
        o, times = self.options, 1
        if self._lost:
            times = 2
            for path, (a, b) in self._lost.items():
                more = {name_a(path): (a[0], 0), name_b(path): (-b[0], 1)}
                values = {**values, **{n: torch.cat([values[n], t.to(values[n])], dim) for n, (t, dim) in more.items()}}
        # alpha goes with the rank, so that the scale stays what it is.
        of_alpha = times**0.5 if o.use_rslora else times
        shape = {
            "r": times * o.rank,
            "lora_alpha": of_alpha * o.alpha,
            "use_rslora": o.use_rslora,
            "rank_pattern": {pattern: times * rank for pattern, rank in o.rank_pattern.items()},
            "alpha_pattern": {pattern: of_alpha * alpha for pattern, alpha in o.alpha_pattern.items()},
        }
        return values, {key: value for key, value in shape.items() if value}


def shape_of(ranks: Mapping[str, int], scales: Mapping[str, float]) -> dict[str, Any]:
    """The keys of PEFT's LoraConfig that say the rank and the scale of each layer, by path."""
    alphas = {path: scales[path] * rank for path, rank in ranks.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    patterns = {
        "rank_pattern": {path: other for path, other in ranks.items() if other != rank},
        "alpha_pattern": {path: other for path, other in alphas.items() if other != alpha},
    }
    return {"r": rank, "lora_alpha": alpha, **{key: pattern for key, pattern in patterns.items() if pattern}}


def needs_server(options: Any, config: Any, why: str = "begins afresh") -> str | None:
    """Why a rule that goes on from what the server has made cannot go with the configuration's mode."""
    if config.mode == "federated":
        return None
    return (
        f"method.aggregation {options.aggregation} {why} after every aggregation, and mode {config.mode} has none: use "
        "average"
    )


def needs_mean(options: Any, config: Any, why: str = "begins afresh") -> str | None:
    """Why a rule that is about the mean of the clients' terms cannot go with the configuration."""
    if options is not config.method:
        return (
            f"aggregation {options.aggregation} is about the mean of the clients' terms, and method.name "
            f"{config.method.name} makes none: use average"
        )
    return needs_server(options, config, why)


def needs_last_state(options: Any, config: Any) -> str | None:
    """Why a rule by which the server makes both factors anew in every round cannot go with the configuration.

    They are singular vectors, whose mean over rounds has nothing of the mean of the products.
    """
    averages = [key for key in ("ema", "lawa") if getattr(config.evaluation, key) is not None]
    if not averages:
        return None
    return (
        f"method.aggregation {options.aggregation} makes other factors in every round, which evaluation.{averages[0]} "
        "would average: take it out"
    )


def needs_plain_mean(options: Any, config: Any) -> str | None:
    """Why a rule by which clients send one factor, and keep to the other, cannot go with the configuration.

    Whatever adds to more than the factor that is sent, or to what is there from rounds with another one, would move
    the product away from the mean of the clients' products.
    """
    name, server, privacy = options.aggregation, config.server, config.privacy.name
    if problem := needs_mean(options, config, "trains other factors"):
        return problem
    if server.optimizer != "sgd" or server.momentum:
        what = f"optimizer {server.optimizer}" if server.optimizer != "sgd" else "momentum"
        return (
            f"method.aggregation {name} has other factors in every round, which server.{what} would mix: use sgd alone"
        )
    if config.federation.schedule.name != "synchronous":
        return (
            f"method.aggregation {name} has other factors in every round, and federation.schedule "
            f"{config.federation.schedule.name} adds updates of several rounds: use synchronous"
        )
    if privacy == "client":
        return (
            f"method.aggregation {name} keeps one factor as it is, which the noise of privacy.name client would move: "
            "use ffa, or privacy.name example"
        )
    return None
