"""Reads data files: JSON, JSON lines, CSV, TSV, Parquet and Arrow, each also compressed; and finds those of a split.

Columns of Parquet and Arrow become Python values when they are first asked for, so the others may hold anything.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone, tzinfo
from functools import cached_property
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import numpy as np

from fedhpc.data.json_array import JsonArray
from fedhpc.data.rows import AT_ONCE
from fedhpc.data.values import CellKind
from fedhpc.errors import UserError

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow", ".feather")
COMPRESSED = (".gz", ".zst")
INSTALL = "pip install 'fedhpc[data]'"
REWRITE = (
    f"a data file ends in {', '.join(SUFFIXES)}, each with or without .gz or .zst: write yours as one of them, for "
    "instance with pandas: pandas.read_excel('train.xlsx').to_json('train.jsonl', orient='records', lines=True)"
)
_OF_MANY = re.compile(r"(?P<name>.+?)[-_.](?P<number>\d+)[-_]of[-_](?P<total>\d+)(-[0-9a-f]+)?")  # as the hub has them
_NUMBERED = re.compile(r"(?P<name>.*[^\d._-])[-_.](?P<number>\d+)")  # train-0, train_00001
_PART = re.compile(r"(?P<name>part)[-_.](?P<number>\d+).*")  # of Spark, Dask, pyarrow
_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_WITH_LINES = (".jsonl", ".json", *_DELIMITERS)
_PART_BYTES = 2**20  # of an uncompressed file that are read at once
_AT_ONCE = 2**12  # bytes that are uncompressed at once: of a stream that ends too early the last may be lost
_FIELD_LIMIT = 2**31 - 1  # characters of a cell; csv's own limit is 131,072

# Where a row was read ("train.csv:7", "builtin:dining train row 7") and its values by column.
LocatedRows = Iterator[tuple[str, Mapping[str, Any]]]


def is_data_file(path: Path) -> bool:
    """Whether a path has the ending of a file that can be read."""
    return _uncompressed(path).endswith(SUFFIXES)


def stem(path: Path) -> str:
    """The name of a file without its endings: that of its split."""
    name = _uncompressed(path)
    return name.removesuffix(Path(name).suffix)


def _uncompressed(path: Path) -> str:
    """The name of a file without the ending of its compression."""
    return path.name.removesuffix(path.suffix) if path.suffix in COMPRESSED else path.name


# ---- which files a split has


@dataclass(frozen=True)
class Folder:
    """The data files of a folder by the split they belong to.

    A split is a file (train.csv), a series of numbered files (train-00000-of-00002.parquet, train-0.jsonl) or a folder
    of files (train/, train.parquet/), as Spark and others leave it.
    """

    path: Path
    single: Mapping[str, list[Path]]  # by the whole name of the file
    series: Mapping[str, list[Path]]  # by the name in front of the numbers
    folders: Mapping[str, list[Path]]

    @classmethod
    def open(cls, path: Path) -> Folder:
        """Look through a folder, or through the folder `data` in it, where a copy of a hub's data set has its files."""
        outer, inner = cls._of(path), path / "data"
        return outer if outer.single or not inner.is_dir() else cls._of(inner)

    @classmethod
    def _of(cls, path: Path) -> Folder:
        single: dict[str, list[Path]] = {}
        series: dict[str, list[Path]] = {}
        folders: dict[str, list[Path]] = {}
        for entry in _entries(path):
            if entry.is_dir():
                if any(map(is_data_file, _entries(entry))) or _is_partitioned(entry):
                    folders.setdefault(stem(entry) if is_data_file(entry) else entry.name, []).append(entry)
            elif is_data_file(entry):
                single.setdefault(stem(entry), []).append(entry)
                match = _number_of(entry)
                if match is not None:
                    series.setdefault(match["name"], []).append(entry)
        return cls(path, single, series, folders)

    def splits(self) -> list[str]:
        """The names of the splits; numbered files go by the name of their series where they are one."""
        series = {name for name in self.series if name not in self.single and self._is_series(name)}
        parts = {path for name in series for path in self.series[name]}
        single = {name for name, paths in self.single.items() if not parts.issuperset(paths)}
        return sorted(single | series | set(self.folders))

    def files_of(self, split: str) -> list[Path]:
        """The files of a split in order; none where there is no such split. UserError where one is missing."""
        files, series, folders = (of.get(split, []) for of in (self.single, self.series, self.folders))
        of_many = [path for path in series if _OF_MANY.fullmatch(stem(path))]
        several = [*files, *of_many, *folders] if files else []
        if len(several) > 1:
            names = ", ".join(path.name + "/" * path.is_dir() for path in several)
            raise UserError(f"{self.path}: several files for the split '{split}': {names}; name one with its ending")
        if files:
            return files
        if self._is_series(split):
            return _in_order(series)
        if len(folders) > 1:
            names = ", ".join(path.name for path in folders)
            raise UserError(f"{self.path}: several folders for the split '{split}': {names}; name one as data.source")
        return all_of(folders[0]) if folders else []

    def _is_series(self, name: str) -> bool:
        """Whether the numbers of files are those of a series: years, for instance, are not."""
        matches = [match for path in self.series.get(name, []) if (match := _number_of(path))]
        return any(match.re is not _NUMBERED or int(match["number"]) <= 1 for match in matches)

    def rest(self) -> list[str]:
        """What else lies there and is not read."""
        return [path.name for path in _entries(self.path) if not is_data_file(path) and path.suffix not in (".md", "")]


