"""What a tracker is: it is told of every round of a run, after the round is on the disk and on the screen.

class Lines(Tracker):
    class Options(Section):
        path: str = Field("losses.txt", min_length=1, description="file that the losses are appended to")

    def round(self, record):
        with open(self.options.path, "a") as file:
            file.write(f"{record.round} {record.train_loss}\n")

Each tracker has a thread of its own on rank 0 (fedhpc.results.following), so it may take its time. What it raises ends
it with one line; the run goes on.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from pydantic import Field

from fedhpc import registry
from fedhpc.errors import UserError
from fedhpc.registry import Open, Section
from fedhpc.results.record import FinalResults, RoundRecord


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker knows of the run that it follows."""

    id: str  # the same whenever the run is resumed; another one where it starts over
    name: str
    group: str  # the folder that the run directory is in: the runs of a sweep share it
    tags: Mapping[str, str]  # method, mode and model
    configuration: Mapping[str, Any]  # by section.key, without trackers
    folder: Path  # for the tracker's files, in the run directory; made by who writes there
    told: int  # the last round that it was told of before the run was resumed; -1: none


class Tracker:
    """Follows a run (trackers). A tracker that fails is dropped with one line; the run goes on."""

    #: The keys beside `name`.
    Options: ClassVar[type[Section]] = Section
    #: The package that it needs, which the extra of the tracker's name installs; empty: none.
    package: ClassVar[str] = ""

    def __init__(self, options: Open, run: TrackedRun) -> None:
        """options: its item of the list `trackers`."""
        self.options, self.run = options, run
        #: It is told of the rounds after this one, of those before a resume by what results.h5 has of them.
        self.told = run.told

    def round(self, record: RoundRecord) -> None:
        """Take the record of a round; round 0 is the evaluated initial state. No round is told twice."""

    def finish(self, results: FinalResults) -> None:
        """Take the results of the whole run, which is complete by now."""

    def close(self) -> None:
        """Let go of what is open, also where the run failed; a run that is killed does not get here."""


class InProject(Section):
    """The keys of trackers that sort runs by projects."""

    project: str = Field("fedhpc", pattern=r"^\w[\w.-]*$", max_length=100, description="what the runs are shown under")


def writable(folder: Path, where: str) -> Path:
    """A folder that is there and can be written in. UserError otherwise. where: what says that it is this one."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} ({where}): cannot be made: {error.strerror}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UserError(f"{folder} ({where}): no permission to write in it")
    return folder


def check_packages(trackers: Sequence[Open]) -> None:
    """UserError where the configuration names a tracker whose package is not installed."""
    for position, options in enumerate(trackers):
        tracker: type[Tracker] = registry.choice("trackers", options.name, f"trackers[{position}].name")
        spec = find_spec(tracker.package) if tracker.package else None
        if tracker.package and (spec is None or spec.origin is None):  # no origin: a folder of this name
            plugin = registry.is_plugin("trackers", options.name)
            raise UserError(
                f"{options.name} needs the package {tracker.package}", key=f"trackers[{position}]",
                remedy=f"pip install {tracker.package}" if plugin else f"pip install 'fedhpc[{options.name}]'",
            )  # fmt: skip


def scalars(record: RoundRecord) -> dict[str, float]:
    """What a round measured, by its path in results.h5, as in `rounds/train_loss`. NaN is left out."""
    row = record.row()
    return {f"rounds/{name}": float(value) for name, value in row.items() if name != "round" and not math.isnan(value)}


def distributions(record: RoundRecord) -> dict[str, np.ndarray]:
    """What differs from client to client of a round, by its path in results.h5, as in `clients/loss_last`.

    Finite values of the columns that are no whole numbers, (clients,) each.
    """
    columns = {name: np.asarray(values) for name, values in record.clients.items()}
    finite = {name: values[np.isfinite(values)] for name, values in columns.items() if values.dtype.kind == "f"}
    return {f"clients/{name}": values for name, values in finite.items() if len(values)}


def final_scalars(results: FinalResults) -> dict[str, float]:
    """What the end of a run measured, by its path in results.h5, as in `test/loss`. NaN is left out."""
    groups = {"test": results.test, "base": results.base, "client_summary": results.client_summary}
    values = {f"{group}/{name}": float(value) for group, of in groups.items() for name, value in of.items()}
    return {name: value for name, value in values.items() if not math.isnan(value)}


def configuration_table(run: TrackedRun) -> str:
    """The configuration as a table in Markdown."""
    return "| key | value |\n|---|---|\n" + "".join(f"| {k} | {_cell(v)} |\n" for k, v in run.configuration.items())


def samples_table(results: FinalResults) -> str:
    """What the final state wrote, beside prompts and references, as a table in Markdown."""
    rows = [[s["prompt"], s["text"], " / ".join(s["references"])] for s in results.samples]
    lines = ["| prompt | text | references |", "|---|---|---|", *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]
    return "\n".join(lines)


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text.replace("|", "\\|").replace("\n", "<br>")
