"""The recorder writes a run to its directory: checkpoint and results.h5, in the order that loses nothing."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from fedhpc.results.checkpoint import ROWS, load_checkpoint, save_checkpoint
from fedhpc.results.record import FinalResults, RoundRecord, RunDescription
from fedhpc.results.results_file import Results
from fedhpc.results.status import PAUSED, write_status


class Saved(Protocol):
    """The server's state, as far as a checkpoint is concerned."""

    def tensors(self) -> dict[str, np.ndarray]: ...


class Watch(Protocol):
    """What knows how long this process has been busy with the run."""

    @property
    def seconds(self) -> float: ...


class Recorder:
    """Writes what the rounds of a run did, and the server's state, on rank 0 alone.

    Checkpoint first, then results.h5: the rows that the file lacks are in the checkpoint, so a writer that is killed
    at any moment loses no round that was recorded.
    """

    def __init__(
        self,
        run: RunDescription,
        results: Results,
        server_state: Saved,
        every: int,
        watch: Watch,
        writing: AbstractContextManager[object],
        saved: Callable[[int], None],
    ) -> None:
        """every: rounds between checkpoints. watch: of the time that goes into the run. `writing` is held while files
        are written. `saved` is told of each round that is on disk, while `writing` is held."""
        self.run, self.results = run, results
        self._server_state, self._every, self._writing, self._saved = server_state, every, writing, saved
        self._watch = watch
        self._seconds_before = float(results.attributes.get("wall_seconds", 0.0))
        self._written_at, self._write_s = -float("inf"), 0.0
        self._saved_round = results.num_rounds  # the last one that the checkpoint has

    def message(self, text: str) -> None:
        """Lines for whoever watches are not recorded; events are, with their round."""

    def round(self, record: RoundRecord) -> None:
        """Add a round; save it where a checkpoint is due."""
        self.results.add_round(record.row())
        self.results.set_evaluated(record.sampling)
        if record.clients:
            self.results.add_clients(record.clients)
        if record.experts:
            self.results.add_experts(record.experts)
        self.results.add_eval_samples(record.round, record.samples)
        for event in record.events:
            self.results.add_event(record.round, event.kind, event.message)
        if record.round % self._every == 0 or record.round in (0, self.run.rounds):
            with self._writing:
                self._save_round(record.round)

    def pause(self, round_: int) -> None:
        """Save what no checkpoint has yet, and all rounds in results.h5; the run stops here, as if it was preempted."""
        with self._writing:
            if round_ != self._saved_round:
                self._save_round(round_)
            self._write_results(complete=False)
            write_status(self.run.directory, "preempted", round_, f"{PAUSED} after round {round_}")

    def finish(self, results: FinalResults) -> None:
        """Write the test, the final payload and the rest; the run is then complete."""
        file = self.results
        file.set_test(results.test, results.test_sampling)
        file.set_base(results.base, results.base_sampling)
        file.set_samples(results.samples)
        if results.client_eval is not None:
            file.set_client_eval(results.client_eval, results.client_summary)
        file.set_final(results.tensors)
        file.set_tables(results.tables)
        file.attributes |= results.attributes
        with self._writing:
            self._save(file.num_rounds, complete=True)
            write_status(self.run.directory, "complete", file.num_rounds)

    def close(self) -> None:
        """Nothing is open between two writes."""

    def _save_round(self, round_: int) -> None:
        self._save(round_)
        self._saved_round = round_
        self._saved(round_)

    def _save(self, round_: int, complete: bool = False) -> None:
        directory = self.run.directory
        meta_rows, arrays = self.results.pending()
        meta = {"round": round_, **self.run.identity, "rows": meta_rows}
        rows = {f"{ROWS}{name}": array for name, array in arrays.items()}
        save_checkpoint(directory, {**self._server_state.tensors(), **rows}, meta)
        # Writing takes longer as the run grows; at most a twentieth of the time goes into it.
        if complete or round_ == 0 or time.perf_counter() - self._written_at > 20 * self._write_s:
            self._write_results(complete)
        write_status(directory, "running", round_)

    def _write_results(self, complete: bool) -> None:
        began = time.perf_counter()
        self.results.attributes["wall_seconds"] = self._seconds_before + self._watch.seconds
        self.results.write(self.run.directory / "results.h5", complete)
        self._written_at = time.perf_counter()
        self._write_s = self._written_at - began


def new_results(run: RunDescription) -> Results:
    """Empty results with the attributes and the partition of a run."""
    results = Results(run.attributes, run.metrics, run.columns)
    if run.partition:
        results.set_partition(**run.partition)
    return results


def restored(run: RunDescription, resumed_on: str) -> tuple[Results, int, Mapping[str, Any]]:
    """The results of the run in the directory, its last round, and the tensors of its checkpoint.

    New results, round 0 and no tensors where it has no checkpoint yet. resumed_on: for the event that says so.
    """
    loaded = load_checkpoint(run.directory)
    if loaded is None:
        return new_results(run), 0, {}
    tensors, meta = loaded
    path = run.directory / "results.h5"
    # A run killed before its first results.h5 has every row in the checkpoint.
    results = Results.read(path) if path.exists() else new_results(run)
    rows = {n.removeprefix(ROWS): t for n, t in tensors.items() if n.startswith(ROWS)}
    round_ = int(meta["round"])
    results.restore((meta["rows"], rows), round_)
    results.widen(run.columns)
    results.attributes |= run.attributes
    results.add_event(round_, "resumed", f"on {resumed_on}")
    return results, round_, tensors