def _is_partitioned(folder: Path) -> bool:
    """Whether a folder has its rows in folders by the value of a column, such as year=2024."""
    return any("=" in entry.name for entry in folders_in(folder))


def is_shard(path: Path) -> bool:
    """Whether a file calls itself one of several, like train-00000-of-00002.parquet."""
    match = _OF_MANY.fullmatch(stem(path)) if is_data_file(path) else None
    return match is not None and int(match["total"]) > 1


def numbered_beside(path: Path) -> list[str]:
    """The numbered files beside one without a number, which may be more of it or not: train_2.csv beside train.csv."""
    if not is_data_file(path) or not path.parent.is_dir():
        return []
    entries = [(entry, _number_of(entry)) for entry in _entries(path.parent) if is_data_file(entry)]
    return [entry.name for entry, match in entries if match is not None and match["name"] == stem(path)]


def parts_of(path: Path) -> list[Path]:
    """The files of a folder that is one split itself, as Spark leaves it: part-00000.snappy.parquet, ...; else none."""
    names = [entry for entry in _entries(path) if is_data_file(entry)]
    return all_of(path) if names and all(_PART.fullmatch(stem(name)) for name in names) else []


def folders_in(path: Path) -> list[Path]:
    """The folders in a folder, by name."""
    return [entry for entry in _entries(path) if entry.is_dir()]


def _entries(path: Path) -> list[Path]:
    """What a folder holds, without what is hidden and the marks of Spark (_SUCCESS)."""
    try:
        return sorted(entry for entry in path.iterdir() if not entry.name.startswith((".", "_")))
    except OSError as error:
        raise UserError(f"the folder {path} cannot be read: {error}", key="data.source") from None


def _number_of(path: Path) -> re.Match[str] | None:
    name = stem(path)
    return _OF_MANY.fullmatch(name) or _PART.fullmatch(name) or _NUMBERED.fullmatch(name)


def all_of(folder: Path, besides: Sequence[str] = ()) -> list[Path]:
    """All data files of a folder, in order, but those called as in `besides`. UserError where that may not be all."""
    if (folder / "_temporary").exists():
        raise UserError(f"{folder}: holds _temporary: the job that writes it has not ended; run it to its end")
    entries = [entry for entry in _entries(folder) if stem(entry) not in besides]
    within = [entry.name for entry in entries if entry.is_dir()]
    if within:
        raise UserError(
            f"{folder}: holds folders ({', '.join(within[:3])}), whose rows would be left out; write it again without "
            "partitions, as files in one folder"
        )
    files = [entry for entry in entries if is_data_file(entry)]
    strange = [entry.name for entry in entries if not is_data_file(entry) and entry.suffix not in (".md", ".crc", "")]
    if strange:
        raise UserError(f"{folder}: holds {', '.join(strange[:3])} beside data files; {REWRITE}")
    complete = (folder / "_SUCCESS").exists()  # Spark writes no file for a part without rows
    numbered = all((match := _number_of(path)) and match.re is not _NUMBERED for path in files)
    return _in_order(files) if files and numbered and not complete else files


