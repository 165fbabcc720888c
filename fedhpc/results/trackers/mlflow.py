"""MLflow: a database in the run directory, or the server that MLFLOW_TRACKING_URI names.

MLflow's own usage statistics are off, unless MLFLOW_DISABLE_TELEMETRY says otherwise.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
import time
from collections.abc import Mapping
from typing import Any

from fedhpc.registry import Open
from fedhpc.results.record import FinalResults, RoundRecord
from fedhpc.results.trackers.base import InProject, TrackedRun, Tracker, final_scalars, scalars, writable

_ID = "fedhpc.id"  # the tag by which a resumed run finds itself
_PARAMETERS = 100  # that MLflow takes in one call
_LONGEST = 500  # characters of a parameter, of which older servers take no more
_REFUSED = re.compile(r"[^\w\-. /]")  # in names


class MLflow(Tracker):
    """Metrics by round, the configuration as parameters, samples as a JSON file; a project is an experiment."""

    package = "mlflow"
    Options = InProject

    def __init__(self, options: Open, run: TrackedRun) -> None:
        super().__init__(options, run)
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "ERROR")  # read when it is imported
        os.environ.setdefault("MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT", "true")  # among the lines of the run
        for library in ("alembic", "urllib3"):  # of a new database, and of each attempt to reach a server
            logging.getLogger(library).setLevel(logging.ERROR)
        self._entities = importlib.import_module("mlflow.entities")
        uri = os.environ.get("MLFLOW_TRACKING_URI")
        artifacts = None
        if not uri:
            folder = writable(run.folder, "of the run directory")
            # By default the files would lie in ./mlruns of the working directory.
            uri, artifacts = f"sqlite:///{folder}/mlflow.db", (folder / "artifacts").as_uri()
        self._client = importlib.import_module("mlflow").MlflowClient(tracking_uri=uri)
        self._complete = False
        self._run_id = self._find(self._experiment(options.project, artifacts))
        # What was on its way when the run was killed may have come or not: MLflow knows.
        history = self._client.get_metric_history(self._run_id, "rounds/seconds") if run.told >= 0 else []
        self.told = self._last = max((metric.step for metric in history), default=-1)

    def round(self, record: RoundRecord) -> None:
        """A metric for each column of /rounds."""
        self._last = record.round
        self._log(scalars(record))

    def finish(self, results: FinalResults) -> None:
        """The test, at the last round."""
        self._log(final_scalars(results))
        if results.samples:
            text = json.dumps([dict(sample) for sample in results.samples], ensure_ascii=False, indent=1)
            self._client.log_text(self._run_id, text, "samples.json")
        self._complete = True

    def close(self) -> None:
        """Say how the run ended."""
        self._client.set_terminated(self._run_id, "FINISHED" if self._complete else "FAILED")

    def _log(self, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._entities.Metric(_REFUSED.sub("_", name), v, now, self._last) for name, v in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def _experiment(self, name: str, artifacts: str | None) -> str:
        """The id of an experiment, which another run may make in the same moment."""
        exception = importlib.import_module("mlflow.exceptions").MlflowException
        experiment: Any = self._client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        try:
            return str(self._client.create_experiment(name, artifact_location=artifacts))
        except exception:
            experiment = self._client.get_experiment_by_name(name)
            if experiment is None:
                raise
            return str(experiment.experiment_id)

    def _find(self, experiment: str) -> str:
        """The id of this run in MLflow: the one that was begun before the run was resumed, or a new one."""
        earlier = self._client.search_runs([experiment], f"tags.`{_ID}` = '{self.run.id}'", max_results=1)
        if earlier:
            run_id = str(earlier[0].info.run_id)
            self._client.update_run(run_id, status="RUNNING")
            return run_id
        tags = {_ID: self.run.id, "group": self.run.group, **self.run.tags}
        run_id = str(self._client.create_run(experiment, run_name=self.run.name, tags=tags).info.run_id)
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in self.run.configuration.items()}
        parameters = [self._entities.Param(_REFUSED.sub("_", k), v[:_LONGEST]) for k, v in texts.items()]
        for first in range(0, len(parameters), _PARAMETERS):
            self._client.log_batch(run_id, params=parameters[first : first + _PARAMETERS])
        return run_id
