"""Reads the rows of a split from built-in data, a local folder or file, or a data set of the Hugging Face hub.

A split is named (`train`) or given as a file (`other.csv`). Every value that is used becomes a text as it is read. A
row remembers where it was read (`data/train.csv:7`), so that an error can name it.
"""

from __future__ import annotations

import logging
import os
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from fedhpc import builtin, config
from fedhpc.data import files
from fedhpc.data.files import INSTALL, LocatedRows
from fedhpc.data.values import is_missing, text
from fedhpc.errors import UserError, nearest

VALIDATION = ("validation", "dev", "valid", "val")


@dataclass(frozen=True)
class Table:
    """The rows of one split: the columns that were asked for, as texts, and where each row was read."""

    name: str
    rows: list[dict[str, str]]
    locations: list[str]  # of each row, like "train.csv:7"
    nulls: list[frozenset[str]] = field(default_factory=list)  # of each row, the columns that have no value

    def select(self, keep: list[int]) -> Table:
        """The table of the rows with these indices."""
        return replace(
            self,
            rows=[self.rows[i] for i in keep],
            locations=[self.locations[i] for i in keep],
            nulls=[self.nulls[i] for i in keep],
        )

    def missing(self, column: str) -> list[int]:
        """Which rows have no value in a column: null, or not a number."""
        return [number for number, columns in enumerate(self.nulls) if column in columns]

    def without(self, column: str) -> list[int]:
        """Which rows have no text in a column: no value, or an empty one."""
        return [number for number, row in enumerate(self.rows) if not row[column]]


class Source(Protocol):
    """Something that splits are read from, like a folder of files or a data set of the hub."""

    def find(self, split: str) -> str | None:
        """What this source calls a split (a name or the path of a file); None where it has no such split."""

    def splits(self) -> list[str]:
        """The names of all splits, for error messages."""

    def read(self, split: str) -> LocatedRows:
        """The rows of a split, as `find` named it."""


def open_source(data: config.Data) -> Source:
    """Open the source that `data.source` names, without reading any rows yet."""
    path = Path(os.path.expanduser(data.source))
    if data.source.startswith("builtin:"):
        source: Source = _Builtin(data.source.removeprefix("builtin:"))
    elif path.exists():
        saved = any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))
        source = _Hub.saved(path) if saved else _Files(path)
    elif data.source.startswith((".", "/", "~")) or files.is_data_file(path):
        raise UserError(f"there is no file or folder '{data.source}'", key="data.source")
    else:
        return _Hub.loaded(data.source, data.subset)
    if data.subset is not None:
        raise UserError("data.subset is for data sets of the hub, which data.source is not: remove data.subset")
    return source


def find_split(source: Source, split: str) -> str | None:
    """What `source` calls `split`: for validation also under its other usual names, like dev; None if it has none."""
    for alias in (split, *(VALIDATION if split in VALIDATION else ())):
        name = source.find(alias)
        if name is not None:
            return name
    return None


def read_table(source: Source, split: str, columns: Mapping[str, str], optional: str | None = None) -> Table:
    """Read all rows of a split, as `find_split` named it.

    columns: the columns to keep, each with the configuration key that asks for it, like {"mr": "data.prompt"}.
    optional: one that need not be there; then it has no value.
    """
    table = Table(split, [], [])
    none = frozenset[str]()
    for location, values in source.read(split):
        row, nulls = {}, none
        for column, key in columns.items():
            there = column != optional or column in values
            value = _value(values, column, key, location, is_first=not table.rows) if there else None
            row[column] = _text(value, column, key, location)
            if not row[column] and is_missing(value):
                nulls |= {column}
        table.rows.append(row)
        table.locations.append(location)
        table.nulls.append(nulls)
    if not table.rows:
        raise UserError(f"{split}: the split has no rows")
    return table


def contents(source: Source) -> str:
    """The splits of a source for an error message; of a folder without any, what lies there instead."""
    rest = source.folder.rest() if isinstance(source, _Files) and source.folder is not None else []
    if source.splits() or not rest:
        return ", ".join(source.splits()) or "nothing"
    return f"nothing that is read, but {', '.join(rest[:5])}; {files.REWRITE}"