def _in_order(files: Sequence[Path]) -> list[Path]:
    """The numbered files of a series, by their numbers. UserError where one is missing, or stands there twice."""
    first = files[0]
    by_number: dict[int, Path] = {}
    totals = set()
    for path in files:
        match = _number_of(path)
        assert match is not None
        number = int(match["number"])
        if number in by_number:
            both = f"{by_number[number].name} and {path.name}"
            raise UserError(f"{first.parent}: two files with one number: {both}; keep one of them")
        by_number[number] = path
        totals.add(int(match["total"]) if match.re is _OF_MANY else None)
    if len(totals) > 1:
        names = ", ".join(path.name for path in files[:4])
        raise UserError(f"{first.parent}: files of several series: {names}; keep the files of one")
    total = totals.pop()
    begin = min(min(by_number), 1) if total is None else int(total in by_number)
    numbers = range(begin, max(by_number) + 1 if total is None else begin + total)
    missing = [_renumbered(first, number) for number in numbers if number not in by_number]
    if missing:
        raise UserError(
            f"{first.parent}: {', '.join(missing[:4])}{', ...' * (len(missing) > 4)} missing: {len(by_number)} of "
            f"{len(numbers)} files are there; copy the rest, or join those that are there to one file"
        )
    return [by_number[number] for number in numbers]


def _renumbered(path: Path, number: int) -> str:
    """The name of a numbered file with another number, as wide as its own."""
    match = _number_of(path)
    assert match is not None
    begin, end = match.span("number")
    return f"{path.name[:begin]}{number:0{end - begin}}{path.name[end:]}"


# ---- what is in a file


def read_file(path: Path, together: Together | None = None) -> LocatedRows:
    """The rows of a data file. UserError with file and row.

    together: the files among which a column of CSV has values of one kind.
    """
    if not is_data_file(path):
        raise UserError(f"{path}: {REWRITE}")
    suffix = _suffix(path)
    if suffix in _DELIMITERS:
        return _read_csv(path, together)
    if suffix == ".jsonl":
        return _read_jsonl(path, _lines(path))
    if suffix == ".json":
        return _read_json(path)
    return (_read_parquet if suffix == ".parquet" else _read_arrow)(path)


def _content(path: Path) -> bytes:
    """What is in a data file, uncompressed. UserError where it ends too early, with the last line that it has."""
    return b"".join(_parts(path))


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a data file, which is read as they are asked for."""
    begun: list[bytes] = []  # the parts of a line whose end has not come
    for part in _parts(path):
        first, *others = part.split(b"\n")
        begun.append(first)
        if others:
            yield b"".join(begun)
            yield from others[:-1]
            begun = others[-1:]
    yield b"".join(begun)


def _parts(path: Path) -> Iterator[bytes]:
    """What is in a data file, uncompressed, part by part. UserError where it ends too early."""
    lines = 0
    try:
        with open(path, "rb") if path.suffix not in COMPRESSED else _uncompressing(path) as stream:
            while part := stream.read1(_AT_ONCE if path.suffix in COMPRESSED else _PART_BYTES):
                lines += part.count(10)  # the line feed
                yield part
    except (EOFError, OSError, zlib.error) as error:
        behind = f" behind line {lines}" if lines and _suffix(path) in _WITH_LINES else ""
        raise UserError(f"{path}: cannot be read{behind}: {error}", remedy="copy or write the file again") from None


def _opened(path: Path) -> Any:
    """A data file for Arrow to read from; what is in a compressed one is held in memory."""
    pyarrow = _arrow(path)
    try:
        return pyarrow.BufferReader(_content(path)) if path.suffix in COMPRESSED else pyarrow.OSFile(str(path))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error}", remedy="copy or write the file again") from None


def _uncompressing(path: Path) -> Any:
    """A compressed file as a stream of what is in it."""
    return gzip.open(path) if path.suffix == ".gz" else _arrow(path).input_stream(str(path), compression="zstd")


def _suffix(path: Path) -> str:
    return Path(_uncompressed(path)).suffix


def _arrow(path: Path) -> Any:
    """The library pyarrow. UserError where it is not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading {path.suffix} needs the library pyarrow: {INSTALL}") from None
    return pyarrow


