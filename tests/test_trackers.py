"""Trackers: told of every round after it is on the disk, also of a plugin's; one that fails does not end a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.federations import Interrupted, federate, final, settings, table, tree, write_texts

LOSSES = '''
"""Losses of every round in a text file."""

from pathlib import Path

from pydantic import Field

from fedhpc.registry import Section
from fedhpc.results.checkpoint import load_checkpoint
from fedhpc.results.trackers.base import Tracker


class Losses(Tracker):
    """Writes a line a round, with the round that is safely on the disk by then."""

    class Options(Section):
        path: str = Field("losses.txt", min_length=1, description="file of the lines")
        fails_in: int = Field(-1, description="round in which it raises an error")
        fails_at_once: bool = Field(False, description="raises one when it is made")
        leaves: bool = Field(False, description="whether it ends the program")

    def __init__(self, options, run, start_round):
        super().__init__(options, run, start_round)
        if options.fails_at_once:
            raise RuntimeError("no account\\nat the dashboard")

    def round(self, record):
        if record.round == 1 and self.options.leaves:
            raise SystemExit(0)
        if record.round == self.options.fails_in:
            raise OSError("no route to the dashboard")
        saved = load_checkpoint(self.run.directory)[1]["round"]
        with open(self.options.path, "a") as file:
            file.write(f"{record.round} {saved} {record.train_loss:.6f}\\n")

    def finish(self, results):
        with open(self.options.path, "a") as file:
            file.write(f"test {results.test['loss']:.6f}\\n")
'''


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def test_a_tracker_of_a_plugin_follows_a_run_and_its_resume(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("losses.py").write_text(LOSSES)
    raw = tree(texts, federation={"rounds": 3}) | {"trackers": [{"name": "./losses.py", "path": "a.txt"}]}
    collectives = federate(settings(tmp_path / "whole", raw | {"trackers": []}), 2)
    config = settings(tmp_path / "run", raw)
    with pytest.raises(Interrupted):
        federate(config, 2, stop_at=collectives * 2 // 3)
    before = len(Path("a.txt").read_text().splitlines())
    federate(config, 2)
    lines = [line.split() for line in Path("a.txt").read_text().splitlines()]
    assert 1 <= before <= 3 and [line[0] for line in lines] == ["0", "1", "2", "3", "test"]
    assert all(int(saved) >= int(round_) for round_, saved, _ in lines[:-1])
    losses = table(tmp_path / "run", "rounds")["train_loss"]
    assert lines[1][2] == f"{losses[1]:.6f}" and lines[-2][2] == f"{losses[3]:.6f}"


def test_a_tracker_that_fails_is_left_out_with_one_line_and_changes_no_bit(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("losses.py").write_text(LOSSES)
    raw = tree(texts, federation={"rounds": 3})
    federate(settings(tmp_path / "without", raw))
    capsys.readouterr()
    trackers = [{"name": "./losses.py", "path": "b.txt", "fails_in": 1}, {"name": "./losses.py", "path": "c.txt"}]
    trackers.append({"name": "./losses.py", "path": "d.txt", "fails_at_once": True})
    trackers.append({"name": "./losses.py", "path": "e.txt", "leaves": True})
    federate(settings(tmp_path / "with", raw | {"trackers": trackers}))
    out = capsys.readouterr().out
    assert out.count("no route to the dashboard") == 1 and out.count("no account at the dashboard") == 1
    assert out.count("trackers: ./losses.py failed and is left out: SystemExit: 0\n") == 1
    assert not Path("d.txt").exists()
    assert [line.split()[0] for line in Path("b.txt").read_text().splitlines()] == ["0"]
    assert [line.split()[0] for line in Path("c.txt").read_text().splitlines()] == ["0", "1", "2", "3", "test"]
    for name, tensor in final(tmp_path / "without").items():
        assert np.array_equal(tensor, final(tmp_path / "with")[name])
    # Other trackers do not make it another run, also where the old one is gone or has changed.
    Path("losses.py").unlink()
    federate(settings(tmp_path / "with", tree(texts, federation={"rounds": 4})))
    assert len(table(tmp_path / "with", "rounds")["round"]) == 5
