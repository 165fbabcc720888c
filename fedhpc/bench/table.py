"""The rows that the benchmark prints: figures, their targets, and the arithmetic of repeats."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """One figure. `target` is the least that it should be, with `most` the most; None where there is no goal."""

    what: str  # is measured, like "W1 small: block of 8 over one after another"
    measured: float  # NaN where it could not be measured: `note` says why
    target: float | None = None
    most: bool = False
    unit: str = ""  # with "%" the figures here are shares of 1
    note: str = ""

    @property
    def verdict(self) -> str:
        """ "met" or "missed"; "" where there is no target or no measurement."""
        if self.target is None or math.isnan(self.measured):
            return ""
        return "met" if (self.measured <= self.target if self.most else self.measured >= self.target) else "missed"

    def json(self) -> dict[str, Any]:
        """The row as an object for JSON, with figures in its unit and null in place of NaN."""
        times = 100 if self.unit == "%" else 1
        measured = None if math.isnan(self.measured) else times * self.measured
        target = None if self.target is None else times * self.target
        return {**asdict(self), "measured": measured, "target": target, "verdict": self.verdict}


#: A part of the benchmark: measures when it is called, and may give its rows one by one.
Part = Callable[[], Iterable[Row]]


def skipped(what: str, why: str) -> Row:
    """The row of a figure that cannot be measured on this machine."""
    return Row(what, math.nan, note=why)


def interleaved(
    runs: Mapping[str, Callable[[], None]], repeats: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    """Call the runs in turn, again and again: the seconds of each in every repeat, by `clock`; the first warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(repeats + 1):
        for name, call in runs.items():
            began = clock()
            call()
            if repeat:
                seconds[name].append(clock() - began)
    return seconds


def ratio(above: Sequence[float], below: Sequence[float]) -> float:
    """The median of the repeats' ratios. What disturbs a repeat usually disturbs both of its sides."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


HEADING = "|  | measured | target |  |  |\n| --- | --- | --- | --- | --- |"


def markdown(row: Row) -> str:
    """The row as a line of the Markdown table that begins with `HEADING`."""
    bound = "" if row.target is None else f"{'≤' if row.most else '≥'} {_shown(row.target, row.unit)}"
    measured = "-" if math.isnan(row.measured) else _shown(row.measured, row.unit)
    return "| " + " | ".join([row.what, measured, bound, row.verdict, row.note]) + " |"


def _shown(value: float, unit: str) -> str:
    if unit == "%":
        return f"{100 * value:.3g} %"
    digits = f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return f"{digits} {unit}".rstrip()
