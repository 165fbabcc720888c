"""Trackio: a database in the run directory (`TRACKIO_DIR=runs/mine/trackers/trackio trackio show` shows it).

TRACKIO_DIR names another folder, TRACKIO_SPACE_ID or TRACKIO_SERVER_URL a server.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import Any

from fedhpc.errors import UserError
from fedhpc.registry import Open
from fedhpc.results.record import FinalResults, RoundRecord
from fedhpc.results.trackers.base import (
    InProject,
    TrackedRun,
    Tracker,
    distributions,
    final_scalars,
    samples_table,
    scalars,
    writable,
)


class Trackio(Tracker):
    """Scalars, histograms over clients, the configuration, samples as a text."""

    package = "trackio"
    Options = InProject

    def __init__(self, options: Open, run: TrackedRun) -> None:
        super().__init__(options, run)
        given = os.environ.setdefault("TRACKIO_DIR", str(run.folder))  # read when it is imported
        writable(Path(given), "TRACKIO_DIR")
        remote = os.environ.get("TRACKIO_SPACE_ID") or os.environ.get("TRACKIO_SERVER_URL")
        self._trackio = importlib.import_module("trackio")
        if Path(self._trackio.TRACKIO_DIR) != Path(given):
            raise UserError(f"this process writes runs of Trackio to {self._trackio.TRACKIO_DIR}, not to {given}")
        self._problems: list[str] = []
        for part in ("", ".run", ".utils"):
            module: Any = importlib.import_module(f"trackio{part}")
            module.print = _silently  # how to show a run, among the lines of the run itself
            module._emit_nonfatal_warning = self._note  # it says in warnings what it could not write, and goes on
        if not remote:
            module = importlib.import_module("trackio.run")
            module._get_default_namespace = _nobody
        self._last = run.told
        self._run = self._trackio.init(
            project=options.project, name=run.name, group=run.group, resume="never" if run.told < 0 else "allow",
            config={**run.configuration, "fedhpc.id": run.id}, embed=False, auto_log_gpu=False, auto_log_cpu=False,
        )  # fmt: skip
        self._raise()

    def round(self, record: RoundRecord) -> None:
        """A scalar for each column of /rounds; its step is the round."""
        self._last = record.round
        histograms = {name: self._trackio.Histogram(values) for name, values in distributions(record).items()}
        self._log({**scalars(record), **histograms})

    def finish(self, results: FinalResults) -> None:
        """The test, at the last round."""
        samples = {"samples": self._trackio.Markdown(samples_table(results))} if results.samples else {}
        self._log({**final_scalars(results), **samples})

    def close(self) -> None:
        """Wait for what is on its way."""
        self._run.finish()
        self._raise()

    def _log(self, values: dict[str, Any]) -> None:
        self._run.log(values, step=self._last)
        self._raise()

    def _note(self, message: object, *_: object, **__: object) -> None:
        self._problems.append(str(message))

    def _raise(self) -> None:
        if self._problems:
            raise RuntimeError(self._problems[0])


def _silently(*_: object, **__: object) -> None:
    """Stand in for `print` in the modules of Trackio, which would write between the lines of the run."""


def _nobody() -> None:
    """Who is logged in at the Hub: it would be asked, also for a run that stays on this machine."""
