"""Reads the rows of a split from built-in data, a local folder or file, or a data set of the Hugging Face hub.

A split is named (`train`) or given as a file (`other.csv`). Every value that is used becomes a text as it is read,
but for chats, which become JSON. A row remembers where it was read (`data/train.csv:7`), so that an error can name it.
"""

from __future__ import annotations

import logging
import os
from collections import ChainMap
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

import numpy as np

from fedhpc import builtin, config
from fedhpc.config import Missing
from fedhpc.data import files
from fedhpc.data.client_files import Layout, files_by_client
from fedhpc.data.files import INSTALL, LocatedRows
from fedhpc.data.partitioners.base import Int64
from fedhpc.data.rows import AT_ONCE, Locations, LocationsBuilder, Rows, RowsBuilder
from fedhpc.data.structured import Json, Structured, parsed
from fedhpc.data.values import is_character_text, is_missing, text
from fedhpc.errors import UserError, nearest

VALIDATION = ("validation", "dev", "valid", "val")
SPLITS = ("train", *VALIDATION, "test")


@dataclass(frozen=True)
class Table:
    """The rows of one split: the columns that were asked for, and where each row was read."""

    name: str
    rows: Rows  # of each row, the texts of its columns
    locations: Locations  # of each row, like "train.csv:7"
    nulls: Mapping[str, Int64]  # of each column, which rows have no value, ascending
    structured: Rows | None = None  # columns of lists and objects, by the configuration key that names each

    def structures(self, key: str, rows: slice) -> Iterator[Json]:
        """What was read of some rows in the column of lists and objects that `key` names; null where it names none.

        UserError for a value that cannot be used.
        """
        if self.structured is None or key not in self.structured.columns:
            return repeat(None, len(range(*rows.indices(len(self.rows)))))
        return map(parsed, self.structured.texts(rows, [key])[0])

    def select(self, indices: Sequence[int] | Int64) -> Table:
        """The table of the rows with these indices."""
        keep = np.asarray(indices, np.int64)
        return replace(
            self,
            rows=self.rows.select(keep),
            locations=self.locations.select(keep),
            nulls={column: np.flatnonzero(np.isin(keep, rows)) for column, rows in self.nulls.items()},
            structured=None if self.structured is None else self.structured.select(keep),
        )

    def missing(self, column: str) -> list[int]:
        """Which rows have no value in a column: null, or not a number."""
        return self.nulls[column].tolist() if column in self.nulls else []

    def without(self, column: str) -> list[int]:
        """Which rows have no text in a column: no value, or an empty one."""
        return [number for number, value in enumerate(self.rows.column(column)) if not value]


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
    if data.client_from != "column" and (not path.is_dir() or _is_saved(path)):
        raise UserError(
            f"data.client_from {data.client_from} is for a folder of data files, which data.source '{data.source}' is "
            "not; give the folder, or name a column with the owner as data.client"
        )
    if data.source.startswith("builtin:"):
        source: Source = _Builtin(data.source.removeprefix("builtin:"))
    elif path.exists():
        by = None if data.client_from == "column" else ByClient(data.client_from, str(data.client))
        source = _Hub.saved(path) if _is_saved(path) else _Files(path, by)
    elif data.source.startswith((".", "/", "~")) or files.is_data_file(path):
        raise UserError(f"there is no file or folder '{data.source}'", key="data.source")
    else:
        return _Hub.loaded(data.source, data.subset, data.streaming)
    for key in ("subset", "streaming"):
        if getattr(data, key):
            raise UserError(f"data.{key} is for data sets of the hub, which data.source is not: remove data.{key}")
    return source


def _is_saved(path: Path) -> bool:
    """Whether a folder is one that `datasets` has saved."""
    return any((path / name).is_file() for name in ("dataset_dict.json", "dataset_info.json"))


