"""An array of JSON that is read element by element has the elements, and the errors, of one that is read whole."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import pytest

from fedhpc.data import files
from fedhpc.data.files import read_file
from fedhpc.data.json_array import JsonArray
from fedhpc.errors import UserError

VALUES = [{"a": 'x,]\\" é𝄞\u2028', "b": [1, -2.5e-3, {}]}, -12.25, 7, True, None, "", [], {"a": {"b": [[]]}}]


def read(content: bytes, size: int) -> list[object]:
    parts = (content[at : at + size] for at in range(0, len(content), size))
    array = JsonArray(parts, "train.json")
    assert array.begins()
    return [*array]


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("escapes", [False, True])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le"])
def test_elements_are_those_of_the_whole(indent: int | None, escapes: bool, encoding: str) -> None:
    content = json.dumps([*VALUES, *VALUES], indent=indent, ensure_ascii=escapes).encode(encoding)
    for size in (1, 2, 3, 7, 100, 10**6):
        assert read(content, size) == [*VALUES, *VALUES]
    assert read("\n[ \r\n]\t".encode(encoding), 1) == []


def error_of_the_whole(content: bytes) -> str:
    with pytest.raises(json.JSONDecodeError) as error:
        json.loads(content)
    line = f"line {error.value.lineno}, " if error.value.lineno > 1 else ""
    return f"train.json: not valid JSON: {error.value.msg} at {line}column {error.value.colno}"


def test_errors_are_those_of_the_whole() -> None:
    """A file that ends at any place, and one with a mistake at any."""
    content = json.dumps(VALUES[:3], indent=1).encode()
    broken = [content[:end].rstrip() for end in range(1, len(content))]
    broken += [content[:at] + b"\x01" + content[at + 1 :] for at in range(1, len(content))]
    broken += [
        content + b" x",
        content.replace(b"[", b"[,", 1),
        content + content,
        b"[1 2]",
        b'[{"a": "b}, {"c": "d"}]',
    ]
    for one in broken:
        for size in (1, 5, 10**6):
            with pytest.raises(UserError) as error:
                read(one, size)
            assert str(error.value) == error_of_the_whole(one), (one, size)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'[{"a": "\xff"}]', "train.json: not valid JSON: byte 8 is not utf-8: invalid start byte"),
        (b'[{"a": "b"}, {"a": "\xc3"}]', "train.json: not valid JSON: byte 20 is not utf-8: invalid continuation byte"),
        (b'[{"a": "\xc3', "train.json: not valid JSON: byte 8 is not utf-8: unexpected end of data"),
        (b"[" * 10**5, "train.json: not valid JSON: maximum recursion depth exceeded"),
        (b"[" + b"1" * 5000 + b"]", "train.json: not valid JSON: Exceeds the limit"),
    ],
)
def test_what_cannot_be_read_at_all_is_one_line(content: bytes, message: str) -> None:
    for size in (1, 3, 10**6):
        with pytest.raises(UserError) as error:
            read(content, size)
        assert str(error.value).startswith(message)


def test_memory_is_that_of_few_elements(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_PART_BYTES", 2**16)
    rows = [{"q": f"{number} {'word ' * 100}"} for number in range(4_000)]
    (tmp_path / "train.json").write_text(json.dumps(rows))
    tracemalloc.start()
    try:
        assert all(row == read for row, (_, read) in zip(rows, read_file(tmp_path / "train.json"), strict=True))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 0.3 * (tmp_path / "train.json").stat().st_size


def test_one_object_that_is_nested_too_deeply_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "train.json"
    path.write_text('{"a":' * 200_000 + "1" + "}" * 200_000)
    with pytest.raises(UserError, match=r"train\.json:1: not valid JSON: maximum recursion depth"):
        list(read_file(path))
