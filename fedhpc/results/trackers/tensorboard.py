"""TensorBoard: event files in the run directory (`tensorboard --logdir runs` shows all runs beside each other)."""

from __future__ import annotations

import importlib

from fedhpc.registry import Open
from fedhpc.results.record import FinalResults, RoundRecord
from fedhpc.results.trackers.base import (
    TrackedRun,
    Tracker,
    configuration_table,
    distributions,
    final_scalars,
    samples_table,
    scalars,
)


class TensorBoard(Tracker):
    """Scalars, histograms over clients, and the configuration and samples as texts."""

    package = "tensorboard"

    def __init__(self, options: Open, run: TrackedRun) -> None:
        super().__init__(options, run)
        # The last round may not have reached the file: it is told again, and readers drop what was there of it.
        self.told = self._last = max(run.told - 1, -1)
        writer = importlib.import_module("torch.utils.tensorboard").SummaryWriter
        self._writer = writer(str(run.folder), purge_step=self.told + 1 if run.told >= 0 else None)
        if self.told < 0:
            self._writer.add_text("configuration", configuration_table(run), 0)

    def round(self, record: RoundRecord) -> None:
        """A scalar for each column of /rounds."""
        self._last = record.round
        for name, value in scalars(record).items():
            self._writer.add_scalar(name, value, record.round)
        for name, values in distributions(record).items():
            self._writer.add_histogram(name, values, record.round)
        self._writer.flush()

    def finish(self, results: FinalResults) -> None:
        """The test, at the last round."""
        for name, value in final_scalars(results).items():
            self._writer.add_scalar(name, value, self._last)
        if results.samples:
            self._writer.add_text("samples", samples_table(results), self._last)
        self._writer.flush()

    def close(self) -> None:
        """Close the file."""
        self._writer.close()