def find_split(source: Source, split: str) -> str | None:
    """What `source` calls `split`: for validation also under its other usual names, like dev; None if it has none."""
    for alias in (split, *(VALIDATION if split in VALIDATION else ())):
        name = source.find(alias)
        if name is not None:
            return name
    return None


def read_table(
    source: Source,
    split: str,
    columns: Mapping[str, str],
    optional: str | None = None,
    references: Collection[str] = (),
    missing: Missing = "error",
    structured: Mapping[str, Structured] = MappingProxyType({}),
) -> Table:
    """Read all rows of a split, as `find_split` named it.

    columns: the columns to keep, each with the configuration key that asks for it, like {"mr": "data.prompt"}; see
    `lookup` for "a.b". optional: one that need not be there; then it has no value. references: the columns of a target,
    in which a list stands for as many rows with one reference each. missing: what becomes of a row without a column
    that others have, as in `data.missing`. structured: columns of lists and objects, such as chats, by the key that
    asks for each (`Table.structured`).
    """
    locations = LocationsBuilder()
    structures = RowsBuilder([*structured]) if structured else None
    nulls: dict[str, list[int]] = {}
    lacking: dict[str, tuple[Mapping[str, Any], str]] = {}  # the first row without a column, and where it is
    seen: set[str] = set()
    texts = [*columns]
    plain = texts if structures is None else None  # the columns of a row that may have a text in each
    asked = [*columns.items(), *((one.column, key) for key, one in structured.items())]

    def rows() -> Iterator[Sequence[str]]:
        count = 0
        for location, values in source.read(split):
            if plain is not None and (ready := _plain_texts(values, plain)) is not None:
                seen.update(plain)
                locations.add(location)
                count += 1
                yield ready
                continue
            picked: dict[str, Any] = {}
            for column, key in asked:
                if (missing == "empty" or column == optional) and not _has(values, column):
                    lacking.setdefault(column, (values, location))
                    picked[column] = None
                else:
                    picked[column] = _value(values, column, key, location, source.read(split))
                    if column in values or picked[column] is not None:
                        seen.add(column)
            for one in _each_reference(picked, references, location):
                if structures is not None:
                    structures.add([of.written(one[of.column], location) for of in structured.values()])
                row = [_text(one[column], column, columns[column], location) for column in texts]
                for column, written in zip(texts, row, strict=True):
                    if not written and is_missing(one[column]):
                        nulls.setdefault(column, []).append(count)
                locations.add(location)
                count += 1
                yield row

    rows_of_split = Rows.of(texts, rows())
    for column, (values, location) in lacking.items():
        if column not in seen and column != optional:  # no row has it: rather a mistake than a value that is missing
            _value(values, column, next(key for name, key in asked if name == column), location)
    if not rows_of_split:
        raise UserError(f"{split}: the split has no rows")
    of_nulls = {column: np.array(numbers, np.int64) for column, numbers in nulls.items()}
    return Table(
        split, rows_of_split, locations.locations(), of_nulls, None if structures is None else structures.rows()
    )


def _plain_texts(values: Mapping[str, Any], columns: Sequence[str]) -> list[str] | None:
    """The values of a row where all are plain texts, as most are; None where `text` has to look at one."""
    if type(values) is not dict:
        return None
    try:
        row = [values[column] for column in columns]
    except KeyError:
        return None
    for value in row:
        if type(value) is not str or not (value.isascii() or is_character_text(value)):
            return None
    return row


