"""Folders as tools leave them: all of a data set is read, or it is refused in one line that says what is there."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.feather
import pyarrow.parquet as pq
import pytest

from fedhpc.data import group_references
from fedhpc.errors import UserError
from tests.test_data import load, rows, write_jsonl

WHOLE = rows(30)


def _parts(folder: Path, names: Sequence[str], table: Sequence[dict[str, str]] = WHOLE) -> Path:
    """The rows as files of these names, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(table) // len(names))
    for number, name in enumerate(names):
        part = table[number * size : (number + 1) * size]
        arrow = pa.Table.from_pylist(part)
        if ".parquet" in name:
            pq.write_table(arrow, folder / name)
        elif ".arrow" in name:
            new = pa.ipc.new_stream if "stream" in str(folder) else pa.ipc.new_file
            with new(folder / name, arrow.schema) as writer:
                writer.write_table(arrow, max_chunksize=7)
        elif ".feather" in name:
            pyarrow.feather.write_feather(arrow, folder / name)
        elif ".csv" in name or ".tsv" in name:
            text = pandas.DataFrame(part).to_csv(index=False, sep="\t" if ".tsv" in name else ",")
            with pa.output_stream(folder / name, compression="detect") as file:
                file.write(text.encode())
        elif ".jsonl" in name:
            write_jsonl(folder / name, part)
        else:
            (folder / name).write_text(json.dumps(part))
    return folder


