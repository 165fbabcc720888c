"""Follow runs from another terminal, while they go on.

    python -m fedhpc.watch RUN [RUN ...] [--every S]

RUN is a run directory, or a folder of runs such as a sweep's, in which new runs are noticed as they begin. For each
run: its rounds, losses, bytes and the time that is left; of the run with the latest round also the loss as a curve in
characters, and its slowest worker. On a terminal the display is drawn anew in place, elsewhere each change is a line.

It ends when the runs have ended: exit code 0 if all of them are complete, else 1; 2 for a bad command; 130 after ^C.

It only reads, and takes no lock: status.json, results.h5 and the checkpoint are each replaced whole, so any moment will
do. Reading takes at most a twentieth of the time. A run that was killed cannot say so; where it ran on
this machine, its process is looked for.
"""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.live import Live
from rich.text import Text

from fedhpc.errors import UserError
from fedhpc.report.runs import LoadedRun, load_run
from fedhpc.report.text import as_bytes
from fedhpc.results.lock import LOCK
from fedhpc.results.progress import duration
from fedhpc.results.status import Status, read_status

COMPLETE, NOT_COMPLETE, REFUSED, INTERRUPTED = 0, 1, 2, 130
CURVE_LINES, CURVE_WIDTH = 8, 60  # of the loss in characters
RECENT = 20  # rounds from which the time of the next ones is foretold
IDLE_S = 60.0  # so long may a folder have nothing that runs, between two runs of a sweep
_BLANK = Status("running", 0, "", "")


@dataclass
class Watched:
    """What is known of one run: its status, and what it had recorded then."""

    directory: Path
    status: Status = _BLANK
    run: LoadedRun | None = None  # None before its first round
    is_gone: bool = False  # its process is, without a word

    @property
    def ended(self) -> bool:
        return self.is_gone or self.status.state != "running"

    @property
    def state(self) -> str:
        """Like "running", "preempted by SIGTERM" or "failed: no space left on the disk"."""
        if self.is_gone:
            return "killed: its process is gone; the same command again goes on"
        state, reason = self.status.state, self.status.reason
        return reason if reason.startswith(state) else ": ".join(filter(None, (state, reason)))

    @property
    def name(self) -> str:
        return self.run.name if self.run is not None else self.directory.name

    @property
    def silent_s(self) -> float:
        """Seconds since it last said something."""
        then = datetime.fromisoformat(self.status.updated_utc)
        return (datetime.now(timezone.utc) - then).total_seconds()

    def look(self) -> bool:
        """Read what has changed; whether anything has. UserError where a file is damaged."""
        # First, so that a run which ends between the two has written how.
        alive = is_alive(self.directory)
        status = read_status(self.directory) or self.status
        is_gone = status.state == "running" and not alive
        changed = (status, is_gone) != (self.status, self.is_gone)
        if status != self.status and (self.directory / "results.h5").exists():
            self.run = load_run(self.directory)
        self.status, self.is_gone = status, is_gone
        return changed

    # ------------------------------------------------------------ what is shown

    def facts(self) -> list[str]:
        """How far it is, and what it has cost so far: "round 3/20", "train_loss 2.314", ..."""
        if self.run is None:
            return ["no round yet"]
        rounds = self.run.rounds
        facts = [f"round {self.run.results.num_rounds}/{self.run.planned}"]
        for name in ("train_loss", "eval_loss"):
            measured = np.flatnonzero(~np.isnan(rounds[name]))
            if len(measured):
                last = measured[-1]
                at = "" if last == len(rounds["round"]) - 1 else f" (round {rounds['round'][last]})"
                facts.append(f"{name} {rounds[name][last]:.3f}{at}")
        if num_bytes := int(rounds["bytes_down"].sum() + rounds["bytes_up"].sum()):
            facts.append(as_bytes(num_bytes))
        if not self.ended and not math.isnan(left := self.left_s()):
            facts.append(f"about {duration(left)} left" if left else "the test, at the end")
        return facts

    def left_s(self) -> float:
        """Seconds to the last round by the mean of the recent ones, without the test; NaN where it cannot be known."""
        if self.run is None or not self.run.planned.isdigit() or not self.run.results.num_rounds:
            return math.nan
        left = int(self.run.planned) - self.run.results.num_rounds
        per_round = float(self.run.rounds["seconds"][1:][-RECENT:].mean())
        return max(left * per_round - self.silent_s, 0.0 if not left else 0.1)

    def details(self) -> list[str]:
        """The time of the last round, its slowest worker, and the losses as a curve."""
        if self.run is None:
            return []
        rounds = self.run.rounds
        lines = []
        if self.run.results.num_rounds:
            seconds, local = (float(rounds[name][-1]) for name in ("seconds", "seconds_local"))
            lines.append(
                f"last round {duration(seconds)}, of it {duration(local)} local training of the slowest worker"
            )
            lines += busiest_worker(self.run.results.clients)
        losses = {"o": "eval_loss", ".": "train_loss"}
        curves = {mark: (rounds["round"], rounds[name]) for mark, name in losses.items()}
        last = int(self.run.planned) if self.run.planned.isdigit() else self.run.results.num_rounds
        curve = curve_in_characters(curves, last)
        return lines + (["", *curve, "loss by round: o validation, . training"] if curve else [])


