"""Rows that are kept outside of memory are those that were read, whatever is asked of them, and memory stays small."""

from __future__ import annotations

import hashlib
import json
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fedhpc import config
from fedhpc.config import Data
from fedhpc.data import files, rows, sources
from fedhpc.data.encoding import _batch, _ids, _is_plain
from fedhpc.data.files import read_file
from fedhpc.data.rows import AT_ONCE, LocationsBuilder, Rendered, Rows
from fedhpc.data.sources import read_table
from fedhpc.data.templates import parse
from fedhpc.data.tokens import update_digest
from fedhpc.errors import UserError
from fedhpc.ranks import process
from tests.test_data import words
from tests.test_encoding import bert, gpt, llama, t5

COUNT = 2 * AT_ONCE + 100
TEXTS = [{"a": "é€𝄞x"[: i % 5] * (i % 7), "b": f"text {i}"} for i in range(COUNT)]


def kept() -> Rows:
    return Rows.of(["a", "b"], ([row["a"], row["b"]] for row in TEXTS))


def test_kept_rows_are_the_rows() -> None:
    assert [*kept()] == TEXTS
    assert kept()[3:5] == TEXTS[3:5]
    assert kept()[-1] == TEXTS[-1]
    assert [*kept().column("b")] == [row["b"] for row in TEXTS]
    assert len(Rows.of(["a"], [])) == 0
    with pytest.raises(IndexError):
        kept()[COUNT]


def test_selected_rows_may_stand_in_any_order() -> None:
    order = np.random.default_rng(0).permutation(COUNT)[:1500]
    chosen = kept().select(order)
    assert [*chosen] == [TEXTS[i] for i in order]
    assert [*chosen.select(np.array([5, 2, 1400]))] == [TEXTS[order[i]] for i in (5, 2, 1400)]
    template = parse("{b} and {a}.", "data.prompt")
    rendered = Rendered(template, chosen)
    assert [*rendered] == [template.render(TEXTS[i]) for i in order]
    assert rendered[7] == template.render(TEXTS[order[7]])
    assert [*Rendered(parse("same", "data.prompt"), chosen)] == ["same"] * 1500


def test_places_are_kept_as_they_are_written() -> None:
    written = ["a.csv:2", "a.csv:3", "b row 0", "b row 10", "part-007", "no number", "7", "c:" + "9" * 30, "a.csv:2"]
    noted = LocationsBuilder()
    for place in written:
        noted.add(place)
    locations = noted.locations()
    assert [*locations] == written
    assert locations[3] == "b row 10"
    assert locations[2:4] == written[2:4]
    assert [*locations.select(np.array([8, 0, 4]))] == [written[i] for i in (8, 0, 4)]


def test_lines_do_not_depend_on_how_much_is_read_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "train.jsonl"
    file.write_bytes(b'{"a": "one"}\r\n\n{"a": "two"}\n  \n{"a": "\xc3\xa9"}')
    whole = [(place, dict(row)) for place, row in read_file(file)]
    assert [place.rpartition(":")[2] for place, _ in whole] == ["1", "3", "5"]
    for size in (1, 2, 7):
        monkeypatch.setattr(files, "_PART_BYTES", size)
        assert [(place, dict(row)) for place, row in read_file(file)] == whole


def test_row_groups_and_batches_are_one_table(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.feather
    import pyarrow.parquet

    table = pyarrow.Table.from_pylist(TEXTS)
    pyarrow.parquet.write_table(table, tmp_path / "p.parquet", row_group_size=700)
    pyarrow.feather.write_feather(table, str(tmp_path / "f.feather"), chunksize=600)
    (tmp_path / "j.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TEXTS))
    source = sources.open_source(Data.model_validate({"source": str(tmp_path)}))
    for name in ("p.parquet", "f.feather", "j.jsonl"):
        read = read_table(source, str(source.find(name)), {"a": "data.prompt", "b": "data.target"})
        assert [*read.rows] == TEXTS, name
        assert read.locations[AT_ONCE].endswith(f"{AT_ONCE + 1}"), name


def test_no_room_for_the_rows_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "wb", buffering=0) as full:
        monkeypatch.setattr(rows, "unnamed_file", lambda: full)
        with pytest.raises(UserError, match="No space left on device") as error:
            kept()
    assert "TMPDIR" in str(error.value)


def test_ids_are_those_of_the_tokenizer_as_it_is_called() -> None:
    texts = ["", "a word", "é€ q1 q2", "x" * 300] * 200
    for tokenizer in (words(), llama(), gpt(), bert(), t5()):
        assert _is_plain(tokenizer)
        assert _ids(tokenizer, texts) == _batch(tokenizer, texts)["input_ids"]


def test_memory_is_that_of_few_rows(tmp_path: Path) -> None:
    """20,000 rows of 20 MB are read, rendered and hashed; a list of all their texts would be as large."""
    many = 20_000
    with open(tmp_path / "train.jsonl", "w") as file:
        for number in range(many):
            file.write(json.dumps({"q": f"{number} {'word ' * 100}", "a": f"{number} {'word ' * 100}"}) + "\n")
    source = sources.open_source(Data.model_validate({"source": str(tmp_path)}))
    digest = hashlib.sha256()
    tracemalloc.start()
    try:
        table = read_table(source, str(source.find("train")), {"q": "data.prompt", "a": "data.target"})
        update_digest(digest, Rendered(parse("{q} {a}", "data.prompt"), table.rows))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert len(table.rows) == many
    assert peak < 0.4 * (tmp_path / "train.jsonl").stat().st_size, f"{peak / many:.0f} bytes a row"


def test_cells_of_csv_are_read_as_if_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a column is depends on its last cell too; a cell may have several lines, which end in any way."""
    ends = ["\n", "\r\n", "\r"]
    lines = [f'{i},{i if i < COUNT - 1 else "x"},"a{ends[i % 3]}b"{ends[i % 3]}' for i in range(COUNT)]
    (tmp_path / "train.csv").write_bytes(("n,k,t\n" + "".join(lines)).encode("utf-8-sig"))
    for size in (7, 2**20):
        monkeypatch.setattr(files, "_PART_BYTES", size)
        read = [(location, dict(row)) for location, row in read_file(tmp_path / "train.csv")]
        assert len(read) == COUNT
        assert read[5][1] == {"n": 5, "k": "5", "t": "a\rb"}
        assert read[5][0].endswith("train.csv:12")
        assert read[-1][1] == {"n": COUNT - 1, "k": "x", "t": f"a{ends[(COUNT - 1) % 3]}b"}


@pytest.mark.parametrize(("threads", "together", "count"), [("auto", "false", "1"), (3, "true", "3")])
def test_threads_make_tokens(threads: str | int, together: str, count: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", {})
    partition = {"name": "iid", "num_clients": 2}
    process.set_environment(config.resolve({"partition": partition, "runtime": {"threads": threads}}))
    assert (os.environ["TOKENIZERS_PARALLELISM"], os.environ["RAYON_NUM_THREADS"]) == (together, count)