def _each_reference(values: dict[str, Any], columns: Collection[str], location: str) -> Iterable[Mapping[str, Any]]:
    """The values of a row for each item of the lists in these columns; of one without lists as they are."""
    lists = {
        column: values[column]
        for column in columns
        if isinstance(values.get(column), list) and not any(isinstance(item, Mapping) for item in values[column])
    }
    if not lists:
        return [values]
    if len({len(items) for items in lists.values()}) > 1:
        raise UserError(f"{location}: data.target: the lists in its columns {', '.join(lists)} differ in length")
    # An empty list gives a row with an empty target, for which there is an error already.
    items = zip(*lists.values(), strict=True) if all(lists.values()) else [("",) * len(lists)]
    return ({**values, **dict(zip(lists, chosen, strict=True))} for chosen in items)


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
    if not accepted and not refused:
        return table
    keep = np.ones(len(table.rows), bool)
    for filters, wanted in ((accepted, True), (refused, False)):
        for column, values in filters.items():
            keep &= np.fromiter(((value in values) is wanted for value in table.rows.column(column)), bool, len(keep))
    if not keep.any():
        there = [f"{column}: {_some(table.rows.column(column))}" for column in (*accepted, *refused)]
        raise UserError(
            f"{table.name}: none of {len(table.rows)} rows passes {section}.where and {section}.where_not; values that "
            f"are there: {'; '.join(there)}"
        )
    return table.select(np.flatnonzero(keep))


def _some(values: Iterable[str]) -> str:
    """The first five distinct values, and dots where there are more."""
    distinct = [repr(value) for value in dict.fromkeys(values)]
    return ", ".join(distinct[:5]) + ", ..." * (len(distinct) > 5)


def refuse(table: Table, rows: list[int], column: str, key: str) -> None:
    """UserError where there are rows that lack what every row needs in a column."""
    if rows:
        more = f", nor in {len(rows) - 1} more of {len(table.rows)} rows" if len(rows) > 1 else ""
        raise UserError(
            f"{table.locations[rows[0]]}: {key}: the column '{column}' has no value here{more}; give it one, or leave "
            f'such rows out with data.where_not: {{{column}: [""]}}'
        )


def _value(
    values: Mapping[str, Any], column: str, key: str, location: str, rows: Iterable[tuple[str, Mapping[str, Any]]] = ()
) -> Any:
    """The value of a row in a column. UserError where it has none, or one that Python cannot hold.

    rows: those among which one may have the column; they are read for the error alone.
    """
    try:
        return lookup(values, column)
    except KeyError:
        outer = column.partition(".")[0]
        within = values.get(outer)
        names = (
            [f"{outer}.{name}" for name in within] if isinstance(within, Mapping) else [str(name) for name in values]
        )
        remedy = nearest(column, names)
        if any(_has(others, column) for _, others in rows):
            remedy = (
                "other rows have one: write null, or an empty text, where a row has no value, or set data.missing "
                f"to empty; {remedy}"
            )
        message = f"{location}: {key} names the column '{column}', which is not there"
        raise UserError(message, key=key, remedy=remedy) from None
    except UserError as error:
        raise error.but(key=key) from None


def lookup(values: Mapping[str, Any], column: str) -> Any:
    """The value of a row in a column, or of "a.b", where there is no such column, the value b of the dict in a.

    Of a list of dicts it is the list of their values; of a dict that is missing, null. KeyError where there is none.
    """
    if column in values:
        return values[column]
    parts = column.split(".")
    for count in range(len(parts) - 1, 0, -1):
        outer, inner = ".".join(parts[:count]), ".".join(parts[count:])
        if outer in values:
            value = values[outer]
            if is_missing(value):
                return None
            if isinstance(value, Mapping):
                return lookup(value, inner)
            if isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
                return [lookup(item, inner) for item in value]
    raise KeyError(column)


def _has(values: Mapping[str, Any], column: str) -> bool:
    if column in values or "." not in column:
        return column in values
    try:
        lookup(values, column)
    except KeyError:
        return False
    except UserError:  # there is a value, which Python cannot hold
        return True
    return True


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


@dataclass(frozen=True)
class ByClient:
    """Each client has a file or a folder of its own, whose name stands in a column that is made of it."""

    layout: Layout
    column: str