def is_alive(directory: Path) -> bool:
    """Whether the process that has the run directory may still be there: only one of this machine can be looked for."""
    try:
        pid, _, host = (directory / LOCK).read_text(encoding="utf-8").partition(" on ")
    except (OSError, ValueError):
        return True
    if host != socket.gethostname() or not pid.isdigit():
        return True
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's process
        return True
    return True


def busiest_worker(clients: Mapping[str, np.ndarray]) -> list[str]:
    """A line on the worker that had most tokens in the last round; none where a single worker trained.

    clients: the columns of /clients. The workers' own times are not recorded; the slowest one's is.
    """
    last = (clients["round"] == clients["round"].max(initial=0)) & (clients["worker"] >= 0)
    workers, index = np.unique(clients["worker"][last], return_inverse=True)
    tokens = np.bincount(index, clients["tokens"][last])
    if len(workers) < 2 or not tokens.sum():
        return []
    most = int(tokens.argmax())
    return [f"worker {workers[most]} had most to do: {tokens[most] / tokens.mean():.2f} x the mean of {len(workers)}"]


def curve_in_characters(curves: Mapping[str, tuple[np.ndarray, np.ndarray]], last: int) -> list[str]:
    """Curves over rounds 0 to `last` as lines of text; none where nothing was measured.

    curves: a character -> (rounds, values), NaN where there is none. Of two curves in one cell the first is seen.
    """
    known = {mark: (x[np.isfinite(y)], y[np.isfinite(y)]) for mark, (x, y) in curves.items()}
    values = np.concatenate([y for _, y in known.values()])
    if not len(values):
        return []
    low, high = float(values.min()), float(values.max())
    canvas = np.full((CURVE_LINES, CURVE_WIDTH), " ")
    for mark in reversed(known):
        x, y = known[mark]
        column = np.rint(x / max(last, 1) * (CURVE_WIDTH - 1)).astype(int).clip(0, CURVE_WIDTH - 1)
        line = np.rint((high - y) / ((high - low) or 1.0) * (CURVE_LINES - 1)).astype(int)
        canvas[line, column] = mark
    ends = {0: f"{high:.3f}", CURVE_LINES - 1: f"{low:.3f}"}
    width = max(map(len, ends.values()))
    lines = [f"{ends.get(i, ''):>{width}} |{''.join(canvas[i]).rstrip()}" for i in range(CURVE_LINES)]
    return [*lines, f"{'':{width}} +{'-' * CURVE_WIDTH}", f"{'':{width}}  0{last:>{CURVE_WIDTH - 1}}"]


