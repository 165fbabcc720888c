"""Weights & Biases, offline: `wandb sync` uploads what the run directory has. WANDB_MODE=online uploads as it comes.

A run that is resumed offline is written anew from its first round, since of several offline folders with the same id
`wandb sync` keeps the last one (wandb issue 3841).
"""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

from fedhpc.errors import UserError
from fedhpc.registry import Open
from fedhpc.results.record import FinalResults, RoundRecord
from fedhpc.results.trackers.base import (
    InProject,
    TrackedRun,
    Tracker,
    distributions,
    final_scalars,
    scalars,
    writable,
)

_OFFLINE = ("offline", "dryrun")
_FLUSH_S = 1.0  # what is not in the file is lost when a run is killed; by default 15 s
_CONNECT_S = 30.0


class WeightsAndBiases(Tracker):
    """Scalars, histograms over clients, the configuration, the test as summary, samples as a table."""

    package = "wandb"
    Options = InProject

    def __init__(self, options: Open, run: TrackedRun) -> None:
        super().__init__(options, run)
        given = os.environ.get("WANDB_DIR")
        # In a folder that cannot be written it would write to a temporary one.
        folder = writable(Path(given or run.folder), "WANDB_DIR" if given else "of the run directory")
        for variable in ("WANDB_CACHE_DIR", "WANDB_DATA_DIR"):  # by default folders in the home directory
            os.environ.setdefault(variable, str(run.folder / "cache"))
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        mode = os.environ.get("WANDB_MODE", "offline")
        wandb = importlib.import_module("wandb")
        settings = wandb.Settings(
            silent=True, console="off", disable_git=True, disable_code=True, save_code=False, x_disable_stats=True,
            x_save_requirements=False, x_transaction_log_flush_interval=_FLUSH_S, init_timeout=_CONNECT_S,
        )  # fmt: skip
        wandb.setup(settings=settings)
        if mode in _OFFLINE:
            for earlier in (folder / "wandb").glob(f"offline-run-*-{run.id}"):
                shutil.rmtree(earlier)
            self.told = -1
        elif mode == "online" and not wandb.login(prompt=False, verify=False):
            raise UserError("WANDB_MODE is online, and nobody is logged in; give WANDB_API_KEY, or run 'wandb login'")
        self._wandb, self._last, self._complete = wandb, self.told, False
        self._run = wandb.init(
            mode=mode, project=options.project, group=run.group, name=run.name, id=run.id, resume="allow",
            tags=list(run.tags.values()), config=dict(run.configuration), dir=str(folder), settings=settings,
            reinit="create_new",
        )  # fmt: skip

    def round(self, record: RoundRecord) -> None:
        """A scalar for each column of /rounds; its step is the round."""
        self._last = record.round
        histograms = {name: self._wandb.Histogram(values) for name, values in distributions(record).items()}
        self._run.log({**scalars(record), **histograms}, step=record.round, commit=True)

    def finish(self, results: FinalResults) -> None:
        """The test as the summary of the run; the samples are a step of their own, since none can be written twice."""
        self._run.summary.update(final_scalars(results))
        if results.samples:
            rows = [[s["prompt"], s["text"], " / ".join(s["references"])] for s in results.samples]
            table = self._wandb.Table(columns=["prompt", "text", "references"], data=rows)
            self._run.log({"samples": table}, step=self._last + 1, commit=True)
        self._complete = True

    def close(self) -> None:
        """Say how the run ended, and wait for W&B's own process: it may not have written all when `finish` returns."""
        self._run.finish(exit_code=0 if self._complete else 1)
        self._wandb.teardown()
