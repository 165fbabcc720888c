"""The interface of device models, which say how long a client takes for its part in a round, in virtual seconds.

A client waits in the queue of its cluster, receives the server's state, trains, and sends its update:

    queue delay + bytes down / down-link + tokens / speed + bytes up / up-link

All of it follows from the seed, the client and the version of the server's state from which it starts, so every rank
knows when everybody arrives, and a resumed run knows it again.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import ClassVar, Literal, NamedTuple

from pydantic import Field

from fedhpc.config import Config
from fedhpc.data.population import Population
from fedhpc.registry import Open, Section
from fedhpc.rng import generator


class Device(NamedTuple):
    """What a client computes and communicates with."""

    tokens_per_s: float  # of local training: all tokens of its rows, not the supervised ones alone
    down_bytes_per_s: float
    up_bytes_per_s: float
    availability: float  # probability that it can be asked


class Work(NamedTuple):
    """What a client does in a round, as far as its device is concerned."""

    tokens: float
    bytes_down: int
    bytes_up: int


class Timed(Section):
    """The keys of every device model that takes time."""

    queue: Literal["none", "exponential", "lognormal"] = Field(
        "none", description="distribution of the time that a client's job waits before it starts, as on a cluster"
    )
    queue_s: float = Field(60.0, gt=0, description="mean of that waiting time, virtual seconds")
    queue_sigma: float = Field(1.0, ge=0, description="queue lognormal: standard deviation of the logarithm")

    def conflict(self, config: Config) -> str | None:
        if config.mode != "federated":
            return (
                f"devices make clients late in rounds of a federation, and mode {config.mode} has none: give "
                "devices.name none"
            )
        for key, queues in (("queue_s", ("exponential", "lognormal")), ("queue_sigma", ("lognormal",))):
            if getattr(self, key) != type(self).model_fields[key].default and self.queue not in queues:
                return f"devices.queue {self.queue} has no {key}: choose {' or '.join(queues)}, or take it out"
        return None


class Devices(ABC):
    """A device model says what each client computes and communicates with."""

    Options: ClassVar[type[Section]] = Timed

    #: Whether clients take time at all.
    takes_time: ClassVar[bool] = True

    #: A hash of what it has read from files, which a resumed run must find again; empty where it reads none.
    fingerprint: str = ""

    def __init__(self, options: Open, seed: int, population: Population) -> None:
        """options: the section `devices` of the configuration. UserError where it does not fit the population."""
        self.options, self.seed, self.population = options, seed, population

    @abstractmethod
    def of(self, client: int) -> Device:
        """The device of a client, the same in all rounds."""

    @property
    @abstractmethod
    def lowest_availability(self) -> float:
        """The least availability of all devices: 1 where every client can always be asked."""

    def is_available(self, client: int, *keys: int) -> bool:
        """Whether a client can be asked at the moment that `keys` name."""
        availability = self.of(client).availability
        return availability >= 1 or generator(self.seed, "available", client, *keys).random() < availability

    def seconds(self, client: int, version: int, work: Work) -> float:
        """Virtual seconds from the moment in which a client is asked to that in which its update is there.

        version: of the server's state from which it starts; a client starts from a version once at most.
        """
        device = self.of(client)
        transfer = work.bytes_down / device.down_bytes_per_s + work.bytes_up / device.up_bytes_per_s
        return self._queue_delay(client, version) + transfer + work.tokens / device.tokens_per_s

    def _queue_delay(self, client: int, version: int) -> float:
        """How long the client's job waits for its start (FedQueue, arXiv 2605.02125, has it drawn anew every time)."""
        options = self.options
        if not self.takes_time or options.queue == "none":
            return 0.0
        draws = generator(self.seed, "queue", client, version)
        if options.queue == "exponential":
            return float(draws.exponential(options.queue_s))
        sigma = options.queue_sigma
        return float(draws.lognormal(math.log(options.queue_s) - sigma**2 / 2, sigma))
