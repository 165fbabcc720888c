"""One value is one text: the same rows give the same data in every format, and what is missing is named."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fedhpc.data import Data, load_data
from fedhpc.data.sources import open_source, read_table
from fedhpc.data.values import CellKind, text
from fedhpc.errors import UserError
from fedhpc.models.causal_lm import CausalLM
from tests.test_data import load, rows, settings, words, write_jsonl

datasets = pytest.importorskip("datasets")


def of_cells(cells: list[str]) -> list[object]:
    """The values of a column of CSV with these cells."""
    kind = CellKind()
    kind.add(cells)
    return kind.values(cells)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (1, "1"),
        (1.0, "1"),
        (np.int64(1), "1"),
        (np.float32(1), "1"),
        (Decimal("1.00"), "1"),
        (-0.0, "0"),
        (1e20, "1" + 20 * "0"),
        (10**20, "1" + 20 * "0"),
        (np.float32(1e20), "1" + 20 * "0"),
        (1e23, "1" + 23 * "0"),
        (2**53 + 1, "9007199254740993"),
        (0.1, "0.1"),
        (np.float32(0.1), "0.1"),
        (np.float16(0.1), "0.1"),
        (np.float64(0.1), "0.1"),
        (0.1 + 0.2, "0.30000000000000004"),
        (Decimal("1.50"), "1.5"),
        (1.5, "1.5"),
        (Decimal("0.0000001"), "1e-07"),
        (1e-7, "1e-07"),
        (Decimal("12345678901234567890.50"), "12345678901234567890.5"),
        (True, "true"),
        (np.bool_(False), "false"),
        (None, ""),
        (math.nan, ""),
        (Decimal("NaN"), ""),
        (math.inf, "inf"),
        ([1.0], "1"),
        ("1.0", "1.0"),
        ("True", "True"),
        ("007", "007"),
    ],
)
def test_the_text_of_a_value(value: Any, expected: str) -> None:
    assert text(value) == expected


@pytest.mark.parametrize(
    ("cells", "texts"),
    [
        (["1.0", "0.0", ""], ["1", "0", ""]),
        (["1.0", "x"], ["1.0", "x"]),
        (["1.10", "1.0"], ["1.10", "1.0"]),  # a price or a version, which no program writes for a number
        (["007", "1"], ["007", "1"]),
        (["1E5", "2E7"], ["1E5", "2E7"]),
        (["1e+20", "-0.0", "0.5"], ["1" + 20 * "0", "0", "0.5"]),
        (["9007199254740993", "1"], ["9007199254740993", "1"]),
        (["True", "False", ""], ["true", "false", ""]),
        (["True", "maybe"], ["True", "maybe"]),
        (["nan", "1.5"], ["", "1.5"]),
        (["nan", "granny"], ["nan", "granny"]),
        (["", ""], ["", ""]),
    ],
)
def test_the_cells_of_a_column_of_csv(cells: list[str], texts: list[str]) -> None:
    assert [text(value) for value in of_cells(cells)] == texts


@pytest.mark.parametrize(
    ("train", "more", "test", "classes"),
    [
        (["True", "False", "Unknown"], ["True", "False"], ["False", "True"], ["False", "True", "Unknown"]),
        (["1.0", "2.0"], ["2.0", "beta"], ["1.0", "2.0"], ["1.0", "2.0", "beta"]),
        (["1.0", "2.0"], ["1.0", "1.0"], ["2.0", "1.0"], ["1", "2"]),
        (["True", "False"], ["False", "True"], ["True", "True"], ["false", "true"]),
    ],
)
def test_a_column_of_csv_is_of_one_kind_in_all_files(
    train: list[str], more: list[str], test: list[str], classes: list[str], tmp_path: Path
) -> None:
    for name, cells in (("train-0", train), ("train-1", more), ("dev", test), ("test", test)):
        (tmp_path / f"{name}.csv").write_text("q,k\n" + "".join(f"what is {i},{c}\n" for i, c in enumerate(cells * 3)))
    data = load(tmp_path, prompt="{q}", target=" {k}", label="k")
    assert data.train.label_names == classes
    assert data.test.labels is not None
    names = [cell if cell in classes else text(of_cells([cell])[0]) for cell in test]
    assert [classes[i] for i in data.test.labels] == names * 3


def test_the_public_set_counts_with_the_splits(tmp_path: Path) -> None:
    """Without a word in it 1.0 would be the class 1, in the public set or in the others."""
    for odd in ("train", "more"):
        for name in ("train", "validation", "test", "more"):
            cells = ["1.0", "2.0", "beta" if name == odd else "1.0"] * 3
            (tmp_path / f"{name}.csv").write_text("q,k\n" + "".join(f"what,{cell}\n" for cell in cells))
        public: Any = SimpleNamespace(source=None, split="more", where={}, where_not={}, max_examples=9)
        config = settings(tmp_path, prompt="{q}", target=" {k}", label="k")
        data = load_data(config, words(), CausalLM, public=public)
        assert data.train.label_names == ["1.0", "2.0", "beta"], odd


FRAME = pandas.DataFrame(
    {
        "q": [f"what is {i}" for i in range(12)],
        "a": ["yes", "no", "so"] * 4,
        "whole": [0, 1, 2**53 + 1] * 4,
        "gaps": [0.0, 1.0, math.nan] * 4,
        "flag": [True, False, True] * 4,
        "small": np.array([0.1, 2.5, 1e-7] * 4, np.float32),
        "large": [1e20, 0.1 + 0.2, -0.0] * 4,
    }
)
PROMPT = "{q} {whole} {gaps} {flag} {small} {large}"
TEXTS = ["what is 0 0 0 true 0.1 1" + 20 * "0", "what is 1 1 1 false 2.5 0.30000000000000004"]


def _write(name: str, frame: pandas.DataFrame, path: Path) -> None:
    """train, validation and test, as people write them."""
    narrow = [float(str(value)) for value in frame["small"].to_numpy()]  # what a person writes for a float32
    if name == "csv":
        frame.to_csv(f"{path}.csv", index=False)
    elif name == "json lines of Python":
        write_jsonl(Path(f"{path}.jsonl"), frame.assign(small=narrow).to_dict("records"))
    elif name == "json":
        Path(f"{path}.json").write_text(json.dumps(frame.assign(small=narrow).to_dict("records"), indent=1))
    elif name == "parquet of pandas":
        frame.to_parquet(f"{path}.parquet")
    elif name == "parquet with nulls":
        pq.write_table(pa.Table.from_pandas(frame, preserve_index=False), f"{path}.parquet")
    elif name == "parquet with decimals":
        table = pa.Table.from_pandas(frame, preserve_index=False)
        gaps = pa.array([None if math.isnan(v) else Decimal(str(v)) for v in frame["gaps"]], pa.decimal128(9, 2))
        pq.write_table(table.set_column(table.column_names.index("gaps"), "gaps", gaps), f"{path}.parquet")


FORMATS = [
    "csv", "json lines of Python", "json", "parquet of pandas", "parquet with nulls", "parquet with decimals",
    "saved to disk", "hub",
]  # fmt: skip


@pytest.fixture(scope="module")
def prints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Data]:
    """What is loaded of the same rows in each format."""
    loaded = {}
    options = {"prompt": PROMPT, "target": " {a}", "label": "whole"}
    for name in FORMATS:
        folder = tmp_path_factory.mktemp("rows")
        splits = {
            "train": FRAME,
            "validation": FRAME[:6].reset_index(drop=True),
            "test": FRAME[:3].reset_index(drop=True),
        }
        if name in ("saved to disk", "hub"):
            given = datasets.DatasetDict({k: datasets.Dataset.from_pandas(v) for k, v in splits.items()})
            if name == "hub":
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(datasets, "load_dataset", lambda *_, given=given, streaming: given)
                    loaded[name] = load("someone/something", **options)
                continue
            given.save_to_disk(folder / "disk")
            folder = folder / "disk"
        for split, frame in splits.items():
            _write(name, frame, folder / split)
        loaded[name] = load(folder, **options)
    return loaded


@pytest.mark.parametrize("name", FORMATS)
def test_the_same_rows_are_the_same_data_in_every_format(prints: dict[str, Data], name: str) -> None:
    data = prints[name]
    assert data.validation.prompts is not None
    assert data.validation.prompts[:2] == TEXTS
    assert sorted(data.train.label_names) == ["0", "1", "9007199254740993"]
    assert data.fingerprint == prints["parquet of pandas"].fingerprint


def _labels(folder: Path, **options: Any) -> list[str]:
    return sorted(load(folder, label="k", **options).train.label_names)


def test_labels_that_became_floats(tmp_path: Path) -> None:
    """Case 4: 0 and 1 in JSON lines, 0.0 and 1.0 in Parquet and CSV, are two classes and one target."""
    write_jsonl(tmp_path / "train.jsonl", [{**row, "k": i % 2} for i, row in enumerate(rows(20))])
    table = {"q": ["x", "y", "z"], "a": ["b", "b", "b"]}
    pq.write_table(pa.table({**table, "k": pa.array([1.0, 0.0, None])}), tmp_path / "validation.parquet")
    pandas.DataFrame({**table, "k": [1.0, 0.0, math.nan]}).to_csv(tmp_path / "test.csv", index=False)
    with pytest.raises(UserError, match=r"validation\.parquet row 3: data\.label: the column 'k' has no value here"):
        _labels(tmp_path)
    present = {"where_not": {"k": [""]}}
    assert _labels(tmp_path, **present) == ["0", "1"]
    data = load(tmp_path, target=" {k}", **present)
    assert data.validation.targets == data.test.targets == [" 1", " 0"]
    assert len(load(tmp_path, where={"k": [1]}).validation) == len(load(tmp_path, where={"k": [1]}).test) == 1
    assert len(load(tmp_path, where_not={"k": [1.0]}).train) == 10
    assert len(load(tmp_path, where_not={"k": [1]}).validation) == 2  # 0 and the missing one


def test_a_filter_that_meets_no_row_is_said(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{**row, "k": i % 2} for i, row in enumerate(rows(20))])
    data = load(tmp_path, where_not={"k": ["1.0", 1]}, validation="train", test="train")
    assert len(data.train) == 10
    assert data.messages == ["data.where_not: no row has '1.0' in the column 'k'"]


def test_a_pandas_frame_with_an_empty_label(tmp_path: Path) -> None:
    frame = pandas.DataFrame({"q": ["x"] * 12, "a": ["y"] * 12, "k": [0.0, 1.0, 2.0, math.nan] * 3})
    for split in ("train", "validation", "test"):
        frame.to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(
        UserError, match=r"train\.parquet row 4: data\.label: .* no value here, nor in 2 more of 12 rows"
    ):
        _labels(tmp_path)
    assert _labels(tmp_path, where_not={"k": [""]}) == ["0", "1", "2"]


def test_not_a_number_in_json(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"q": "a", "a": "b", "k": 1}\n{"q": "a", "a": "b", "k": NaN}\n' * 3)
    with pytest.raises(UserError, match=r"train\.jsonl:2: data\.label: the column 'k' has no value"):
        load(tmp_path, label="k")


def test_a_missing_value_in_a_template_is_said(tmp_path: Path) -> None:
    table = [{**row, "more": None if i > 6 else "m"} for i, row in enumerate(rows(9))]
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", table if split == "train" else table[:2])
    data = load(tmp_path, prompt="{q} {more}")
    assert data.messages == [
        f"data.prompt: {tmp_path}/train.jsonl:8 and 1 more of 9 rows have no 'more' (null), "
        "which is an empty text there"
    ]


def test_an_empty_text_is_a_class_of_its_own_and_is_said(tmp_path: Path) -> None:
    for split in ("train", "validation", "test"):
        write_jsonl(tmp_path / f"{split}.jsonl", [{**row, "k": "" if i == 3 else "x"} for i, row in enumerate(rows(9))])
    data = load(tmp_path, label="k")
    assert data.train.label_names == ["", "x"]
    assert data.messages[0].startswith(f"data.label: {tmp_path}/train.jsonl:4 has the empty text")


@pytest.mark.parametrize("owner", [None, ""])
def test_a_row_without_an_owner_is_named(tmp_path: Path, owner: str | None) -> None:
    table = [{**row, "c": owner if i == 5 else f"c{i % 3}"} for i, row in enumerate(rows(9))]
    write_jsonl(tmp_path / "train.jsonl", table)
    natural = {"client": "c", "partition": {"name": "natural"}, "validation": "train", "test": "train"}
    with pytest.raises(UserError, match=r"train\.jsonl:6: data\.client: the column 'c' has no value here"):
        load(tmp_path, **natural)
    population = load(tmp_path, **natural, where_not={"c": [""]}).population
    assert population.names == ["c0", "c1", "c2"]


# Times

MOMENTS = [0, 1, 1_000, 1_500_000_000, 1_700_000_000_123_456_789, -1]


@pytest.mark.parametrize("zone", [None, "UTC", "Europe/Zurich", "+05:30", "-03:00"])
def test_nanoseconds_are_the_text_that_pandas_has(tmp_path: Path, zone: str | None) -> None:
    pq.write_table(pa.table({"when": pa.array(MOMENTS, pa.timestamp("ns", zone))}), tmp_path / "train.parquet")
    expected = [str(pandas.Timestamp(ns, tz="UTC").tz_convert(zone)) for ns in MOMENTS]
    assert _column_of(tmp_path, "when") == expected


def test_other_times_are_as_python_writes_them(tmp_path: Path) -> None:
    table = pa.table(
        {
            "when": pa.array([1_500_000, None], pa.timestamp("us", "+05:30")),
            "day": pa.array([1, None], pa.date32()),
            "long": pa.array([90_000, None], pa.duration("s")),
            "longer": pa.array([90_000 * 10**9 + 7, None], pa.duration("ns")),
            "time": pa.array([10**9 + 7, None], pa.time64("ns")),
        }
    )
    pq.write_table(table, tmp_path / "train.parquet")
    assert _column_of(tmp_path, "when") == ["1970-01-01 05:30:01.500000+05:30", ""]
    assert _column_of(tmp_path, "day") == ["1970-01-02", ""]
    assert _column_of(tmp_path, "long") == ["1 day, 1:00:00", ""]
    assert _column_of(tmp_path, "longer") == ["1 day, 1:00:00.000000007", ""]
    assert _column_of(tmp_path, "time") == ["00:00:01.000000007", ""]


def test_nanoseconds_without_pandas(tmp_path: Path) -> None:
    pq.write_table(
        pa.table({"q": ["x"], "when": pa.array([MOMENTS[4]], pa.timestamp("ns"))}), tmp_path / "train.parquet"
    )
    program = (
        "import sys; sys.modules['pandas'] = None\n"
        "from fedhpc.data.files import read_file; from pathlib import Path\n"
        "print([dict(row)['when'] for _, row in read_file(Path(sys.argv[1]))])"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "train.parquet")], capture_output=True, text=True, check=False
    )
    assert ran.stdout.strip() == "['2023-11-14 22:13:20.123456789']", ran.stderr


def _column_of(folder: Path, column: str) -> list[str]:
    source = open_source(settings(folder).data)
    name = source.find("train")
    assert name is not None
    return [row[column] for row in read_table(source, name, {column: "data.prompt"}).rows]


# Columns that Python cannot hold

_STRANGE = {
    "year 10000": pa.array([0] * 19 + [253402300800 * 10**6], pa.timestamp("us")),
    "year 0": pa.array([0] * 19 + [-719529], pa.date32()),
    "a duration": pa.array([0] * 19 + [2**62], pa.duration("s")),
    "no such zone": pa.array([0] * 20, pa.timestamp("us", "Mars/Phobos")),
    "no such zone in ns": pa.array([0] * 20, pa.timestamp("ns", "Mars/Phobos")),
    "no UTF-8": pa.array([b"x"] * 19 + [b"\xff"]).view(pa.string()),
}


@pytest.mark.parametrize("name", _STRANGE)
def test_a_column_is_read_only_where_it_is_used(tmp_path: Path, name: str) -> None:
    table = pa.table({"q": ["x"] * 20, "a": ["y"] * 20, "when": _STRANGE[name]})
    pq.write_table(table, tmp_path / "train.parquet")
    write_jsonl(tmp_path / "same.jsonl", [{"q": "x", "a": "y"}] * 20)
    assert load(tmp_path).fingerprint == load(tmp_path, train="same").fingerprint
    number = 1 if "zone" in name else 20
    with pytest.raises(UserError, match=rf"train\.parquet row {number}: data\.prompt: the column 'when' holds a value"):
        load(tmp_path, prompt="{when}")


def test_two_columns_of_one_name(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["x"] * 20)] * 4, names=["q", "a", "k", "k"])
    pq.write_table(table, tmp_path / "train.parquet")
    assert len(load(tmp_path).train) == 18
    with pytest.raises(UserError, match=r"train\.parquet: 2 columns are called 'k'"):
        load(tmp_path, prompt="{k}")


def test_a_long_cell(tmp_path: Path) -> None:
    """Case 2: Python's csv stops at 131,072 characters unless told otherwise."""
    table = [*rows(20), {"q": "word " * 28_000, "a": "y", "k": "z"}]
    write_jsonl(tmp_path / "a.jsonl", table)
    pandas.DataFrame(table).to_csv(tmp_path / "b.csv", index=False)
    assert len(table[-1]["q"]) > 131_072
    assert load(tmp_path / "a.jsonl").fingerprint == load(tmp_path / "b.csv").fingerprint
