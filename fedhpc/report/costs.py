"""What a run cost until it reached a loss, and how long its bytes would take on slower links.

The projection counts the time on the wire alone: one link at the server, through which the payloads of a cohort pass
one after the other, without latency and without overlap with training.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

LINKS = {"10 GbE": 10e9, "1 GbE": 1e9, "100 Mbit/s": 100e6}  # bits per second


class Cost(NamedTuple):
    """What a run cost from its start to the end of one round."""

    round: int
    tokens: int  # supervised, in local training
    num_bytes: int  # protocol bytes, down and up
    seconds: float  # of the rounds, evaluation apart
    virtual_seconds: float  # NaN where clients take no virtual time


def cost_to_reach(rounds: Mapping[str, np.ndarray[Any, Any]], target: float) -> Cost | None:
    """The cost up to the first evaluated round whose validation loss is at most `target`; None if there is none.

    rounds: the columns of /rounds.
    """
    reached = np.flatnonzero(rounds["eval_loss"] <= target)  # False where the loss is NaN: not evaluated
    if not len(reached):
        return None
    end = int(reached[0]) + 1
    totals = {
        name: rounds[name][:end].sum() for name in ("tokens", "bytes_down", "bytes_up", "seconds", "seconds_eval")
    }
    return Cost(
        round=int(rounds["round"][end - 1]),
        tokens=int(totals["tokens"]),
        num_bytes=int(totals["bytes_down"] + totals["bytes_up"]),
        seconds=float(totals["seconds"] - totals["seconds_eval"]),
        virtual_seconds=float(rounds["virtual_seconds"][:end].sum()) if "virtual_seconds" in rounds else math.nan,
    )


def wire_seconds(num_bytes: float, bits_per_second: float) -> float:
    """How many seconds a number of bytes takes on a link: 8 bits a byte, divided by the rate."""
    return 8 * num_bytes / bits_per_second
