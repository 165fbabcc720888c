"""Folders as tools leave them: all of a data set is read, or it is refused in one line that says what is there."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedhpc.errors import UserError
from tests.test_data import load, rows, write_jsonl

WHOLE = rows(30)


def _parts(folder: Path, names: Sequence[str], table: Sequence[dict[str, str]] = WHOLE) -> Path:
    """The rows as files of these names, in order."""
    folder.mkdir(parents=True, exist_ok=True)
    size = -(-len(table) // len(names))
    for number, name in enumerate(names):
        part = table[number * size : (number + 1) * size]
        if ".parquet" in name:
            pq.write_table(pa.Table.from_pylist(part), folder / name)
        elif ".csv" in name:
            pandas.DataFrame(part).to_csv(folder / name, index=False)
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
    assert load(tmp_path).fingerprint == one_file


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train.tsv", "q\ta\n", r"nothing that is read, but train\.tsv; a data file ends in .*sep='\\t'"),
        ("train.jsonl.zst", "", r"nothing that is read, but train\.jsonl\.zst; a data file ends in"),
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
    if name == "train.tsv":
        with pytest.raises(UserError, match=r"train\.tsv: a data file ends in"):
            load(tmp_path / name)


def test_optional_keys_and_lists_say_what_to_do(tmp_path: Path) -> None:
    """Case 6."""
    table: list[dict[str, Any]] = [{"q": "x", "more": "m", "a": "red"}, {"q": "x", "a": ["red", "crimson"]}]
    write_jsonl(tmp_path / "train.jsonl", table * 9)
    with pytest.raises(UserError, match=r"train\.jsonl:2: data\.prompt .* 'more', which is not there; .* write null"):
        load(tmp_path, prompt="{q} {more}", target="x")
    with pytest.raises(
        UserError, match=r"train\.jsonl:2: data\.target: .* a list of 2: give each its own row, or join"
    ):
        load(tmp_path)
    chat = [{"q": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "a": {"text": ["x"]}}]
    write_jsonl(tmp_path / "train.jsonl", chat * 9)
    with pytest.raises(UserError, match=r"data\.prompt: the column 'q' holds a chat of 2 turns: write it as a text"):
        load(tmp_path, target="x")
    with pytest.raises(UserError, match=r"data\.target: .* a dict of 1 \(text\): put what is used into columns"):
        load(tmp_path, prompt="x")
