"""What rank 0 shows of a running federation: a live display on a terminal, one line a round in a log file.

Everything goes to standard output; errors are the business of main.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Protocol

from rich import progress
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from fedhpc.results.record import FinalResults, RoundRecord, Sampling


class UnderWay(Protocol):
    """How far the round has come that has begun (fedhpc.ranks.round_progress)."""

    @property
    def round(self) -> int: ...
    @property
    def clients(self) -> int: ...  # that train in it
    @property
    def done(self) -> float: ...  # of these
    @property
    def activity(self) -> str: ...  # what goes on instead, like "evaluation"; empty while clients train


class Progress:
    """The display of a run of `rounds` rounds, `start_round` of which were done before (resume).

    under_way: what is shown on a terminal of the round that has begun; read whenever the display is drawn. name: of one
    of several runs in this process, in front of its lines; these are a line a round then, on a terminal too.
    """

    def __init__(self, rounds: int, start_round: int = 0, under_way: UnderWay | None = None, name: str = "") -> None:
        self._rounds = rounds
        self._front = f"{name}: " if name else ""
        self._under_way = under_way
        self._above: list[Text] = []  # the line of the last round, where the next one takes its row
        self._start = start_round
        self._began = time.monotonic()
        self._live: Live | None = None
        console = Console(file=sys.stdout, highlight=False)
        if sys.stdout.isatty() and not console.is_dumb_terminal and not name:
            self._bar = progress.Progress(
                progress.TextColumn("{task.description}"),
                progress.BarColumn(bar_width=None),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                progress.TextColumn("{task.fields[left]}"),
                console=console,
                expand=True,
            )
            self._task = self._bar.add_task("rounds", total=rounds, completed=start_round, left="")
            self._inner = self._bar.add_task("", total=0, left="", visible=False)
            self._live = Live(get_renderable=self._drawn, console=console, redirect_stderr=False)
            self._live.start()
            # A watchdog may end the process without a chance to bring a hidden cursor back.
            console.show_cursor(True)

    def message(self, text: str) -> None:
        """One line, above the live display on a terminal."""
        if self._live is None:
            print(f"{self._front}{text}", flush=True)
        else:
            self._live.console.print(Text(text))

    def round(self, record: RoundRecord) -> None:
        """Show a finished round; round 0 is the initial state.

        On a terminal the lines of evaluated rounds stay, the others give way to the next one.
        """
        done = record.round
        text = line(record, self._rounds)
        for event in record.events:
            if event.kind == "memory":
                self.message(event.message)
        if done == self._start:
            self._began = time.monotonic()
        if self._live is None:
            print(f"{self._front}{text}", flush=True)
            return
        self._bar.update(self._task, completed=done, left=self._left(done))
        self._above = [] if record.metrics else [Text(text, overflow="ellipsis", no_wrap=True)]
        if record.metrics:
            self._live.console.print(Text(text))
        self._live.refresh()

    def pause(self, round_: int) -> None:
        """Say that the run stops after a round, and how it goes on."""
        self.close()
        self.message(f"paused after round {round_} of {self._rounds}: the same command without --until goes on")

    def finish(self, results: FinalResults) -> None:
        """Print the results of the whole run, beside those of the untouched base."""
        self.close()
        for text in [*lines_of_test(results.test, results.test_sampling, results.base), *results.lines]:
            self.message(text)

    def close(self) -> None:
        """Leave the last state of the display on the screen. May be called twice."""
        if self._live is not None:
            self._under_way = None
            self._bar.update(self._inner, visible=False)
            self._live.stop()
            self._live = None

    def _drawn(self) -> Group:
        """What stands on the terminal now: the last line, the round under way, and all rounds."""
        lines, now = list(self._above), self._under_way
        if now is not None:
            trains = bool(now.clients) and not now.activity
            title = f"clients of round {now.round}"
            self._bar.update(self._inner, description=title, total=now.clients, completed=now.done, visible=trains)
            lines += [Text(f"{now.activity} ...")] if now.activity else []
        return Group(*lines, self._bar)

    def _left(self, done: int) -> str:
        if not self._start < done < self._rounds:
            return ""
        here = time.monotonic() - self._began
        return f"{duration(here / (done - self._start) * (self._rounds - done))} left"


def line(record: RoundRecord, rounds: int) -> str:
    """A round in one line: `round 3/20  train_loss 2.314  eval_loss 2.551  cohort 10 (1 dropped)  1.8 s`."""
    parts = [f"round {record.round}/{rounds}"]
    parts += [f"void: {event.message}" for event in record.events if event.kind == "void"]
    losses = {"train_loss": record.train_loss, **{f"eval_{name}": value for name, value in record.metrics.items()}}
    for name, value in losses.items():
        if not math.isnan(value):
            parts.append(f"{name} {value:.3f}" if abs(value) < 1e6 else f"{name} {value:.3g}")
    if "epsilon" in record.more:
        parts.append(f"epsilon {record.more['epsilon']:.3f}")
    if record.cohort_size:
        missing = {"dropped": record.dropped, "late": record.more.get("late", 0), "rejected": record.rejected}
        counts = [f"{count} {status}" for status, count in missing.items() if count]
        parts.append(f"cohort {record.cohort_size}" + (f" ({', '.join(counts)})" if counts else ""))
    if record.round and "virtual_seconds" in record.more:
        parts.append(f"virtual {duration(record.more['virtual_seconds'])}")
    if record.seconds:
        parts.append(duration(record.seconds))
    return "  ".join(parts)


def lines_of_test(test: Mapping[str, float], sampling: Mapping[str, Sampling], base: Mapping[str, float]) -> list[str]:
    """A line for each metric of a test: `test loss 1.2034 (untouched base 2.0; 95 % interval ... over 9 examples)`.

    base: the same metrics of the untouched base, where they are known.
    """
    lines = []
    for name, value in test.items():
        details = [f"untouched base {_shown(base[name])}"] if name in base else []
        if (one := sampling.get(name)) is not None:
            interval = f"95 % interval {_shown(one.low)} to {_shown(one.high)} " if one.known else ""
            details.append(f"{interval}over {one.items}")
        lines.append(f"test {name} {_shown(value)}" + (f" ({'; '.join(details)})" if details else ""))
    return lines


def _shown(value: float) -> str:
    """Four decimals, and no sign in front of a zero: the margin of an untouched base is 0 but for rounding."""
    return f"{round(value, 4) + 0.0:.4f}"


def duration(seconds: float) -> str:
    """1.8 s, 2 min 05 s, 3 h 20 min."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    if seconds < 3600:
        return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
    return f"{int(seconds) // 3600} h {int(seconds) // 60 % 60:02d} min"
