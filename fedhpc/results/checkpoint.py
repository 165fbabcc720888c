"""The checkpoint: what resume needs, in one safetensors file that is replaced whole."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from fedhpc.errors import UserError
from fedhpc.results.files import DAMAGE, load_tensors, save_tensors

CHECKPOINT = Path("checkpoint") / "state.safetensors"
ROWS = "rows/"  # begins the names of tensors that are rows of results.h5


def save_checkpoint(directory: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Replace checkpoint/state.safetensors.

    `decide` reads `round`, `block_size`, `fingerprint_data`, `fingerprint_model` and `plugins` from `meta`.
    """
    save_tensors(directory / CHECKPOINT, tensors, meta)


def load_checkpoint(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """(tensors, meta) as saved, or None without a checkpoint. UserError where a single bit differs."""
    path = directory / CHECKPOINT
    if not path.exists():
        return None
    with _refusing_damage(path):
        return load_tensors(path)


def checkpoint_meta(directory: Path) -> dict[str, Any] | None:
    """The JSON of the checkpoint alone: its tensors are not read."""
    path = directory / CHECKPOINT
    if not path.exists():
        return None
    with _refusing_damage(path), safe_open(path, framework="np") as file:
        meta: dict[str, Any] = json.loads(file.metadata()["meta"])
    return meta


def checkpoint_rows(directory: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]] | None:
    """(rows, meta): the rows of tables in the checkpoint, by table and column, and its JSON; None without a checkpoint.

    For whoever looks at a run: the server's state, which can be large, is not read, and so no checksum compared.
    """
    path = directory / CHECKPOINT
    if not path.exists():
        return None
    with _refusing_damage(path), safe_open(path, framework="np") as file:
        names = [name for name in file.keys() if name.startswith(ROWS)]  # noqa: SIM118  not a mapping
        rows = {name.removeprefix(ROWS): file.get_tensor(name) for name in names}
        return rows, json.loads(file.metadata()["meta"])


@contextmanager
def _refusing_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except DAMAGE as error:
        raise UserError(
            f"{path}: damaged, cannot resume ({error}); put back a copy of it, or start over with --fresh"
        ) from error