def _read_jsonl(path: Path, lines: Iterable[bytes]) -> LocatedRows:
    for number, line in enumerate(lines, 1):
        if content := line.rstrip():
            location = f"{path}:{number}"
            yield location, _object(_parsed(content, location), location)


def _read_json(path: Path) -> LocatedRows:
    """One array of objects; a file with an object in each line is read as JSON lines are."""
    array = JsonArray(_parts(path), str(path))
    if array.begins():
        for number, row in enumerate(array, 1):
            yield f"{path} row {number}", _object(row, f"{path} row {number}")
        return
    lines = filter(bytes.strip, _lines(path))
    if not _is_json(next(lines, b"")) or next(lines, None) is None:
        content = _content(path)
        if _is_json(content):
            value = json.loads(content)
            keys = f" with the keys {', '.join(map(str, list(value)[:5]))}" if isinstance(value, dict) else ""
            raise UserError(
                f"{path}: holds one {type(value).__name__}{keys}; it must be an array of rows, [{{...}}, ...], or "
                "have a row in each line: write it again with pandas' to_json(..., orient='records')"
            )
    yield from _read_jsonl(path, _lines(path))


def _is_json(content: bytes) -> bool:
    """Whether this is one value of JSON that can be read."""
    try:
        json.loads(content)
    except (ValueError, RecursionError):
        return False
    return True


def _parsed(content: bytes, location: str) -> Any:
    try:
        return json.loads(content)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""
        raise UserError(f"{location}: not valid JSON: {error.msg} at {line}column {error.colno}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{location}: not valid JSON: {error}") from None


def _object(row: Any, location: str) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise UserError(f"{location}: must be a JSON object of columns, got {type(row).__name__}")
    return row


def _read_csv(path: Path, together: Together | None) -> LocatedRows:
    kinds = (together if together is not None and path in together.paths else Together([path])).kinds
    for header, rows, locations in _csv_rows(path):

        def values(name: str, header: list[str] = header, rows: list[list[str]] = rows) -> list[Any]:
            number = header.index(name)
            return kinds[name].values(cells[number] for cells in rows)

        yield from Columns(header, values).rows(locations)


