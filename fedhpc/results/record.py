"""What one round did, and what a run ends with: made once on rank 0, read by every observer of the run.

An observer is told of each round in a stated order (fedhpc.federation): the results file first, then the screen, then
trackers. So what is on the screen is on the disk.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

OK, DROPPED, REJECTED, LATE = 0, 1, 2, 3  # the status of a sampled client

Scalar = str | int | float | bool


class Event(NamedTuple):
    """Something that a reader of the results should know: a rejected client, a void round, a resume, a note."""

    kind: str
    message: str


class Sampling(NamedTuple):
    """How many items a metric was measured on, and how well they stand for all that could have been drawn."""

    n: int
    of: int  # items of the whole split
    unit: str  # what an item is: "examples", "prompts" (a distinct one with all its references), "questions"
    low: float = float("nan")  # 95 % interval over the drawing of the items; NaN where it is not known
    high: float = float("nan")
    by: str = ""  # how it was made: "Wilson", "normal", "bootstrap"

    @property
    def items(self) -> str:
        """Like "500 examples", or "256 of 500 examples" where the split has more."""
        return f"{self.n:,} {self.unit}" if self.n == self.of else f"{self.n:,} of {self.of:,} {self.unit}"

    @property
    def known(self) -> bool:
        """Whether there is an interval."""
        return self.low == self.low


@dataclass(frozen=True)
class RunDescription:
    """What is known of a run before its first round."""

    directory: Path
    rounds: int
    metrics: Sequence[str]  # of the validation split, in the order of the configuration
    attributes: Mapping[str, Scalar]  # root attributes of results.h5
    identity: Mapping[str, Any]  # what a resumed run must share: block_size and fingerprints
    partition: Mapping[str, Any]  # the groups of /partition, empty for a virtual population
    columns: Sequence[str] = ()  # columns that only some runs have, like "rounds/staleness"


@dataclass(frozen=True)
class RoundRecord:
    """What one round did. The fields are the columns of /rounds; row 0 is the evaluated initial state."""

    round: int
    train_loss: float = float("nan")  # mean loss of the supervised tokens of local training, nats
    cohort_size: int = 0
    completed: int = 0
    dropped: int = 0
    rejected: int = 0
    tokens: int = 0
    padded_tokens: int = 0
    bytes_down: int = 0
    bytes_up: int = 0
    wire_bytes: int = 0
    update_norm: float = 0.0
    seconds: float = 0.0
    seconds_broadcast: float = 0.0
    seconds_local: float = 0.0
    seconds_reduce: float = 0.0
    seconds_server: float = 0.0
    seconds_eval: float = 0.0
    peak_memory_bytes: int = 0
    metrics: Mapping[str, float] = field(default_factory=dict)  # of the validation split; empty: not evaluated
    sampling: Mapping[str, Sampling] = field(default_factory=dict)  # of these metrics
    samples: Sequence[Mapping[str, Any]] = ()  # of them: prompt, references, text
    more: Mapping[str, float] = field(default_factory=dict)  # columns that only some runs have
    clients: Mapping[str, np.ndarray] = field(default_factory=dict)  # columns of /clients, a row per sampled client
    experts: Mapping[str, np.ndarray] = field(default_factory=dict)  # columns of /experts, a row per layer and expert
    events: Sequence[Event] = ()

    def row(self) -> dict[str, float | int]:
        """The row of /rounds; eval_<metric> only where the round was evaluated."""
        numbers = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in _NOT_IN_ROW}
        return {**numbers, **self.more, **{f"eval_{name}": value for name, value in self.metrics.items()}}

    @classmethod
    def of_row(cls, row: Mapping[str, float | int], clients: Mapping[str, np.ndarray]) -> RoundRecord:
        """The record of a round that was recorded before: what its rows of /rounds and /clients say, no more."""
        known = {f.name for f in fields(cls)} - _NOT_IN_ROW
        metrics = {name.removeprefix("eval_"): value for name, value in row.items() if name.startswith("eval_")}
        return cls(
            **{name: value for name, value in row.items() if name in known},  # type: ignore[arg-type]
            metrics={} if all(math.isnan(value) for value in metrics.values()) else metrics,
            more={name: value for name, value in row.items() if name not in known and not name.startswith("eval_")},
            clients=clients,
        )


_NOT_IN_ROW = {"metrics", "sampling", "samples", "more", "clients", "experts", "events"}


@dataclass(frozen=True)
class FinalResults:
    """What rank 0 knows at the end of a run."""

    test: Mapping[str, float]
    base: Mapping[str, float]  # the same metrics of the untouched base
    tensors: Mapping[str, np.ndarray]  # /final
    samples: Sequence[Mapping[str, Any]] = ()
    test_sampling: Mapping[str, Sampling] = field(default_factory=dict)
    base_sampling: Mapping[str, Sampling] = field(default_factory=dict)
    client_eval: Mapping[str, np.ndarray] | None = None
    client_summary: Mapping[str, float] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, np.ndarray]] = field(default_factory=dict)  # /tables/<name>/<column>
    lines: Sequence[str] = ()  # to print
    attributes: Mapping[str, Scalar] = field(default_factory=dict)  # more root attributes of results.h5


class Observer(Protocol):
    """Follows a run on rank 0."""

    def message(self, text: str) -> None:
        """Take one line for whoever watches."""

    def round(self, record: RoundRecord) -> None:
        """Take the record of a round, the initial state (round 0) included."""

    def pause(self, round_: int) -> None:
        """Take notice that the run stops after a round, to go on later in another process."""

    def finish(self, results: FinalResults) -> None:
        """Take the results of the whole run, which is complete by now."""

    def close(self) -> None:
        """Let go of what is open; also after a failure. May be called twice."""
