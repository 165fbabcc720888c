"""Reads the rows of a split from built-in data, a local folder or file, or a data set of the Hugging Face hub.

A split is named (`train`) or given as a file (`other.csv`). Every value that is used becomes a text as it is read. A
row remembers where it was read (`data/train.csv:7`), so that an error can name it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from fedhpc import builtin, config
from fedhpc.errors import UserError, nearest

SUFFIXES = (".jsonl", ".csv", ".parquet")
VALIDATION = ("validation", "dev", "valid", "val")
_INSTALL = "pip install 'fedhpc[data]'"

# Where a row was read ("train.csv:7", "builtin:dining train row 7") and its values by column.
LocatedRows = Iterator[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True)
class Table:
    """The rows of one split: the columns that were asked for, as texts, and where each row was read."""

    name: str
    rows: list[dict[str, str]]
    locations: list[str]  # of each row, like "train.csv:7"

    def select(self, keep: list[int]) -> Table:
        """The table of the rows with these indices."""
        return replace(self, rows=[self.rows[i] for i in keep], locations=[self.locations[i] for i in keep])


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
        source = _Files(path)
    elif data.source.startswith((".", "/", "~")) or _is_data_file(path):
        raise UserError(f"there is no file or folder '{data.source}'", key="data.source")
    else:
        return _Hub(data.source, data.subset)
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


def read_table(source: Source, split: str, columns: Mapping[str, str]) -> Table:
    """Read all rows of a split, as `find_split` named it.

    columns: the columns to keep, each with the configuration key that asks for it, like {"mr": "data.prompt"}.
    """
    table = Table(split, [], [])
    for location, values in source.read(split):
        table.rows.append({column: _column(values, column, key, location) for column, key in columns.items()})
        table.locations.append(location)
    if not table.rows:
        raise UserError(f"{split}: the split has no rows")
    return table


def with_join(source: Source, join: config.Join | None) -> Source:
    """Add the columns of another file of the source to each row (`data.join`); the row's own values come first."""
    if join is None:
        return source
    file = find_split(source, join.file)
    if file is None:
        raise UserError(
            f"data.join.file: there is no split or file '{join.file}'; there is: "
            f"{', '.join(source.splits()) or 'nothing'}"
        )
    others: dict[str, Mapping[str, Any]] = {}
    for location, values in source.read(file):
        name = _column(values, join.key, "data.join.key", location)
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


def text(value: Any) -> str:
    """Turn a value into the text that templates and filters use: 3 becomes "3", true "true", null the empty text.

    A list of one value stands for that value. ValueError for longer lists, objects and bytes.
    """
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (list, dict, bytes)):
        raise ValueError(f"a {type(value).__name__} of {len(value)}")
    result = str(value)
    try:
        result.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a surrogate pair at position {error.start}, which is no character") from None
    return result


def _column(values: Mapping[str, Any], column: str, key: str, location: str) -> str:
    if column not in values:
        hint = nearest(column, [str(name) for name in values])
        raise UserError(f"{location}: {key} names the column '{column}', which is not there; {hint}")
    try:
        return text(values[column])
    except ValueError as error:
        raise UserError(f"{location}: {key}: the column '{column}' holds {error}; use one text or number") from None


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
        for location, values in self.source.read(split):
            name = _column(values, self.join.column, "data.join.column", location)
            if name not in self.others:
                raise UserError(f"{location}: data.join: '{name}' is not in the column '{self.join.key}' of its file")
            yield location, {**self.others[name], **values}


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
            yield from _read_file(Path(split))
            return
        for number, row in enumerate(builtin.rows(self.task, split), 1):
            yield f"builtin:{self.task} {split} row {number}", row


