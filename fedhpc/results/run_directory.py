"""The run directory: the files of a run, and what is removed when another one begins in it.

Rank 0 alone writes here. At the start of a run it calls `decide` (fedhpc.results.resume), `take_lock`, then `begin` for
a new run, or `remove_temporary_files` for one that goes on.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from fedhpc.config import Config
from fedhpc.results.files import TEMPORARY, atomic_write
from fedhpc.results.status import write_status

FILES = ("config.yaml", "results.h5", "status.json")
FOLDERS = ("adapter", "checkpoint", "clients", "trackers")


def remove_temporary_files(directory: Path) -> None:
    """Remove the temporary files that killed runs left. Only with the lock held."""
    for folder in (directory, *(directory / name for name in FOLDERS), *(directory / "clients").glob("*")):
        for stale in folder.glob(f".*{TEMPORARY}"):
            stale.unlink()


def begin(directory: Path) -> None:
    """Mark the directory as ours and remove the files of an earlier run, and nothing else.

    Only with the lock held, after `decide` said fresh.
    """
    # First, so that a directory whose removal is interrupted is known as ours, and not as a finished run.
    write_status(directory, "running", 0)
    remove_temporary_files(directory)
    for name in FOLDERS:
        folder = directory / name
        if folder.is_dir() and not folder.is_symlink():
            shutil.rmtree(folder)
        else:
            folder.unlink(missing_ok=True)
    for name in FILES:
        if name != "status.json":
            (directory / name).unlink(missing_ok=True)


def write_config(directory: Path, config: Config) -> None:
    """config.yaml: the resolved configuration of the run."""
    atomic_write(directory / "config.yaml", config.to_yaml().encode())
