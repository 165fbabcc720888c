"""Formats the numbers, tables and files of a report."""

from __future__ import annotations

import csv
import io
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from fedhpc import registry

TITLES = {
    "loss": "loss",
    "perplexity": "perplexity",
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "bleu": "BLEU",
    "chrf": "chrF",
    "rouge_l": "ROUGE-L",
    "exact_match": "exact match",
    "f1": "F1",
    "contains": "contains the answer",
    "recall": "recall",
    "mrr": "MRR",
}
# 0.975 quantiles of Student's t with 1, 2, ... degrees of freedom.
T_975 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
)
NONE = "–"
SEEDS = "half the 95 % interval of the mean over seeds (Student's t)"


class Number(str):
    """A number as it is shown, with its full precision in `value`: what a table is sorted by."""

    value: float

    def __new__(cls, text: str, value: float) -> Number:
        number = super().__new__(cls, text)
        number.value = value
        return number


@dataclass(frozen=True)
class Grid:
    """A table of strings, for terminal, Markdown and HTML. The first column is text, the others are numbers."""

    title: str
    header: list[str]
    rows: list[list[str]]
    text: bool = False  # all columns are text
    long: bool = False  # too long for a terminal

    def rich(self) -> Table:
        """The table for a terminal."""
        table = Table(title=escape(self.title), title_justify="left", title_style="bold")
        table.box, table.padding = SIMPLE_HEAD, (0, 1, 0, 0)  # narrow: comparisons have many columns
        for i, name in enumerate(self.header):
            table.add_column(escape(name), justify="left" if self.text or i == 0 else "right", overflow="fold")
        for row in self.rows:
            table.add_row(*map(escape, row))
        return table

    def markdown(self) -> str:
        """The table as a section of Markdown."""
        rule = [":--" if self.text or i == 0 else "--:" for i in range(len(self.header))]
        lines = [self.header, rule, *([_cell(value) for value in row] for row in self.rows)]
        return f"## {self.title}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


def console() -> Console:
    """A console on standard output, 160 columns wide where that is not a terminal."""
    return Console(highlight=False, width=None if sys.stdout.isatty() else 160)


def mean_and_half_width(values: np.ndarray) -> tuple[float, float]:
    """Mean, and half the width of its 95 % confidence interval (NaN for a single value, and beside infinite ones)."""
    n, mean = len(values), float(np.mean(values)) if len(values) else math.nan
    if n < 2 or not math.isfinite(mean):
        return mean, math.nan
    return mean, float(t_975(n - 1) * np.std(values, ddof=1) / math.sqrt(n))


def t_975(degrees: int) -> float:
    """The 0.975 quantile of Student's t distribution with `degrees` degrees of freedom.

    Beyond T_975 it is Cornish and Fisher's expansion around the normal quantile.
    """
    if degrees <= len(T_975):
        return T_975[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def as_interval(values: np.ndarray, digits: int | None = None) -> Number:
    """The mean ± half its confidence interval, like "1.310 ± 0.025"; a single value without an interval."""
    mean, half = mean_and_half_width(values)
    if math.isnan(half):
        return as_number(mean, digits)
    return Number(f"{as_number(mean, digits)} ± {half:,.{_digits(mean) if digits is None else digits}f}", mean)


def as_range(low: float, high: float) -> str:
    """The ends of an interval, like "1.285 to 1.335"; "–" where it is not known."""
    return NONE if math.isnan(low) else f"{as_number(low)} to {as_number(high)}"


def as_number(value: float | None, digits: int | None = None) -> Number:
    """A number with about four significant digits, or with `digits` decimals; "–" for None and NaN."""
    if value is None or math.isnan(value):
        return Number(NONE, math.nan)
    return Number(f"{value:,.{_digits(value) if digits is None else digits}f}", value)


def _digits(value: float) -> int:
    return 3 if abs(value) < 10 else 2 if abs(value) < 1000 else 0


def as_count(value: float) -> Number:
    """A whole number with separators, like "24,576"; "–" for NaN."""
    return Number(NONE if math.isnan(value) else f"{round(value):,}", value)


def unit_of(value: float) -> tuple[float, str]:
    """The largest binary unit that a number of bytes fills, as (bytes in the unit, its name)."""
    for power, name in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return 1024.0**power, name
    return 1.0, "B"


def as_bytes(value: float) -> Number:
    """A number of bytes in a fitting unit, like "182.4 KiB"; "–" for NaN."""
    if math.isnan(value):
        return Number(NONE, value)
    unit, name = unit_of(value)
    return Number(f"{value / unit:.1f} {name}" if unit > 1 else f"{value:.0f} B", value)


def title_of(metric: str) -> str:
    """The name of a metric as readers know it, like "BLEU" for bleu."""
    return TITLES.get(metric, metric.replace("_", " "))


def limits_of(metric: str) -> tuple[float, float]:
    """What a metric cannot be below and above; infinite for one that is not known here."""
    if metric not in registry.names("metrics"):
        return -math.inf, math.inf
    cls = registry.choice("metrics", metric)
    return cls.lowest, cls.highest


def direction_of(metric: str) -> str:
    """Which way is better, in a few words; nothing for a metric that is not known here."""
    if metric not in registry.names("metrics"):
        return ""
    return "higher is better" if registry.choice("metrics", metric).higher_is_better else "lower is better"


def in_order(*metrics: Mapping[str, Any]) -> list[str]:
    """The metric names of all mappings: first the known ones in the order of TITLES, then the others by name."""
    names = {name for m in metrics for name in m}
    return [name for name in TITLES if name in names] + sorted(names - set(TITLES))


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


def as_csv(columns: Mapping[str, Any]) -> str:
    """Columns of equal length as CSV text."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows(zip(*columns.values(), strict=True))
    return file.getvalue()


def write_text(path: Path, text: str) -> Path:
    """Write a text file and return its path."""
    path.write_text(text, encoding="utf-8")
    return path