@pytest.fixture(scope="module")
def one_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The fingerprint of the same rows in one file."""
    return load(write_jsonl(tmp_path_factory.mktemp("one") / "train.jsonl", WHOLE)).fingerprint


HUB = ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"]
LAYOUTS: dict[str, tuple[str, Sequence[str], str]] = {
    "shards": ("snap", HUB, "snap"),
    "shards in data": ("snap/data", HUB, "snap"),
    "shards in data, named": ("snap/data", HUB, "snap/data"),
    "shards with a hash": ("d", [f"train-0000{i}-of-00003-a09b74b3ef9c3b5{i}.parquet" for i in range(3)], "d"),
    "shards from 1": ("d", ["train-1-of-2.jsonl", "train-2-of-2.jsonl"], "d"),
    "twelve shards": ("d", [f"train-{i}-of-12.jsonl.gz" for i in range(12)], "d"),
    "numbered files": ("d", ["train_0.csv", "train_1.csv", "train_2.csv"], "d"),
    "eleven without a zero": ("d", [f"train-{i}.jsonl" for i in range(1, 12)], "d"),
    "Spark": ("s/train.parquet", [f"part-0000{i}-1b3c.c000.snappy.parquet" for i in (0, 1, 3)], "s"),
    "Spark, named": (
        "s/train.parquet",
        [f"part-0000{i}-1b3c.c000.snappy.parquet" for i in (0, 1, 3)],
        "s/train.parquet",
    ),
    "Spark's JSON": ("s/train", ["part-00000.jsonl", "part-00001.jsonl"], "s"),
    "a folder for a split": ("d/train", ["a.jsonl", "b.jsonl"], "d"),
    "an array": ("d", ["train.json"], "d"),
    "an array, named": ("d", ["alpaca.json"], "d/alpaca.json"),
    "arrays": ("d", ["train-0-of-2.json", "train-1-of-2.json"], "d"),
    "tabs": ("d", ["train.tsv"], "d"),
    "tabs, compressed": ("d", ["train-1-of-2.tsv.gz", "train-2-of-2.tsv.zst"], "d"),
    "zst": ("d", ["train.csv.zst"], "d/train.csv.zst"),
    "Arrow": ("d", ["train.arrow"], "d"),
    "a stream of Arrow": ("stream", ["train-00000-of-00002.arrow", "train-00001-of-00002.arrow"], "stream"),
    "Feather": ("d", ["train.feather"], "d/train.feather"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_all_of_a_split_is_read(tmp_path: Path, one_file: str, name: str) -> None:
    folder, names, source = LAYOUTS[name]
    _parts(tmp_path / folder, names)
    if "Spark" in name:
        (tmp_path / folder / "_SUCCESS").touch()
        (tmp_path / folder / ".part-00000-1b3c.c000.snappy.parquet.crc").write_bytes(b"x")
    assert load(tmp_path / source).fingerprint == one_file


@pytest.mark.parametrize("name", ["d.json", "d.json.gz"])
def test_json_is_an_array_or_lines(tmp_path: Path, one_file: str, name: str) -> None:
    for content in (json.dumps(WHOLE, indent=2), "\n".join(map(json.dumps, WHOLE))):
        (tmp_path / name).write_bytes(gzip.compress(content.encode()) if "gz" in name else content.encode())
        assert load(tmp_path / name).fingerprint == one_file


def test_what_datasets_saves_to_disk(tmp_path: Path, one_file: str) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(WHOLE)
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table}).save_to_disk(tmp_path / "splits")
    table.filter(lambda row: True).select(range(30)).save_to_disk(tmp_path / "chosen", num_shards=3)
    assert {load(tmp_path / name).fingerprint for name in ("one", "splits", "chosen")} == {one_file}
    with pytest.raises(UserError, match=r"no split or file 'dev'; it has: train"):
        load(tmp_path / "splits", validation="dev")
    (tmp_path / "splits" / "train" / "data-00000-of-00001.arrow").unlink()
    with pytest.raises(UserError, match=r"splits: cannot be read as what datasets' save_to_disk writes"):
        load(tmp_path / "splits")


def test_shards_name_their_rows(tmp_path: Path) -> None:
    table = [{**row, "a": "" if i == 20 else row["a"]} for i, row in enumerate(WHOLE)]
    with pytest.raises(UserError, match=r"train-00001-of-00002\.parquet row 6: data\.target is empty"):
        load(_parts(tmp_path, HUB, table), target="{a}")


@pytest.mark.parametrize("source", ["d", f"d/{HUB[0]}"])
def test_one_shard_by_name_is_said(tmp_path: Path, source: str) -> None:
    _parts(tmp_path / "d", HUB)
    options = {"train": "train-00000-of-00002"} if source == "d" else {}
    data = load(tmp_path / source, **options)
    assert len(data.train) == 13
    assert data.messages[0].startswith(f"data.train: {tmp_path}/d/{HUB[0]} is one of several files; the others are not")
    assert not any("several" in message for message in load(tmp_path / "d").messages)


def test_a_file_beside_numbered_ones_is_the_split(tmp_path: Path, one_file: str) -> None:
    _parts(tmp_path, ["train.jsonl"])
    _parts(tmp_path, ["train_100.jsonl", "train_1.jsonl"])  # samples of it
    data = load(tmp_path)
    assert data.fingerprint == one_file
    said = f"data.train: {tmp_path}/train.jsonl is the split; train_1.jsonl, train_100.jsonl beside it, with a number,"
    assert any(message == f"{said} is not read" for message in data.messages)
    assert not any("with a number" in message for message in load(tmp_path / "train.jsonl").messages)


REFUSED: dict[str, tuple[dict[str, Sequence[str]], str, dict[str, Any], str]] = {
    "the last shard": ({"d": HUB[:1]}, "d", {}, r"d: train-00001-of-00002\.parquet missing: 1 of 2 files are there"),
    "the first shard": ({"d": HUB[1:]}, "d", {}, r"d: train-00000-of-00002\.parquet missing"),
    "many": ({"d": ["train-0-of-9.csv"]}, "d", {}, r"train-1-of-9\.csv, train-2-of-9\.csv, .*, \.\.\. missing: 1 of 9"),
    "one of a row": ({"d": ["train-0.csv", "train-2.csv"]}, "d", {}, r"d: train-1\.csv missing: 2 of 3 files"),
    "a part": ({"d/train": ["part-0.csv", "part-2.csv"]}, "d", {}, r"train: part-1\.csv missing: 2 of 3 files"),
    "two series": ({"d": [*HUB, "train-00000-of-00003.parquet"]}, "d", {}, r"two files with one number"),
    "two totals": ({"d": [HUB[0], "train-00001-of-00003.parquet"]}, "d", {}, r"files of several series"),
    "two endings": ({"d": ["train-0-of-1.csv", "train-0-of-1.jsonl"]}, "d", {}, r"two files with one number"),
    "shards and a file": ({"d": [*HUB, "train.csv"]}, "d", {}, r"several files .* 'train': train\.csv, train-0"),
    "a file and a folder of its name": (
        {"d": ["train.csv"], "d/train": ["x.csv"]}, "d", {}, r"'train': train\.csv, train/; name one with its ending",
    ),
    "years": ({"d": ["train_2019.csv", "train_2020.csv"]}, "d", {}, r"it has: train_2019, train_2020"),
    "a split's shards": ({"d": [*HUB, "dev-0-of-2.csv"]}, "d", {}, r"d: dev-1-of-2\.csv missing"),
    "a file and a folder": (
        {"d": ["a.csv"], "d/test": ["x.csv"]}, "d", {"test": "tests"}, r"data\.train: .* it has: a, test",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_half_a_data_set_is_refused(tmp_path: Path, name: str) -> None:
    folders, source, options, message = REFUSED[name]
    for folder, names in folders.items():
        _parts(tmp_path / folder, names)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / source, **options)
    assert "\n" not in str(error.value)


def test_a_job_of_spark_that_has_not_ended(tmp_path: Path) -> None:
    (_parts(tmp_path / "train.parquet", ["part-00000.parquet"]) / "_temporary").mkdir()
    with pytest.raises(UserError, match=r"train\.parquet: holds _temporary: the job that writes it has not ended"):
        load(tmp_path)


def test_partitions_in_folders(tmp_path: Path) -> None:
    _parts(tmp_path / "train.parquet", ["part-0.parquet"])
    _parts(tmp_path / "train.parquet" / "year=2024", ["part-0.parquet"])
    with pytest.raises(UserError, match=r"train\.parquet: holds folders \(year=2024\), whose rows would be left out"):
        load(tmp_path)
    (tmp_path / "train.parquet" / "part-0.parquet").unlink()
    with pytest.raises(UserError, match=r"train\.parquet: holds folders \(year=2024\), whose rows would be left out"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.xlsx", "", r"nothing that is read, but train\.xlsx; a data file ends in .*read_excel"),
        ("train.jsonl.xz", "", r"nothing that is read, but train\.jsonl\.xz; a data file ends in"),
        ("train.tsv", "q\ta\nx\ty\tz\n", r"train\.tsv:2: 3 cells, but 2 columns in the header"),
        ("train.arrow", "ARROW1", r"train\.arrow row 1: not valid Arrow"),
        ("train.jsonl.zst", "{}", r"train\.jsonl\.zst: cannot be read"),
        (
            "train.json",
            '{"version": 1, "data": []}',
            r"train\.json: holds one dict with the keys version, data; it must",
        ),
        ("train.json", "[1]", r"train\.json row 1: must be a JSON object of columns, got int"),
        ("train.json", '[{"q": "x"},\n {"q": }]', r"train\.json: not valid JSON: .* at line 2, column 8"),
        ("train.json", "[]", r"train\.json: the split has no rows"),
    ],
)
def test_other_files_are_refused_with_a_way_on(tmp_path: Path, name: str, content: str, message: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path)
    assert "\n" not in str(error.value)
    if name == "train.xlsx":
        with pytest.raises(UserError, match=r"train\.xlsx: a data file ends in"):
            load(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train.jsonl.gz", r"train\.jsonl\.gz: cannot be read behind line (\d+): Compressed file ended before"),
        ("train.tsv.zst", r"train\.tsv\.zst: cannot be read behind line (\d+): Truncated compressed stream"),
        ("train.arrow", r"train\.arrow row (\d+): not valid Arrow: Expected to be able to read"),
    ],
)
def test_streams_that_end_name_the_last_row(tmp_path: Path, name: str, message: str) -> None:
    numbers = np.random.default_rng(0).integers(10**9, size=40_000)  # more than one block of zst
    table = [{"q": f"q{number}", "a": "x"} for number in numbers]
    path = _parts(tmp_path / "stream", [name], table) / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / "stream")
    assert "\n" not in str(error.value)
    row = int(re.search(message, str(error.value))[1])  # type: ignore[index]
    assert 0.2 < row / len(table) < 0.7


BY_CLIENT: dict[str, tuple[str, dict[str, str], str]] = {
    "files": ("file", {"north": "train/north.jsonl", "south": "train/south.csv"}, "test.jsonl"),
    "files alone": ("file", {"north": "north.parquet", "south": "south.jsonl.gz"}, "test.tsv"),
    "folders of splits": ("folder", {"north": "north/train.jsonl", "south": "south/train.csv"}, "south/test.csv"),
    "folders in a split": (
        "folder",
        {"north": "train/north/a.jsonl", "south": "train/south/b.csv"},
        "test/north/a.csv",
    ),
    "folders alone": ("folder", {"north": "north/a.jsonl", "south": "south/b.arrow"}, "test/all.jsonl"),
    "one test": ("folder", {"north": "north/a.jsonl", "south": "south/b.jsonl"}, "test.jsonl"),
}
NATURAL = {"client": "k", "partition": {"name": "natural"}}


@pytest.mark.parametrize("name", BY_CLIENT)
def test_the_name_of_a_file_or_folder_is_the_client(tmp_path: Path, name: str) -> None:
    layout, files, test = BY_CLIENT[name]
    plain = [{"q": row["q"], "a": row["a"]} for row in WHOLE]
    parts = {"north": plain[:11], "south": plain[11:]}
    for client, file in files.items():
        _parts((tmp_path / "d" / file).parent, [Path(file).name], parts[client])
    _parts((tmp_path / "d" / test).parent, [Path(test).name], plain[:4])
    owned = [{**row, "k": client} for client in parts for row in parts[client]]
    _parts(tmp_path / "one", ["train.jsonl", "test.jsonl"], owned)
    write_jsonl(tmp_path / "one" / "train.jsonl", owned)
    write_jsonl(tmp_path / "one" / "test.jsonl", plain[:4])
    data, expected = load(tmp_path / "d", client_from=layout, **NATURAL), load(tmp_path / "one", **NATURAL)
    assert data.fingerprint == expected.fingerprint
    assert data.population.names == ["north", "south"]


WRONG_CLIENTS: dict[str, tuple[str, dict[str, list[dict[str, str]]], str]] = {
    "empty": ("file", {"train/a.jsonl": WHOLE, "train/b.jsonl": []}, r"train/b\.jsonl: no row is in this file of the"),
    "one name": ("file", {"a.jsonl": WHOLE, "a.csv": WHOLE}, r"a\.csv and a\.jsonl would be one client, 'a'; join"),
    "no train": ("folder", {"a/train.csv": WHOLE, "b/test.csv": WHOLE}, r"d/b: has no data for the split 'train'"),
    "no folders": ("folder", {"a.csv": WHOLE}, r"data\.train: .* has no split or file 'train'"),
    "a column": ("file", {"a.jsonl": WHOLE}, r"a\.jsonl:1: data\.client: there is a column 'k' already; name another"),
    "folders in it": ("file", {"train/a/x.csv": WHOLE}, r"data\.train: .* has no split or file 'train'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_CLIENTS)
def test_files_of_clients_that_are_wrong(tmp_path: Path, name: str) -> None:
    layout, files, message = WRONG_CLIENTS[name]
    for file, table in files.items():
        rows_ = table if name == "a column" else [{"q": row["q"], "a": row["a"]} for row in table]
        _parts((tmp_path / "d" / file).parent, [Path(file).name], rows_)
    with pytest.raises(UserError, match=message) as error:
        load(tmp_path / "d", client_from=layout, **NATURAL)
    assert "\n" not in str(error.value)


def test_one_file_is_no_folder_of_clients(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", WHOLE)
    with pytest.raises(UserError, match=r"data\.client_from file is for a folder of data files, which data\.source"):
        load(tmp_path / "train.jsonl", client_from="file", client="c")
    with pytest.raises(
        UserError, match=r"data\.client_from file makes a column of the clients' names: say with data\.cl"
    ):
        load(tmp_path, client_from="file")


@pytest.mark.parametrize("name", ["train.jsonl", "train.parquet", "train.json"])
def test_nested_columns_and_lists_of_references(tmp_path: Path, name: str) -> None:
    """As SQuAD has them: the same as a row for each reference."""
    nested: list[dict[str, Any]] = [
        {"q": f"q{i}", "x": {"a": {"text": [f"a{i}", "b"][: 1 + i % 2], "start": [1]}, "k": "pq"[i % 2]}}
        for i in range(20)
    ]
    flat = [
        {"q": row["q"], "a": text, "k": row["x"]["k"]} for row in nested for text in row["x"]["a"]["text"]
    ]  # fmt: skip
    for folder, table in (("nested", nested), ("flat", flat)):
        _parts(tmp_path / folder, [name], table)
        write_jsonl(tmp_path / folder / "test.jsonl", table[:6])
    data = load(tmp_path / "nested", target=" {x.a.text}", label="x.k", where={"x.k": ["p", "q"]})
    flattened = load(tmp_path / "flat", target=" {a}", label="k")
    assert (data.train.fingerprint, data.validation.fingerprint) == (
        flattened.train.fingerprint, flattened.validation.fingerprint,
    )  # fmt: skip
    assert group_references(data.test)[1] == (1, [" a1", " b"])


def test_lists_of_dicts_and_missing_dicts(tmp_path: Path) -> None:
    table = [{"q": "x", "a": [{"text": "u"}, {"text": "v"}]}, {"q": "y", "a": [{"text": "w"}]}, {"q": "z", "a": None}]
    write_jsonl(tmp_path / "train.jsonl", table * 4)
    with pytest.raises(UserError, match=r"train\.jsonl:3: data\.target is empty here; leave the row out with"):
        load(tmp_path, target="{a.text}")
    data = load(tmp_path, target="{a.text}", where_not={"a.text": [""]}, validation="train", test="train")
    assert data.test.targets == ["u", "v", "w"] * 4
    with pytest.raises(UserError, match=r"train\.jsonl:1: .* 'a\.txt', which is not there; did you mean 'a\.text'\?"):
        load(_parts(tmp_path / "b", ["train.jsonl"], [{"q": "x", "a": {"text": "u"}}]), target="{a.txt}")  # type: ignore[list-item]
    uneven = [{"q": ["x", "y"], "a": ["x"], "b": ["y", "z"]}]
    write_jsonl(tmp_path / "train.jsonl", uneven)
    with pytest.raises(
        UserError, match=r"train\.jsonl:1: data\.target: the lists in its columns a, b differ in length"
    ):
        load(tmp_path, prompt="x", target="{a} {b}")


def test_keys_that_rows_lack_are_empty_where_that_is_said(tmp_path: Path) -> None:
    lacking = [{"q": f"q{i}", "a": "x", **({"more": "m"} if i % 3 else {}), "k": "c"} for i in range(12)]
    write_jsonl(tmp_path / "train.jsonl", lacking)
    (tmp_path / "null").mkdir()
    write_jsonl(tmp_path / "null" / "train.jsonl", [{"more": None, **row} for row in lacking])
    data = load(tmp_path, prompt="{q} {more}", missing="empty")
    nulls = load(tmp_path / "null", prompt="{q} {more}")
    assert data.fingerprint == nulls.fingerprint
    assert [line.replace("/null", "") for line in nulls.messages] == data.messages
    assert any("data.prompt" in line and "2 more of 10 rows have no 'more'" in line for line in data.messages)
    with pytest.raises(UserError, match=r"train\.jsonl:1: data\.prompt names the column 'mroe', which is not there"):
        load(tmp_path, prompt="{q} {mroe}", missing="empty")
    with pytest.raises(
        UserError, match=r"train\.jsonl:1: data\.label: the column 'more' has no value here, nor in 2 more"
    ):
        load(tmp_path, label="more", missing="empty")
    for first in (0, 1):  # a row that lacks the key, and one that has it
        with pytest.raises(UserError, match=r"or set data\.missing to empty"):
            load(_parts(tmp_path / f"from_{first}", ["train.jsonl"], lacking[first:]), prompt="{q} {more}")


def test_optional_keys_and_lists_say_what_to_do(tmp_path: Path) -> None:
    """Case 6."""
    table: list[dict[str, Any]] = [{"q": "x", "more": "m", "a": "red"}, {"q": "x", "a": ["red", "crimson"]}]
    write_jsonl(tmp_path / "train.jsonl", table * 9)
    with pytest.raises(UserError, match=r"train\.jsonl:2: data\.prompt .* 'more', which is not there; .* write null"):
        load(tmp_path, prompt="{q} {more}", target="x")
    with pytest.raises(UserError, match=r"train\.jsonl:2: data\.label: .* a list of 2: give each its own row, or join"):
        load(tmp_path, label="a")
    chat = [{"q": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "a": {"text": ["x"]}}]
    write_jsonl(tmp_path / "train.jsonl", chat * 9)
    with pytest.raises(UserError, match=r"data\.prompt: the column 'q' holds a chat of 2 turns: write it as a text"):
        load(tmp_path, target="x")
    with pytest.raises(UserError, match=r"data\.target: .* a dict of 1 \(text\): name what is used of it with a dot"):
        load(tmp_path, prompt="x")
