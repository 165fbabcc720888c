"""Trackers follow a run without stopping or slowing it: each has a thread, and a queue with an end.

What the loop does is put a record in a queue. A tracker that is slower than the rounds misses some, one that fails is
left out, one that hangs is left behind at the end of the run after a few seconds; each is said in one line.

`trackers/<name>.json` in the run directory says up to which round a tracker was told, written before it is told. So a
round is told once, also where it is computed again after a resume; the one that was on its way when a run was killed
may be missing there. What a run had recorded before a tracker came, or while it was left out, it is told at the next
resume.
"""

from __future__ import annotations

import json
import queue
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fedhpc import registry
from fedhpc.config import parse_yaml
from fedhpc.errors import UserError
from fedhpc.registry import Open
from fedhpc.results.files import atomic_write
from fedhpc.results.record import FinalResults, Observer, RoundRecord, RunDescription
from fedhpc.results.results_file import Results
from fedhpc.results.resume import by_key
from fedhpc.results.trackers.base import TrackedRun, Tracker

WAITING = 64  # rounds that may wait for a tracker
FINISH_S = 20.0  # at most, for trackers to take the rest of a run that is complete
STOP_S = 1.0  # of one that failed
FOLDER = "trackers"  # in the run directory

_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")


class Following:
    """The trackers of a run as one observer of it."""

    def __init__(self, trackers: Sequence[Open], run: RunDescription, results: Results, screen: Observer) -> None:
        """trackers: the section of the configuration. results: with the rounds that were recorded before. screen: what
        is told of errors, a line each."""
        past = _Past(results.rounds, results.clients)
        self._screen, self._complete = screen, False
        self._threads: list[_Thread] = []
        for options in trackers:
            tracker: type[Tracker] = registry.choice("trackers", options.name, "trackers.name")
            name = registry.short_name(options.name)
            number = sum(thread.named == name for thread in self._threads) + 1
            self._threads.append(_Thread(tracker, options, run, name, f"{name}-{number}" if number > 1 else name, past))
        for thread in self._threads:
            thread.start()

    def message(self, text: str) -> None:
        """Lines for whoever watches the screen are not for trackers."""

    def round(self, record: RoundRecord) -> None:
        """Let every tracker be told of a round, when it gets to it."""
        for thread in self._threads:
            thread.put(record)
        self._say()

    def pause(self, round_: int) -> None:
        """Let trackers be: what they have not taken when this process ends they are told when the run goes on."""

    def finish(self, results: FinalResults) -> None:
        """Let every tracker be told how the run ended."""
        self._complete = True
        for thread in self._threads:
            thread.calls.put(lambda tracker: tracker.finish(results))
        self._say()

    def close(self) -> None:
        """Wait for the trackers, a few seconds at most."""
        limit_s = FINISH_S if self._complete else STOP_S
        until = time.monotonic() + limit_s
        for thread in self._threads:
            thread.calls.put(None)
        for thread in self._threads:
            thread.join(max(until - time.monotonic(), 0.0))
            if thread.is_alive():
                thread.lines.put(f"trackers: {thread.label} has not taken everything within {limit_s:.0f} s")
        self._say()
        self._threads = []

    @property
    def idle(self) -> bool:
        """Whether nothing waits for a tracker that is there."""
        return not any(thread.is_alive() and thread.calls.qsize() for thread in self._threads)

    def _say(self) -> None:
        for thread in self._threads:
            while not thread.lines.empty():
                self._screen.message(thread.lines.get())


class _Thread(threading.Thread):
    """One tracker, from its making to its end."""

    def __init__(
        self,
        tracker: type[Tracker],
        options: Open,
        run: RunDescription,
        named: str,
        file: str,
        past: _Past,
    ) -> None:
        """named: the tracker in tables; file: the name of what it keeps in the run directory; past: earlier rounds."""
        super().__init__(name=f"tracker {named}", daemon=True)  # so a tracker that hangs cannot keep the process
        self.named, self.label = named, options.name
        self.calls: queue.SimpleQueue[Callable[[Tracker], None] | None] = queue.SimpleQueue()
        self.lines: queue.SimpleQueue[str] = queue.SimpleQueue()  # for the screen
        self._class, self._options, self._run, self._past = tracker, options, run, past
        self._file = run.directory / FOLDER / f"{file}.json"
        self._missed = False

    def put(self, record: RoundRecord) -> None:
        """Let the tracker be told of a round, unless too many wait already."""
        if self.calls.qsize() < WAITING:
            self.calls.put(lambda tracker: self._tell(tracker, record))
        elif self.is_alive() and not self._missed:
            self._missed = True
            self.lines.put(
                f"trackers: {self.label} is slower than the rounds: it misses round {record.round} and maybe others"
            )

    def run(self) -> None:
        """Make the tracker and tell it what there is to tell, until the end."""
        try:
            self._id, self._told = _read(self._file)
            tracker = self._class(self._options, self._tracked())
            self._told = tracker.told
            for record in self._past.after(self._told):
                self._tell(tracker, record)
            while (call := self.calls.get()) is not None:
                call(tracker)
            tracker.close()
        except (Exception, SystemExit) as error:  # of somebody else's program, which must not end a run of days
            why = " ".join(f"{type(error).__name__}: {error}".split())
            why = str(error) if isinstance(error, UserError) else why
            self.lines.put(f"trackers: {self.label} failed and is left out: {_CREDENTIALS.sub('', why)[:500]}")

    def _tell(self, tracker: Tracker, record: RoundRecord) -> None:
        if record.round <= self._told:  # it is computed again after a resume
            return
        self._told = record.round
        self._file.parent.mkdir(exist_ok=True)
        atomic_write(self._file, json.dumps({"id": self._id, "told": self._told}).encode())
        tracker.round(record)

    def _tracked(self) -> TrackedRun:
        directory, attributes = self._run.directory, self._run.attributes
        tree = parse_yaml(str(attributes["config"]), f"{directory}: configuration")
        name = tree["run"]["name"]
        keys = by_key({section: value for section, value in tree.items() if section != "trackers"})
        return TrackedRun(
            id=self._id,
            name=name,
            group=directory.absolute().parent.name,
            tags={key: str(attributes[key]) for key in ("method", "mode", "model")},
            configuration={k: _CREDENTIALS.sub("", v) if isinstance(v, str) else v for k, v in keys.items()},
            folder=directory.absolute() / FOLDER / self._file.stem,
            told=self._told,
        )


def _read(file: Path) -> tuple[str, int]:
    """The id of the run for a tracker, and the last round that it was told of; a new id and -1 where it is new."""
    if not file.exists():
        return uuid.uuid4().hex, -1
    before = json.loads(file.read_text())
    return str(before["id"]), int(before["told"])


class _Past(NamedTuple):
    """The rounds that results.h5 had when the process began: columns of /rounds and of /clients."""

    rounds: Mapping[str, np.ndarray]
    clients: Mapping[str, np.ndarray]  # in the order of their rounds

    def after(self, told: int) -> Iterator[RoundRecord]:
        """Their records, without those up to a round."""
        for round_ in range(told + 1, len(self.rounds["round"])):
            row = {name: column[round_].item() for name, column in self.rounds.items()}
            first, last = np.searchsorted(self.clients["round"], [round_, round_ + 1])
            columns = {name: column[first:last] for name, column in self.clients.items()}
            yield RoundRecord.of_row(row, columns if last > first else {})
