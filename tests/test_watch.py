"""Following runs from another terminal: what is shown while a run writes, and when watching ends."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fedhpc import watch
from fedhpc.results.checkpoint import save_checkpoint
from fedhpc.results.lock import LOCK
from fedhpc.results.results_file import Results
from fedhpc.results.status import Status, write_status
from tests.test_report import _Terminal, make_run


@pytest.fixture
def meanwhile(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """What happens between two looks: one step after the other, in place of waiting."""
    steps: list[Callable[[], object]] = []
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: steps.pop(0)())
    return lambda *more: steps.extend(more)


def becomes(run: Path, later: Path, state: str) -> Callable[[], None]:
    """The run writes what `later` holds, as a run does: files replaced whole, status last."""

    def write() -> None:
        os.replace(later / "results.h5", run / "results.h5")
        write_status(run, state, Results.read(run / "results.h5").num_rounds)

    return write


def test_a_log_has_a_line_for_each_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], meanwhile: Callable[..., None]
) -> None:
    run = make_run(tmp_path, "demo", done=6)
    write_status(run, "running", 6)
    meanwhile(lambda: None, becomes(run, make_run(tmp_path / "later", "demo"), "complete"))
    with open(run / "results.h5", "rb") as locked:
        fcntl.flock(locked, fcntl.LOCK_EX)  # by another program
        assert watch.main([str(run)]) == 0
    first, second = capsys.readouterr().out.splitlines()
    loss = Results.read(run / "results.h5").rounds["train_loss"]
    sixth, left = 6 * (983_040 + 884_736) / 2**20, 14 * 1.5
    assert first.startswith(f"demo  round 6/20  train_loss {loss[6]:.3f}  eval_loss ")
    assert f" (round 5)  {sixth:.1f} MiB  about " in first and first.endswith(" left  running")
    said = float(re.findall(r"about ([\d.]+) s left", first)[0])
    assert left - 10 < said <= left  # less what has passed since the round ended
    assert second.startswith(f"demo  round 20/20  train_loss {loss[20]:.3f}") and second.endswith("MiB  complete")


def test_rows_that_only_the_checkpoint_has_are_seen_without_the_servers_state(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], meanwhile: Callable[..., None]
) -> None:
    run = make_run(tmp_path, "demo", done=3)
    results = Results.read(run / "results.h5")
    results.add_round({**{k: v[-1] for k, v in results.rounds.items()}, "round": 4, "train_loss": 0.125})
    rows, arrays = results.pending()
    tensors = {"server": np.ones(8), **{f"rows/{name}": array for name, array in arrays.items()}}
    save_checkpoint(run, tensors, {"round": 4, "rows": rows})
    file = run / "checkpoint/state.safetensors"
    bits = bytearray(file.read_bytes())
    at = bits.index(np.ones(8).tobytes())
    bits[at : at + 8] = np.zeros(1).tobytes()  # would fail the checksum of the whole
    file.write_bytes(bits)
    write_status(run, "failed", 4, "no space left on the disk")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert watch.main([str(run)]) == 1
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("demo  round 4/20  train_loss 0.125 ") and line.endswith("failed: no space left on the disk")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before  # no lock, no other file


def test_a_terminal_has_a_curve_and_the_busiest_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[..., None]
) -> None:
    run = make_run(tmp_path, "demo", done=6)
    results = Results.read(run / "results.h5")
    for name, values in {"worker": np.arange(10) % 3 + 1, "tokens": np.where(np.arange(10) % 3 == 1, 300, 100)}.items():
        results._tables["clients"].saved[name][-10:] = values
    results.write(run / "results.h5", complete=False)
    write_status(run, "running", 6)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stdout", screen := _Terminal())

    def interrupt() -> None:
        raise KeyboardInterrupt

    meanwhile(interrupt)
    assert watch.main([str(run)]) == 130
    drawn = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", screen.getvalue())
    assert "last round 1.5 s, of it 1.1 s local training of the slowest worker" in drawn
    # 4, 3 and 3 clients; those of worker 2 have 300 tokens each, the others 100.
    assert f"worker 2 had most to do: {900 / (1600 / 3):.2f} x the mean of 3" in drawn
    rows = [line.split("|")[1] for line in drawn.splitlines() if "|" in line][-watch.CURVE_LINES :]
    assert rows[0].startswith("o")  # the untouched base is the highest
    # Round 5 has both losses in one cell.
    assert sum(row.count(".") for row in rows) == 5 and sum(row.count("o") for row in rows) == 2


def test_a_sweep_is_followed_to_its_comparison(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], meanwhile: Callable[..., None]
) -> None:
    sweep = tmp_path / "sweep"
    first = make_run(sweep, "a-s0", done=5)
    write_status(first, "running", 5)
    later = make_run(tmp_path / "later", "a-s1")

    def begins() -> None:
        becomes(first, make_run(tmp_path / "later", "a-s0"), "complete")()

    def next_one() -> None:
        shutil.move(later, sweep / "a-s1")

    def compares() -> None:
        (sweep / "comparison").mkdir()
        (sweep / "comparison/comparison.csv").touch()

    meanwhile(begins, next_one, compares)
    assert watch.main([str(sweep)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["a-s0", "a-s0", "a-s1"]
    assert watch.Watch([sweep]).folders == [sweep]


def test_a_run_whose_process_is_gone_is_not_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path, "demo", done=5)
    write_status(run, "running", 5)
    (run / LOCK).write_text(f"{2**22 + 1} on {socket.gethostname()}")  # above the largest pid of Linux
    assert watch.main([str(run)]) == 1
    assert "killed: its process is gone" in capsys.readouterr().out
    (run / LOCK).write_text(f"{2**22 + 1} on another-machine")
    assert watch.is_alive(run)
    preempted = watch.Watched(run, Status("preempted", 5, "preempted by SIGTERM", ""))
    assert preempted.state == "preempted by SIGTERM"


@pytest.mark.parametrize("given", [["missing"], ["."], ["missing", "--every", "0"]])
def test_bad_input_is_one_line(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert watch.main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("fedhpc watch: error: ") and error.count("\n") == 1 and "give a" in error