def with_join(source: Source, join: config.Join | None) -> Source:
    """Add the columns of another file of the source to each row (`data.join`); the row's own values come first."""
    if join is None:
        return source
    file = find_split(source, join.file)
    if file is None:
        raise UserError(f"data.join.file: there is no split or file '{join.file}'; there is: {contents(source)}")
    others: dict[str, Mapping[str, Any]] = {}
    for location, values in source.read(file):
        name = _text(_value(values, join.key, "data.join.key", location), join.key, "data.join.key", location)
        if name in others:
            raise UserError(f"{location}: data.join.key: '{name}' stands twice in the column '{join.key}'")
        others[name] = values
    return _Joined(source, join, others)


def filtered(table: Table, data: config.Data, section: str = "data") -> Table:
    """Keep the rows that pass `data.where` and `data.where_not`; values are compared as texts.

    section: where the two keys stand, for the error of a filter that leaves nothing.
    """
    accepted = {column: {text(value) for value in values} for column, values in data.where.items()}
    refused = {column: {text(value) for value in values} for column, values in data.where_not.items()}
    keep = [
        number
        for number, row in enumerate(table.rows)
        if all(row[column] in values for column, values in accepted.items())
        and not any(row[column] in values for column, values in refused.items())
    ]
    if not keep:
        raise UserError(f"{table.name}: none of {len(table.rows)} rows passes {section}.where and {section}.where_not")
    return table.select(keep)


def refuse(table: Table, rows: list[int], column: str, key: str) -> None:
    """UserError where there are rows that lack what every row needs in a column."""
    if rows:
        more = f", nor in {len(rows) - 1} more of {len(table.rows)} rows" if len(rows) > 1 else ""
        raise UserError(
            f"{table.locations[rows[0]]}: {key}: the column '{column}' has no value here{more}; give it one, or leave "
            f'such rows out with data.where_not: {{{column}: [""]}}'
        )


def _value(values: Mapping[str, Any], column: str, key: str, location: str, is_first: bool = True) -> Any:
    """The value of a row in a column. UserError where it has none, or one that Python cannot hold."""
    if column not in values:
        remedy = nearest(column, [str(name) for name in values])
        if not is_first:
            remedy = f"rows before it have one: write null, or an empty text, where a row has no value; {remedy}"
        raise UserError(f"{location}: {key} names the column '{column}', which is not there; {remedy}")
    try:
        return values[column]
    except UserError as error:
        raise error.but(key=key) from None


def _text(value: Any, column: str, key: str, location: str) -> str:
    try:
        return text(value)
    except ValueError as error:
        raise UserError(f"{location}: {key}: the column '{column}' holds {error}") from None


@dataclass(frozen=True)
class _Joined:
    source: Source
    join: config.Join
    others: Mapping[str, Mapping[str, Any]]

    def splits(self) -> list[str]:
        return self.source.splits()

    def find(self, split: str) -> str | None:
        return self.source.find(split)

    def read(self, split: str) -> LocatedRows:
        column, key = self.join.column, "data.join.column"
        for location, values in self.source.read(split):
            name = _text(_value(values, column, key, location), column, key, location)
            if name not in self.others:
                raise UserError(f"{location}: data.join: '{name}' is not in the column '{self.join.key}' of its file")
            yield location, ChainMap(values, self.others[name])  # type: ignore[arg-type]  # nobody writes to it


@dataclass(frozen=True)
class _Builtin:
    task: str

    def splits(self) -> list[str]:
        if self.task not in builtin.TASKS:
            hint = nearest(self.task, list(builtin.TASKS))
            raise UserError(f"there is no built-in task '{self.task}'; {hint}", key="data.source")
        return list(builtin.SPLITS[self.task])

    def find(self, split: str) -> str | None:
        return split if split in self.splits() else _file_named(split, None)

    def read(self, split: str) -> LocatedRows:
        if split not in self.splits():
            yield from files.read_file(Path(split))
            return
        for number, row in enumerate(builtin.rows(self.task, split), 1):
            yield f"builtin:{self.task} {split} row {number}", row


