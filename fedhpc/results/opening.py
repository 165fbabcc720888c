"""Opening a run directory: a new run, or one that goes on. Rank 0's part, in three steps that all ranks wait for.

Nothing is written before the last step, so a directory that cannot serve, or a damaged run, is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Generic, Protocol, TypeVar

import numpy as np

from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.results.lock import Lock, take_lock
from fedhpc.results.record import RunDescription
from fedhpc.results.recorder import new_results, restored
from fedhpc.results.results_file import Results
from fedhpc.results.resume import Decision, decide
from fedhpc.results.run_directory import begin, remove_temporary_files, write_config
from fedhpc.results.status import read_status, write_status


class Restorable(Protocol):
    """The server's state, as far as a checkpoint is concerned."""

    def tensors(self) -> dict[str, np.ndarray]: ...
    def load(self, tensors: Mapping[str, np.ndarray]) -> None: ...


StateT = TypeVar("StateT", bound=Restorable)


class Opening(Generic[StateT]):
    """Takes a run directory for this process: `claim`, then `restore`, then `begin`; `close` lets go of it."""

    def __init__(
        self,
        config: Config,
        describe: Callable[[], RunDescription],
        fresh: bool,
        initial_state: Callable[[], StateT],
    ) -> None:
        """describe: what the run is, asked for when it is needed. fresh: start over in a directory that holds a run.
        initial_state: the server's before the first round."""
        self.config, self.fresh = config, fresh
        self._describe, self._initial_state = describe, initial_state
        self.decision: Decision = "fresh"
        self.round = 0  # the last round that is done
        self.results: Results
        self.server_state: StateT
        self._lock: Lock | None = None

    @cached_property
    def run(self) -> RunDescription:
        """What the observers of the run are told of it."""
        return self._describe()

    def claim(self) -> Decision:
        """Decide what to do with the directory and lock it. UserError where it cannot serve this run."""
        directory = self.run.directory
        before = read_status(directory)
        data, model = (str(self.run.identity[f"fingerprint_{what}"]) for what in ("data", "model"))
        self.decision = decide(self.config, directory, self.fresh, data, model)
        self._lock = take_lock(directory)
        if read_status(directory) != before:
            raise UserError(f"{directory}: another run began or ended in it just now; give the same command again")
        return self.decision

    @property
    def is_locked(self) -> bool:
        """Whether the directory is ours alone; some file systems have no locks."""
        return self._lock is not None and self._lock.held

    def restore(self, resumed_on: str) -> int:
        """Read what the directory holds, or begin with nothing: the last round that is done.

        resumed_on: for the event of a resume, such as "3 ranks over gloo". UserError where the run is damaged.
        """
        self.server_state = self._initial_state()
        if self.decision != "resume":
            self.results = new_results(self.run)
            return 0
        self.results, self.round, tensors = restored(self.run, resumed_on)
        if tensors:
            self.server_state.load(tensors)
        return self.round

    def begin(self) -> None:
        """Write the first files: from here on the directory holds this run."""
        if self.decision == "resume":
            remove_temporary_files(self.run.directory)
            # Before the new configuration: a finished run that is being extended must not look finished any more.
            write_status(self.run.directory, "running", self.round)
        else:
            begin(self.run.directory)
        write_config(self.run.directory, self.config)

    def close(self) -> None:
        """Let another process have the directory."""
        if self._lock is not None:
            self._lock.close()