class Watch:
    """All runs of the paths given; those of a folder are noticed as they begin."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """UserError where a path is no run and holds none."""
        given = [path.parent if path.is_file() else path for path in paths]
        self.single = [path for path in given if read_status(path) is not None]
        self.folders = [path for path in given if path not in self.single]
        self.runs: dict[Path, Watched] = {}
        for folder in self.folders:
            if next(_runs_of(folder), None) is None:
                raise UserError(
                    f"{folder}: there is no such run; give a run directory, or a folder of runs, once one has begun"
                )
        self.latest: Watched | None = None  # the run of which something was heard last

    def look(self) -> list[Watched]:
        """Read what has changed; the runs that have."""
        for directory in [*self.single, *(run for folder in self.folders for run in _runs_of(folder))]:
            self.runs.setdefault(directory, Watched(directory))
        changed = [run for run in self.runs.values() if run.look()]
        if changed:
            self.latest = max(changed, key=lambda run: (not run.ended, run.status.updated_utc))
        return changed

    @property
    def ended(self) -> bool:
        """Whether all runs have ended, and no other one of a sweep is going to begin."""
        if not all(run.ended for run in self.runs.values()):
            return False
        return not self.folders or self.compared or min(run.silent_s for run in self.runs.values()) > IDLE_S

    @property
    def compared(self) -> bool:
        """Whether every folder has a comparison that is newer than its runs: a sweep's last act."""
        for folder in self.folders:
            newest = max((_changed(run / "status.json") for run in _runs_of(folder)), default=0.0)
            comparison = folder / "comparison" / "comparison.csv"
            if not comparison.exists() or comparison.stat().st_mtime < newest:
                return False
        return True

    def drawn(self, height: int) -> Text:
        """What a terminal with this many lines shows: a line for each run, and details of the latest."""
        details = self.latest.details() if self.latest is not None else []
        runs = sorted(self.runs.values(), key=lambda run: run.ended)  # those that go on first
        room = max(height - len(details) - 3, 1)
        lines = [self.line(run) for run in runs[:room]]
        if len(runs) > room:
            states = [run.status.state for run in runs[room:]]
            counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
            lines.append(f"... and {len(states)} more: {counts}")
        if details and self.latest is not None:
            lines += ["", *([f"{self.latest.name}:"] if len(runs) > 1 else []), *details]
        return Text("\n".join(lines), no_wrap=True, overflow="ellipsis")

    def line(self, run: Watched) -> str:
        """A run in one line."""
        silent = "" if run.ended or run.silent_s < IDLE_S else f"  (no news for {duration(run.silent_s)})"
        return "  ".join([run.name, *run.facts(), run.state]) + silent


def _runs_of(folder: Path) -> Iterator[Path]:
    return (file.parent for file in sorted(folder.glob("*/status.json")) if read_status(file.parent) is not None)


def _changed(file: Path) -> float:
    """When it was written last, in seconds; 0 where it has been removed meanwhile."""
    try:
        return file.stat().st_mtime
    except FileNotFoundError:
        return 0.0


def follow(watch: Watch, screen: Console, every_s: float) -> int:
    """Show the runs until they have ended; the exit code."""
    live = Live(console=screen, auto_refresh=False) if screen.is_terminal and not screen.is_dumb_terminal else None
    if live is not None:
        live.start()
        screen.show_cursor(True)  # a terminal that is closed, or a kill, has no chance to bring a hidden one back
    try:
        while True:
            began = time.monotonic()
            changed = watch.look()
            if live is not None:
                live.update(watch.drawn(screen.height), refresh=True)  # also unchanged: the time left goes down
            else:
                for run in changed:
                    print(watch.line(run), flush=True)
            if watch.ended:
                return COMPLETE if all(run.status.state == "complete" for run in watch.runs.values()) else NOT_COMPLETE
            time.sleep(max(every_s, 20 * (time.monotonic() - began)))
    finally:
        if live is not None:
            live.stop()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; the exit code."""
    parser = argparse.ArgumentParser(prog="fedhpc watch", description="Follow runs from another terminal.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run directory, or a folder of runs")
    parser.add_argument("--every", type=float, default=1.0, metavar="S", help="seconds between two looks (1)")
    options = parser.parse_args(arguments)
    try:
        if not options.every > 0:
            raise UserError(f"command line: --every {options.every:g}: give a number of seconds above 0")
        return follow(Watch(options.runs), Console(file=sys.stdout, highlight=False), options.every)
    except UserError as error:
        print(f"fedhpc watch: error: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        return INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