class _Files:
    """A folder of data files, or one file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.folder = files.Folder.open(path) if path.is_dir() else None
        self._paths: dict[str, list[Path]] = {}  # the files of each split, as `find` named it
        self._together = files.Together([])

    def splits(self) -> list[str]:
        return [files.stem(self.path)] if self.folder is None else self.folder.splits()

    def find(self, split: str) -> str | None:
        paths = self._files_of(split)
        if not paths:
            return None
        name = str(paths[0]) + (f" and {len(paths) - 1} more" if len(paths) > 1 else "")
        self._paths[name] = paths
        return name

    def _files_of(self, split: str) -> list[Path]:
        if files.is_data_file(Path(split)):
            named = _file_named(split, self.path.parent if self.folder is None else self.folder.path)
            if named is not None or self.folder is None:
                return [] if named is None else [Path(named)]
        if self.folder is None:
            # A file by itself is the training data whatever it is called, and never the evaluation data too.
            is_train = split == "train" or (split == files.stem(self.path) and split not in (*VALIDATION, "test"))
            return [self.path] if is_train else []
        # So is a folder of parts without a split's name.
        return self.folder.files_of(split) or (files.parts_of(self.path) if split == "train" else [])

    def read(self, split: str) -> LocatedRows:
        together = files.Together(dict.fromkeys(path for paths in self._paths.values() for path in paths))
        if together.paths != self._together.paths:
            self._together = together
        return files.read_files(self._paths[split], self._together)


@dataclass(frozen=True)
class _Hub:
    """A data set of the Hugging Face hub, or one saved by the library `datasets`, which reads both."""

    name: str
    tables: Mapping[str, Any]  # a datasets.Dataset for each split

    @classmethod
    def loaded(cls, name: str, subset: str | None) -> _Hub:
        """The data set that the hub calls `name`."""
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"'{name}' is not a file or folder here, and a data set of the hub needs the "
                f"library datasets: {INSTALL}",
                key="data.source",
            ) from None
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it tells of every retry, and we of the failure
        try:
            return cls(name, datasets.load_dataset(name, subset))
        except Exception as error:  # the library raises anything, from OSError to its own classes
            raise UserError(
                f"'{name}' is neither a file or folder here nor a data set that the hub gives: "
                f"{type(error).__name__}: {error}",
                key="data.source",
            ) from None

    @classmethod
    def saved(cls, path: Path) -> _Hub:
        """What `save_to_disk` has written to a folder: several splits, or one, which is the training data."""
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"{path} was written by the library datasets, which reads it: {INSTALL}", key="data.source"
            ) from None
        try:
            tables = datasets.load_from_disk(str(path))
        except Exception as error:
            raise UserError(
                f"{path}: cannot be read as what datasets' save_to_disk writes: {type(error).__name__}: {error}",
                key="data.source",
            ) from None
        return cls(str(path), tables if isinstance(tables, datasets.DatasetDict) else {"train": tables})

    def splits(self) -> list[str]:
        return [str(split) for split in self.tables]

    def find(self, split: str) -> str | None:
        return split if split in self.splits() else _file_named(split, None)

    def read(self, split: str) -> LocatedRows:
        if split not in self.splits():
            yield from files.read_file(Path(split))
            return
        table = self.tables[split]

        def values(column: str) -> list[Any]:
            read = files.python_values(table.select_columns([column]).with_format("arrow")[:].column(column))
            feature = table.features[column]
            if not hasattr(feature, "int2str"):
                return read
            # Columns of class numbers give the names of their classes.
            return [feature.names[value] if value is not None and value >= 0 else value for value in read]

        columns = files.Columns(table.column_names, values)
        yield from columns.rows(f"{self.name} {split} row {number + 1}" for number in range(len(table)))


def _file_named(split: str, folder: Path | None) -> str | None:
    """The path of a split that is given as a file: in the source's folder, else in the current one; None if neither."""
    path = Path(os.path.expanduser(split))
    if not files.is_data_file(path):
        return None
    candidates = [path] if folder is None else [folder / path, path]
    return next((str(candidate) for candidate in candidates if candidate.is_file()), None)
