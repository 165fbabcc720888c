"""Rows of the bench: what was asked for, what was measured."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure. target: at least (or, with `most`, at most) this; None where it is told for its own sake."""

    what: str
    measured: float  # NaN: not measured here, and `note` says why
    target: float | None = None
    most: bool = False
    unit: str = ""
    note: str = ""

    @property
    def verdict(self) -> str:
        """met, missed, or nothing where there is nothing to meet."""
        if self.target is None or math.isnan(self.measured):
            return ""
        return "met" if (self.measured <= self.target if self.most else self.measured >= self.target) else "missed"

    def json(self) -> dict[str, Any]:
        """As an object of JSON, where NaN is null."""
        measured = None if math.isnan(self.measured) else self.measured
        return {**asdict(self), "measured": measured, "verdict": self.verdict}


#: A measurement, when it is called; rows may come one by one.
Part = Callable[[], Iterable[Row]]


def skipped(what: str, why: str) -> Row:
    """A figure that cannot be had here."""
    return Row(what, math.nan, note=why)


def interleaved(
    runs: Mapping[str, Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Seconds of each run in each repeat, by `clock`; one round of warm-up goes before."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, call in runs.items():
            began = clock()
            call()
            if repeat:
                seconds[name].append(clock() - began)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the ratios of the repeats: what disturbs a repeat disturbs both sides of it."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


HEADING = "|  | measured | target |  |  |\n| --- | --- | --- | --- | --- |"


def markdown(row: Row) -> str:
    """A line of the table under `HEADING`."""
    bound = "" if row.target is None else f"{'≤' if row.most else '≥'} {_shown(row.target, row.unit)}"
    measured = "-" if math.isnan(row.measured) else _shown(row.measured, row.unit)
    return "| " + " | ".join([row.what, measured, bound, row.verdict, row.note]) + " |"


def _shown(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.3g} %"
    digits = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{digits} {unit}".rstrip()
