"""What a tracker is: it is told of every round of a run, on rank 0, after the round is on the disk and on the screen.

class Lines(Tracker):
    class Options(Section):
        path: str = Field("losses.txt", min_length=1, description="file that the losses are appended to")

    def round(self, record):
        with open(self.options.path, "a") as file:
            file.write(f"{record.round} {record.train_loss}\n")
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, TypeVar

from fedhpc.registry import Open, Section
from fedhpc.results.record import FinalResults, Observer, RoundRecord, RunDescription

T = TypeVar("T")


class Tracker:
    """Follows a run (trackers). A tracker that fails is dropped with one line; the run goes on."""

    #: The keys beside `name`.
    Options: ClassVar[type[Section]] = Section

    def __init__(self, options: Open, run: RunDescription, start_round: int) -> None:
        """options: its item of the list `trackers`. start_round: the last round that was done before; 0 for a new
        run. A resumed run tells of the rounds after it, so none is told twice unless the run was killed in between."""
        self.options, self.run, self.start_round = options, run, start_round

    def round(self, record: RoundRecord) -> None:
        """Take the record of a round; round 0 is the evaluated initial state."""

    def finish(self, results: FinalResults) -> None:
        """Take the results of the whole run, which is complete by now."""

    def close(self) -> None:
        """Let go of what is open, also after a failure; a run that is killed does not get here."""


class Guarded:
    """A tracker as an observer that never stops a run: its first error is said, and ends it."""

    def __init__(self, name: str, make: Callable[[], Tracker], others: list[Observer]) -> None:
        """make: gives the tracker, which may fail too. others: the observers that are told of the error, in a line."""
        self._name, self._others = name, others
        self._tracker: Tracker | None = None
        self._tracker = self._guarded(make)

    def message(self, text: str) -> None:
        """Lines for whoever watches the screen are not for trackers."""

    def round(self, record: RoundRecord) -> None:
        """Pass a round on."""
        if self._tracker is not None:
            self._guarded(self._tracker.round, record)

    def finish(self, results: FinalResults) -> None:
        """Pass the results on."""
        if self._tracker is not None:
            self._guarded(self._tracker.finish, results)

    def close(self) -> None:
        """Pass the end on."""
        if self._tracker is not None:
            self._guarded(self._tracker.close)

    def _guarded(self, call: Callable[..., T], *arguments: object) -> T | None:
        try:
            return call(*arguments)
        except (Exception, SystemExit) as error:  # of somebody else's program, which must not end a run of days
            self._tracker = None
            why = " ".join(f"{type(error).__name__}: {error}".split())
            for observer in self._others:
                observer.message(f"trackers: {self._name} failed and is left out: {why}")
            return None
