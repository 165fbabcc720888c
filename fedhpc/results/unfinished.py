"""Reads the results of a run that may still be going on, or that stopped half-way."""

from __future__ import annotations

import contextlib
from pathlib import Path

from fedhpc.errors import UserError
from fedhpc.results.checkpoint import checkpoint_rows
from fedhpc.results.results_file import Results


def read_results(directory: Path) -> Results:
    """What results.h5 of a run directory holds and, of an unfinished run, the rows that only its checkpoint has yet.

    UserError where results.h5 is missing or damaged. A checkpoint that is damaged adds nothing.
    """
    path = directory / "results.h5"
    results = Results.read(path)
    if not results.complete:
        with contextlib.suppress(UserError):
            checkpoint = checkpoint_rows(directory)
            if checkpoint is not None:
                rows, meta = checkpoint
                # Read after the checkpoint, the file has at least the rows that the checkpoint builds on.
                newer = Results.read(path)
                newer.restore((meta["rows"], rows), int(meta["round"]))
                return newer
    return results