@dataclass(frozen=True)
class _Files:
    path: Path

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    def splits(self) -> list[str]:
        if not self.path.is_dir():
            return [_stem(self.path)]
        return sorted({_stem(path) for path in self._data_files()})

    def _data_files(self) -> list[Path]:
        try:
            return sorted(path for path in self.path.iterdir() if _is_data_file(path))
        except OSError as error:
            raise UserError(f"the folder {self.path} cannot be read: {error}", key="data.source") from None

    def find(self, split: str) -> str | None:
        if _is_data_file(Path(split)):
            return _file_named(split, self.folder)
        if self.path.is_file():
            # A file by itself is the training data whatever it is called, and never the evaluation data too.
            is_train = split == "train" or (split == _stem(self.path) and split not in (*VALIDATION, "test"))
            return str(self.path) if is_train else None
        files = [path.name for path in self._data_files() if _stem(path) == split]
        if len(files) > 1:
            raise UserError(f"{self.path}: several files for the split '{split}': {', '.join(files)}; name one")
        return str(self.path / files[0]) if files else None

    def read(self, split: str) -> LocatedRows:
        return _read_file(Path(split))


class _Hub:
    """A data set of the Hugging Face hub, read by the library `datasets`."""

    def __init__(self, name: str, subset: str | None) -> None:
        try:
            import datasets
        except ImportError:
            raise UserError(
                f"'{name}' is not a file or folder here, and a data set of the hub needs the "
                f"library datasets: {_INSTALL}",
                key="data.source",
            ) from None
        self.name = name
        try:
            self.loaded: Any = datasets.load_dataset(name, subset)
        except Exception as error:  # the library raises anything, from OSError to its own classes
            raise UserError(
                f"'{name}' is neither a file or folder here nor a data set that the hub gives: "
                f"{type(error).__name__}: {error}",
                key="data.source",
            ) from None

    def splits(self) -> list[str]:
        return [str(split) for split in self.loaded]

    def find(self, split: str) -> str | None:
        return split if split in self.splits() else _file_named(split, None)

    def read(self, split: str) -> LocatedRows:
        if split not in self.splits():
            yield from _read_file(Path(split))
            return
        rows = self.loaded[split]
        # Columns of class numbers give the names of their classes.
        classes = {column: feature.names for column, feature in rows.features.items() if hasattr(feature, "int2str")}
        for number, row in enumerate(rows, 1):
            names = {c: class_names[row[c]] for c, class_names in classes.items() if row[c] is not None and row[c] >= 0}
            yield f"{self.name} {split} row {number}", {**row, **names}


def _stem(path: Path) -> str:
    name = path.name.removesuffix(".gz")
    return name.removesuffix(Path(name).suffix)


def _is_data_file(path: Path) -> bool:
    return path.name.removesuffix(".gz").endswith(SUFFIXES)


def _file_named(split: str, folder: Path | None) -> str | None:
    """The path of a split that is given as a file: in the source's folder, else in the current one; None if neither."""
    path = Path(os.path.expanduser(split))
    if not _is_data_file(path):
        return None
    candidates = [path] if folder is None else [folder / path, path]
    return next((str(candidate) for candidate in candidates if candidate.is_file()), None)


def _read_file(path: Path) -> LocatedRows:
    if not _is_data_file(path):
        raise UserError(f"{path}: a data file ends in {', '.join(SUFFIXES)}, each with or without .gz")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    suffix = Path(path.name.removesuffix(".gz")).suffix
    return {".jsonl": _read_jsonl, ".csv": _read_csv, ".parquet": _read_parquet}[suffix](path, content)


def _read_jsonl(path: Path, content: bytes) -> LocatedRows:
    for number, line in enumerate(io.BytesIO(content), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error.msg} at column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number}: not valid JSON: {error}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: must be a JSON object of columns, got {type(row).__name__}")
        yield f"{path}:{number}", row


def _read_csv(path: Path, content: bytes) -> LocatedRows:
    try:
        decoded = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text: {error.reason}") from None
    reader = csv.reader(io.StringIO(decoded, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}:1: a column name stands twice in the header: {', '.join(header)}")
        line = reader.line_num + 1
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    raise UserError(f"{path}:{line}: {len(cells)} cells, but {len(header)} columns in the header")
                yield f"{path}:{line}", dict(zip(header, cells, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None


def _read_parquet(path: Path, content: bytes) -> LocatedRows:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs the library pyarrow: {_INSTALL}") from None
    try:
        table = pyarrow.parquet.read_table(io.BytesIO(content))
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a valid parquet file: {error}") from None
    for number, row in enumerate(table.to_pylist(), 1):
        yield f"{path} row {number}", row
