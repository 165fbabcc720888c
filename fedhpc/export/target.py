"""Where an export is written. It gets its name when it is whole, so nothing half is left behind under that name."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedhpc.errors import UserError
from fedhpc.results.files import TEMPORARY


def require_new(path: Path, is_folder: bool = True) -> None:
    """UserError where something is at `path` already; a folder may be there if it is empty, and stays as it is."""
    there = path.exists()
    if there and is_folder and path.is_dir():
        there = any(child != _partial(path.resolve()) for child in path.resolve().iterdir())
    if there:
        raise UserError(f"'{path}' is there already", remedy="choose another one, or remove it")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Where to write the file or folder `path`, which is there when the context ends, and is not if that is an error.

    A folder that is there already, perhaps a mount, stays what it is, and what was written is moved into it.
    """
    path = path.resolve()  # `.` and links stay what they are too
    partial = _partial(path)
    partial.parent.mkdir(parents=True, exist_ok=True)
    _remove(partial)
    try:
        yield partial
        if path.is_dir():
            for child in list(partial.iterdir()):
                child.rename(path / child.name)
        else:
            partial.rename(path)
    finally:
        _remove(partial)


def _partial(path: Path) -> Path:
    """The temporary name: beside `path`, or in a folder that is there already, and so on the same file system."""
    name = f".{path.name}{TEMPORARY}"
    return path / name if path.is_dir() else path.with_name(name)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
