"""Finds the files of each client in a folder in which every client has a file, or a folder, of its own.

The name of the file, or of the folder, is the client's name. A split is the files of all clients, in the order of their
names.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from fedhpc.data import files
from fedhpc.errors import UserError

Layout = Literal["file", "folder"]


def files_by_client(source: Path, split: str, splits: Sequence[str], layout: Layout) -> dict[str, list[Path]]:
    """The files of a split by client; none where there is no such split.

    splits: the names of the usual splits, which are no clients. layout file: `train/north.jsonl`, or `north.jsonl`
    alone, which is training data. layout folder: `train/north/...`, `north/train.jsonl`, or `north/...` alone.
    UserError where two files would be one client's, or a client has no training data.
    """
    if layout == "file":
        folder = files.Folder.open(source)
        paths = folder.files_of(split)
        return _one_each(files.all_of(folder.path, besides=splits) if split == "train" and not paths else paths)
    of_split = source / split
    if of_split.is_dir() and files.folders_in(of_split):
        return {folder.name: files.all_of(folder) for folder in files.folders_in(of_split)}
    clients = [folder for folder in files.folders_in(source) if folder.name not in splits]
    paths_of = {folder.name: _of_client(folder, split, splits) for folder in clients}
    without = [folder for folder in clients if not paths_of[folder.name]]
    if split == "train" and without and len(without) < len(clients):
        raise UserError(f"{without[0]}: has no data for the split 'train', which other clients have")
    return {name: paths for name, paths in paths_of.items() if paths}


def _of_client(folder: Path, split: str, splits: Sequence[str]) -> list[Path]:
    """The files of a split in the folder of a client; one without any usual split is training data as a whole."""
    by_name = files.Folder.open(folder)
    paths = by_name.files_of(split)
    if not paths and split == "train" and not set(by_name.splits()).intersection(splits):
        return files.all_of(folder)
    return paths


def _one_each(paths: Sequence[Path]) -> dict[str, list[Path]]:
    clients: dict[str, list[Path]] = {}
    for path in paths:
        same = clients.setdefault(files.stem(path), [])
        if same:
            raise UserError(
                f"{path.parent}: {same[0].name} and {path.name} would be one client, '{files.stem(path)}'; join them, "
                "or set data.client_from to folder and give each client a folder"
            )
        same.append(path)
    return dict(sorted(clients.items()))