class Together:
    """The files of all splits, among which a column of CSV is numbers, booleans or texts as one.

    Else True in one file would be another class than True in the next, which has a word as well.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self.paths = [path for path in paths if _suffix(path) in _DELIMITERS]

    @cached_property
    def kinds(self) -> dict[str, CellKind]:
        """What the cells of each column are, in all files."""
        kinds: dict[str, CellKind] = {}
        for path in self.paths:
            for header, rows, _ in _csv_rows(path):
                for name, cells in zip(header, zip(*rows, strict=True), strict=False):
                    kinds.setdefault(name, CellKind()).add(cells)
        return kinds


def _csv_rows(path: Path) -> Iterator[tuple[list[str], list[list[str]], list[str]]]:
    """The header of a CSV file, some of its rows, and where each is, until there are no more rows."""
    csv.field_size_limit(_FIELD_LIMIT)
    reader = csv.reader(_csv_lines(path), strict=True, delimiter=_DELIMITERS[_suffix(path)])
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise UserError(f"{path}:1: a column name stands twice in the header: {', '.join(header)}")
        line, locations, rows = reader.line_num + 1, list[str](), list[list[str]]()
        for cells in reader:
            if cells:
                if len(cells) != len(header):
                    raise UserError(f"{path}:{line}: {len(cells)} cells, but {len(header)} columns in the header")
                locations.append(f"{path}:{line}")
                rows.append(cells)
                if len(rows) == AT_ONCE:
                    yield header, rows, locations
                    locations, rows = [], []
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not valid CSV: {error}") from None
    if rows:
        yield header, rows, locations


def _csv_lines(path: Path) -> Iterator[str]:
    """The lines of a CSV file with their ends, each of which is a line feed, a carriage return, or both."""
    for number, line in enumerate(_with_ends(_lines(path)), 1):
        try:
            decoded = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}:{number}: not UTF-8 text: {error.reason}") from None
        if decoded.count("\r") > decoded.endswith(("\r", "\r\n")):
            yield from io.StringIO(decoded, newline="")
        else:
            yield decoded


def _with_ends(lines: Iterable[bytes]) -> Iterator[bytes]:
    """Lines with the line feed behind each but the last, which is left out where it is empty."""
    before: bytes | None = None
    for line in lines:
        if before is not None:
            yield before + b"\n"
        before = line
    if before:
        yield before


def _read_parquet(path: Path) -> LocatedRows:
    pyarrow, opened = _arrow(path), _opened(path)
    try:
        file = pyarrow.parquet.ParquetFile(opened)
        names, groups = file.schema_arrow.names, file.num_row_groups
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path}: not a valid parquet file: {error}") from None

    def reader(group: int) -> Callable[[str], Any]:
        def column(name: str) -> Any:
            _refuse_twice(path, names, name)
            try:
                return file.read_row_group(group, columns=[name]).column(name)
            except (pyarrow.ArrowException, OSError) as error:
                raise UserError(f"{path}: the column '{name}' cannot be read: {error}") from None

        return column

    before = 0
    for group in range(groups):
        count = file.metadata.row_group(group).num_rows
        yield from batches(names, count, reader(group), f"{path} row ", before)
        before += count


def _read_arrow(path: Path) -> LocatedRows:
    """Arrow's own file format, which Feather is too, or a stream of it, as `datasets` writes."""
    pyarrow, opened, before = _arrow(path), _opened(path), 0
    try:
        if opened.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(opened)
            record_batches = (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            opened.seek(0)
            record_batches = file = pyarrow.ipc.open_stream(opened)
        names = file.schema.names
        for batch in record_batches:

            def column(name: str, batch: Any = batch) -> Any:
                _refuse_twice(path, names, name)
                return batch.column(names.index(name))

            yield from batches(names, batch.num_rows, column, f"{path} row ", before)
            before += batch.num_rows
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(
            f"{path} row {before + 1}: not valid Arrow: {error}", remedy="copy or write the file again"
        ) from None


def _refuse_twice(path: Path, names: Sequence[str], name: str) -> None:
    if names.count(name) > 1:
        raise UserError(f"{path}: {names.count(name)} columns are called '{name}'; rename them")


# ---- columns, read where they are used


class Columns:
    """Columns of a table, each turned into values when a row is first asked for one."""

    def __init__(self, names: Sequence[str], values: Callable[[str], list[Any]]) -> None:
        """values: the values of a column by its name. An exception among them is of a value that Python cannot hold."""
        self.names, self._values = dict.fromkeys(names), values
        self._read: dict[str, list[Any]] = {}

    def rows(self, locations: Iterable[str]) -> LocatedRows:
        """All rows, which are at these locations."""
        for number, location in enumerate(locations):
            yield location, _Row(self, number, location)

    def __getitem__(self, name: str) -> list[Any]:
        if name not in self._read:
            self._read[name] = self._values(name)
        return self._read[name]


@dataclass
class _Row(Mapping[str, Any]):
    columns: Columns
    number: int
    location: str

    def __getitem__(self, name: str) -> Any:
        """A value. UserError where Python cannot hold it."""
        if name not in self.columns.names:
            raise KeyError(name)
        value = self.columns[name][self.number]
        if isinstance(value, Exception):
            message = f"the column '{name}' holds a value that Python has not: {value}"
            raise UserError(message, place=self.location, remedy="change it, or use another column") from None
        return value

    def __contains__(self, name: object) -> bool:
        return name in self.columns.names

    def __iter__(self) -> Iterator[str]:
        return iter(self.columns.names)

    def __len__(self) -> int:
        return len(self.columns.names)


def batches(
    names: Sequence[str],
    count: int,
    column: Callable[[str], Any],
    prefix: str,
    before: int = 0,
    read: Callable[[str, Any], list[Any]] | None = None,
) -> LocatedRows:
    """The rows of a table of Arrow, of which few are Python values at a time.

    column: a column of it by its name, which is asked for once. prefix: what stands in front of a row's number, in
    which `before` rows have been counted already. read: the values of a piece of the column of that name.
    """
    known: dict[str, Any] = {}
    for start in range(0, count, AT_ONCE):

        def values(name: str, start: int = start) -> list[Any]:
            if name not in known:
                known[name] = column(name)
            piece = known[name].slice(start, AT_ONCE)
            return python_values(piece) if read is None else read(name, piece)

        numbers = range(before + start + 1, before + min(start + AT_ONCE, count) + 1)
        yield from Columns(names, values).rows(f"{prefix}{number}" for number in numbers)


def python_values(column: Any) -> list[Any]:
    """The values of a column of Arrow; an exception stands where Python has no such value, like a date in year 10000.

    Narrow floats stay as narrow as they are, since their text is that of their width. Times in nanoseconds, which
    Python has not, are texts: the same ones with and without pandas.
    """
    import pyarrow

    if pyarrow.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    written = _of_nanoseconds(column.type)
    if written is not None:
        return [_each(written, nanoseconds) for nanoseconds in column.cast(pyarrow.int64()).to_pylist()]
    try:
        values = column.to_pylist()
    except Exception:  # of a single value: whichever it is, the others are right
        values = [_each(lambda scalar: scalar.as_py(), scalar) for scalar in column]
    for narrow, width in ((np.float16, pyarrow.float16()), (np.float32, pyarrow.float32())):
        if column.type == width:
            return [None if value is None else narrow(value) for value in values]
        if pyarrow.types.is_list(column.type) and column.type.value_type == width:
            return [value and [None if item is None else narrow(item) for item in value] for value in values]
    return values


def _each(read: Callable[[Any], Any], value: Any) -> Any:
    try:
        return None if value is None else read(value)
    except Exception as error:  # pyarrow raises anything, from OverflowError to its own classes
        return error


def _of_nanoseconds(dtype: Any) -> Callable[[int], str] | None:
    """How numbers of a type of Arrow are written, if they count nanoseconds.

    As Python writes times, with nine digits where they are needed.
    """
    import pyarrow

    if getattr(dtype, "unit", "") != "ns":
        return None
    if pyarrow.types.is_duration(dtype):
        return lambda ns: str(timedelta(seconds=ns // 10**9)) + _fraction(ns)
    if pyarrow.types.is_time(dtype):
        return lambda ns: _moment(ns, None)[11:]
    return lambda ns: _moment(ns, dtype.tz)


def _moment(nanoseconds: int, zone: str | None) -> str:
    """A time since 1970."""
    moment = datetime(1970, 1, 1) + timedelta(seconds=nanoseconds // 10**9)
    if zone is not None:
        moment = moment.replace(tzinfo=timezone.utc).astimezone(_zone(zone))
    seconds, offset = str(moment)[:19], str(moment)[19:]
    return f"{seconds}{_fraction(nanoseconds)}{offset}"


def _fraction(nanoseconds: int) -> str:
    rest = nanoseconds % 10**9
    if rest % 1000:
        return f".{rest:09}"
    return f".{rest // 1000:06}" if rest else ""


def _zone(name: str) -> tzinfo:
    """The time zone that Arrow calls so: of the tz database, or an offset like +05:30."""
    offset = re.fullmatch(r"([+-])(\d\d):(\d\d)", name)
    if offset is None:
        return ZoneInfo(name)
    minutes = int(offset[2]) * 60 + int(offset[3])
    return timezone(timedelta(minutes=-minutes if offset[1] == "-" else minutes))
