"""What a run spent until it was good enough, and how long its bytes would take on other links.

The projection counts the time on the wire alone: one link at the server, through which the payloads of a cohort pass
one after the other, without latency and without overlap with training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

LINKS = {"10 GbE": 10e9, "1 GbE": 1e9, "100 Mbit/s": 100e6}  # bits per second


class Spent(NamedTuple):
    """From the start to the end of a round."""

    round: int
    tokens: int  # supervised, in local training
    num_bytes: int  # protocol bytes, down and up
    seconds: float  # of the rounds, evaluation apart


def until(rounds: Mapping[str, np.ndarray[Any, Any]], target: float) -> Spent | None:
    """What it took to the first evaluated round whose validation loss is at most `target`; None if there is none.

    rounds: the columns of /rounds.
    """
    reached = np.flatnonzero(rounds["eval_loss"] <= target)  # NaN, not evaluated, is not
    if not len(reached):
        return None
    end = int(reached[0]) + 1
    spent = {name: rounds[name][:end].sum() for name in ("tokens", "bytes_down", "bytes_up", "seconds", "seconds_eval")}
    return Spent(
        round=int(rounds["round"][end - 1]),
        tokens=int(spent["tokens"]),
        num_bytes=int(spent["bytes_down"] + spent["bytes_up"]),
        seconds=float(spent["seconds"] - spent["seconds_eval"]),
    )


def wire_seconds(num_bytes: float, bits_per_second: float) -> float:
    """Seconds that so many bytes take on a link: 8 bytes / rate."""
    return 8 * num_bytes / bits_per_second
