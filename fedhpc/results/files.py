"""Files that are replaced whole: a killed writer or a full disk leaves the old one intact.

A file is written to a temporary one beside it, fsynced and renamed over the old one. Tensors are kept in safetensors
files with JSON and a checksum in the header; nothing is pickled.
"""

from __future__ import annotations

import errno
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from fedhpc.errors import UserError

FORMAT = "fedhpc-run"  # in the header of every file of a run
TEMPORARY = ".fedhpc-tmp"  # ending of a file that is being written


def atomic_write(path: Path, content: bytes) -> None:
    """Replace the file at `path`: it has its old or its new content at any moment, on the disk too.

    UserError where the disk is full or the directory cannot be written; the old file is then intact.
    """
    with replacing(path) as temporary, open(temporary, "wb") as file:
        file.write(content)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file beside `path`, renamed over it when the body has written it."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}{TEMPORARY}")
    try:
        try:
            yield temporary
            to_disk(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        to_disk(path.parent)
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise UserError(
            f"{path}: cannot be written: {reason}; what was there before is intact: make room or allow "
            "writing, then start the same command again and the run goes on after its last checkpoint"
        ) from error


def to_disk(path: Path) -> None:
    """Wait until what was written to a file, or renamed in a folder, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot fsync a directory; the rename is atomic there all the same.
        if not (path.is_dir() and error.errno == errno.EINVAL):
            raise
    finally:
        os.close(descriptor)


# What reading a file that is missing, cut or changed can raise.
DAMAGE = (SafetensorError, OSError, ValueError, KeyError, TypeError)


def save_tensors(path: Path, tensors: Mapping[str, np.ndarray], meta: Mapping[str, Any]) -> None:
    """Replace the safetensors file `path`: arrays of any shape, `meta` as JSON in the header, and a checksum."""
    # Not ascontiguousarray, which turns a scalar into a vector of one.
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    text = json.dumps(meta)
    header = {"format": FORMAT, "meta": text, "crc32": str(_checksum(arrays, text))}
    with replacing(path) as temporary:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(arrays, temporary, metadata=header)


def load_tensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, meta) as saved. One of DAMAGE where the file is missing or a single bit differs."""
    with safe_open(path, framework="np") as file:
        header = file.metadata()
        arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
    if int(header["crc32"]) != _checksum(arrays, header["meta"]):
        raise ValueError("its checksum does not match")
    return arrays, json.loads(header["meta"])


def _checksum(arrays: Mapping[str, np.ndarray], text: str) -> int:
    crc = zlib.crc32(text.encode())
    for name in sorted(arrays):
        array = arrays[name]
        crc = zlib.crc32(f"{name}{array.dtype.str}{array.shape}".encode(), crc)
        crc = zlib.crc32(array.reshape(-1).view(np.uint8).data, crc) if array.size else crc
    return crc