class _Files:
    """A folder of data files, or one file. by_client: of a folder, where each client has its own."""

    def __init__(self, path: Path, by_client: ByClient | None = None) -> None:
        self.path = path
        self.folder = files.Folder.open(path) if path.is_dir() else None
        self.by_client = by_client
        self._paths: dict[str, list[Path]] = {}  # the files of each split, as `find` named it
        self._client: dict[Path, str] = {}  # whose file it is
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
        if self.by_client is not None:
            clients = files_by_client(self.path, split, SPLITS, self.by_client.layout)
            self._client |= {path: client for client, paths in clients.items() for path in paths}
            if clients or split == "train":  # one file can be the test of all
                return list(chain.from_iterable(clients.values()))
        # So is a folder of parts without a split's name.
        return self.folder.files_of(split) or (files.parts_of(self.path) if split == "train" else [])

    def read(self, split: str) -> LocatedRows:
        together = files.Together(dict.fromkeys(path for paths in self._paths.values() for path in paths))
        if together.paths != self._together.paths:
            self._together = together
        for path in self._paths[split]:
            rows = files.read_file(path, self._together)
            yield from rows if self.by_client is None else self._of_client(path, rows, self.by_client.column)

    def _of_client(self, path: Path, rows: LocatedRows, column: str) -> LocatedRows:
        """The rows of a client's file, with its name. UserError where there are none."""
        client, is_empty = self._client.get(path, files.stem(path)), True
        for location, values in rows:
            is_empty = False
            if column in values:
                raise UserError(
                    f"{location}: data.client: there is a column '{column}' already; name another for the clients of "
                    "data.client_from, or leave data.client_from out"
                )
            yield location, ChainMap({column: client}, values)  # type: ignore[arg-type]  # nobody writes to it
        if is_empty:
            raise UserError(f"{path}: no row is in this file of the client '{client}'; take it away, or give it rows")


@dataclass(frozen=True)
class _Hub:
    """A data set of the Hugging Face hub, or one saved by the library `datasets`, which reads both."""

    name: str
    tables: Mapping[str, Any]  # for each split a datasets.Dataset, or where it is streamed an IterableDataset

    @classmethod
    def loaded(cls, name: str, subset: str | None, streaming: bool) -> _Hub:
        """The data set that the hub calls `name`. streaming: it is read as it comes, and not copied to this machine."""
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
            return cls(name, datasets.load_dataset(name, subset, streaming=streaming))
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
        table, prefix = self.tables[split], f"{self.name} {split} row "
        features = table.features or {}  # a stream may not say; names of classes it has where it does

        def read(name: str, piece: Any) -> list[Any]:
            values, feature = files.python_values(piece), features.get(name)
            if feature is None or not hasattr(feature, "int2str"):
                return values
            # Columns of class numbers give the names of their classes.
            return [feature.names[value] if value is not None and value >= 0 else value for value in values]

        if hasattr(table, "__len__"):

            def column(name: str) -> Any:
                return table.select_columns([name]).with_format("arrow")[:].column(name)

            yield from files.batches(table.column_names, len(table), column, prefix, read=read)
            return
        count, pieces = 0, iter(table.with_format("arrow").iter(AT_ONCE))
        while True:
            try:
                piece = next(pieces)
            except StopIteration:
                return
            except Exception as error:  # of the network or of a file there, in the library's own classes
                raise UserError(
                    f"{self.name} {split}: the stream breaks behind row {count}: {type(error).__name__}: {error}; run "
                    "the same command again, or leave data.streaming out, which copies the data set to this machine"
                ) from None
            yield from files.batches(piece.column_names, len(piece), piece.column, prefix, count, read)
            count += len(piece)


def _file_named(split: str, folder: Path | None) -> str | None:
    """The path of a split that is given as a file: in the source's folder, else in the current one; None if neither."""
    path = Path(os.path.expanduser(split))
    if not files.is_data_file(path):
        return None
    candidates = [path] if folder is None else [folder / path, path]
    return next((str(candidate) for candidate in candidates if candidate.is_file()), None)
