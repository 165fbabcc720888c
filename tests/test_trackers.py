"""Trackers: told of every round once, never able to stop or slow a run; what the four of the package write."""

from __future__ import annotations

import json
import sqlite3
import struct
import threading
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhpc import config as configuration
from fedhpc import registry
from fedhpc.errors import UserError
from fedhpc.main import main
from fedhpc.results import following
from fedhpc.results.following import WAITING, Following
from fedhpc.results.record import FinalResults, RoundRecord, RunDescription
from fedhpc.results.results_file import CLIENTS, Results
from tests.federations import Interrupted, federate, final, settings, table, tree, write_texts

FAKE = '''
"""A tracker that writes down what it is told, and misbehaves as it is asked to."""

import threading

from pydantic import Field

from fedhpc.registry import Section
from fedhpc.results.trackers.base import Tracker

release = threading.Event()


class Fake(Tracker):
    """Appends a line for all that it is told."""

    class Options(Section):
        path: str = Field("fake.txt", min_length=1, description="file of the lines")
        fails_in: int = Field(-2, description="round in which it raises an error; -1: when it is made")
        leaves_in: int = Field(-2, description="round in which it ends the program")
        hangs_in: int = Field(-2, description="round in which it hangs")

    def __init__(self, options, run):
        super().__init__(options, run)
        if options.fails_in == -1:
            raise RuntimeError("no account\\nat https://me:secret@dashboard/x")

    def write(self, text):
        with open(self.options.path, "a") as file:
            file.write(f"{text}\\n")

    def round(self, record):
        if record.round == self.options.leaves_in:
            raise SystemExit(0)
        if record.round == self.options.fails_in:
            raise OSError("no route to the dashboard")
        if record.round == self.options.hangs_in:
            release.wait()
        losses = record.clients.get("loss_last", ())
        self.write(f"{record.round} {record.train_loss:.6f} {len(losses)} {'loss' in record.metrics}")

    def finish(self, results):
        self.write(f"test {results.test['loss']:.6f}")

    def close(self):
        self.write("closed")
'''
CONFIG = (
    "run: {name: mine, seed: 0}\nclient: {lr: 0.5}\ndata: {source: 'https://me:secret@host/d'}\ntrackers: [{name: x}]\n"
)
IID = {"partition": {"name": "iid"}}


class Screen:
    """What watches the run."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def record(round_: int, loss: float = 1.0) -> RoundRecord:
    clients = {name: np.arange(3).astype(column.dtype) for name, column in CLIENTS.items()}
    clients["round"] = np.full(3, round_)
    metrics = {"loss": loss / 2} if round_ % 2 == 0 else {}
    return RoundRecord(round_, train_loss=loss if round_ else float("nan"), metrics=metrics, clients=clients)


def results_of(*records: RoundRecord) -> Results:
    results = Results({}, ["loss"])
    for one in records:
        results.add_round(one.row())
        results.add_clients(one.clients)
    return results


FINAL = FinalResults(
    test={"loss": 0.25}, base={"loss": 0.5}, tensors={}, client_summary={"loss/mean": 0.75},
    samples=[{"prompt": "a | b", "references": ["c", "d"], "text": "e\nf"}],
)  # fmt: skip


class Followed:
    """A run that trackers follow, with nothing behind it."""

    def __init__(self, folder: Path, *trackers: dict[str, Any]) -> None:
        self.directory = folder / "runs" / "mine"
        self.directory.mkdir(parents=True, exist_ok=True)
        attributes = {"config": CONFIG, "method": "lora", "mode": "federated", "model": "builtin"}
        self.run = RunDescription(self.directory, 9, ["loss"], attributes, {}, {})
        self.options = configuration.resolve({**IID, "trackers": list(trackers)}).trackers

    def follow(self, before: int, until: int, end: str = "complete") -> list[str]:
        """Rounds `before` to `until` of a process that finds those before in results.h5; the lines on the screen."""
        screen = Screen()
        past = results_of(*(record(round_) for round_ in range(before)))
        observer = Following(self.options, self.run, past, screen)  # type: ignore[arg-type]
        for round_ in range(before, until):
            observer.round(record(round_))
        if end == "complete":
            observer.finish(FINAL)
        if end == "killed":  # as far as it got
            deadline = time.monotonic() + 60
            while not observer.idle and time.monotonic() < deadline:
                time.sleep(0.01)
        observer.close()
        return screen.lines


def told(path: str = "fake.txt") -> list[str]:
    return [line.split()[0] for line in Path(path).read_text().splitlines()]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("fake.py").write_text(FAKE)
    return "./fake.py"


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


# ---------------------------------------------------------------- a run and its trackers


def test_a_tracker_of_a_plugin_follows_a_run_and_its_resume(tmp_path: Path, texts: Path, fake: str) -> None:
    raw = tree(texts, federation={"rounds": 3}) | {"trackers": [{"name": fake, "path": "a.txt"}]}
    collectives = federate(settings(tmp_path / "whole", raw | {"trackers": []}), 2)
    config = settings(tmp_path / "run", raw)
    with pytest.raises(Interrupted):
        federate(config, 2, stop_at=collectives * 2 // 3)
    before = told("a.txt")
    federate(config, 2)
    assert 2 <= len(before) <= 5 and before[-1] == "closed"
    assert [one for one in told("a.txt") if one != "closed"] == ["0", "1", "2", "3", "test"]
    losses = table(tmp_path / "run", "rounds")["train_loss"]
    shown = [line.split()[1] for line in Path("a.txt").read_text().splitlines() if line[0].isdigit()]
    assert shown[1:] == [f"{loss:.6f}" for loss in losses[1:]]


def test_a_tracker_that_fails_is_left_out_with_one_line_and_changes_no_bit(
    tmp_path: Path, texts: Path, fake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = tree(texts, federation={"rounds": 3})
    federate(settings(tmp_path / "without", raw))
    capsys.readouterr()
    trackers = [{"name": fake, "path": "b.txt", "fails_in": 1}, {"name": fake, "path": "c.txt"}]
    trackers += [{"name": fake, "path": "d.txt", "fails_in": -1}, {"name": fake, "path": "e.txt", "leaves_in": 1}]
    federate(settings(tmp_path / "with", raw | {"trackers": trackers}))
    out = capsys.readouterr().out
    assert out.count("trackers: ./fake.py failed and is left out: OSError: no route to the dashboard\n") == 1
    assert (
        out.count("trackers: ./fake.py failed and is left out: RuntimeError: no account at https://dashboard/x\n") == 1
    )
    assert out.count("trackers: ./fake.py failed and is left out: SystemExit: 0\n") == 1
    assert not Path("d.txt").exists() and told("b.txt") == ["0"]
    assert told("c.txt") == ["0", "1", "2", "3", "test", "closed"]
    for name, tensor in final(tmp_path / "without").items():
        assert np.array_equal(tensor, final(tmp_path / "with")[name])
    # Other trackers do not make it another run, also where the old one is gone or has changed.
    Path("fake.py").unlink()
    federate(settings(tmp_path / "with", tree(texts, federation={"rounds": 4})))
    assert len(table(tmp_path / "with", "rounds")["round"]) == 5


# ---------------------------------------------------------------- told once


def test_no_round_is_told_twice(tmp_path: Path, fake: str) -> None:
    """A run is killed after round 4, whose checkpoint has round 2: rounds 3 and 4 are computed again."""
    run = Followed(tmp_path, {"name": fake})
    run.follow(0, 5, "killed")
    run.follow(3, 7)
    lines = Path("fake.txt").read_text().split("\n")
    assert [one for one in told() if one not in ("closed", "test")] == [str(i) for i in range(7)]
    assert lines[0] == "0 nan 3 True" and lines[1] == "1 1.000000 3 False"


def test_a_tracker_that_comes_later_or_failed_is_told_what_it_missed(tmp_path: Path, fake: str) -> None:
    run = Followed(tmp_path, {"name": fake, "fails_in": 2})
    run.follow(0, 4)
    late = Followed(tmp_path, {"name": fake}, {"name": fake, "path": "late.txt"})
    late.follow(4, 6)
    # The round in which it failed it was told.
    assert [one for one in told() if one.isdigit()] == ["0", "1", "3", "4", "5"]
    assert [one for one in told("late.txt") if one.isdigit()] == ["0", "1", "2", "3", "4", "5"]
    assert Path("late.txt").read_text().startswith("0 nan 3 True\n1 1.000000 3 False\n")
    assert json.loads((run.directory / "trackers/fake.json").read_text())["told"] == 5


# ---------------------------------------------------------------- it never stops or slows a run


def test_a_tracker_that_hangs_is_left_behind(tmp_path: Path, fake: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its queue has an end, the run does not wait for it, and at the end only for a bounded time."""
    monkeypatch.setattr(following, "FINISH_S", 1.0)
    run = Followed(tmp_path, {"name": fake, "hangs_in": 1}, {"name": fake, "path": "other.txt"})
    lines = run.follow(0, WAITING + 20)
    # The second one is quick, but may be behind where a machine is busy: of it nothing is said here.
    slow = [line for line in lines if "misses round" in line]
    assert 1 <= len(slow) <= 2 and f"trackers: {fake} is slower than the rounds" in slow[0]
    assert lines.count(f"trackers: {fake} has not taken everything within 1 s") >= 1
    assert told() == ["0"]
    threads = [thread for thread in threading.enumerate() if thread.name == "tracker fake"]
    assert threads and all(thread.daemon for thread in threads)  # so they do not keep the process
    registry.load("trackers", fake).release.set()
    for thread in threads:
        thread.join()


# ---------------------------------------------------------------- what is wrong is said before the run


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("[tensorbord]", "trackers[0].name: unknown value 'tensorbord'; did you mean 'tensorboard'? valid: "),
        ("tensorboard", "trackers must be a list of names or of {name: ...}, got 'tensorboard'"),
        ("[{name: wandb, project: a/b}]", "trackers[0].project: only letters, digits, spaces and . , + = - _ are "),
        ("[./needs.py]", "trackers[0]: ./needs.py needs the package no_such_package; pip install no_such_package"),
    ],
)
def test_bad_trackers_are_refused_in_one_line(
    value: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = "from fedhpc import Tracker\nclass Needs(Tracker):\n    'Needs it.'\n    package = 'no_such_package'\n"
    Path("needs.py").write_text(source)
    assert main([f"trackers={value}"]) == 2
    err = capsys.readouterr().err
    assert line in err and err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_list_of_names_is_a_list_of_trackers() -> None:
    config = configuration.resolve({**IID, "trackers": ["tensorboard", {"name": "mlflow", "project": "p"}]})
    assert [(one.name, getattr(one, "project", None)) for one in config.trackers] == [
        ("tensorboard", None), ("mlflow", "p"),
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"trackers\[0\]: must be a mapping|trackers\[0\] must be a mapping"):
        configuration.resolve({**IID, "trackers": [3]})


# ---------------------------------------------------------------- what the trackers of the package write

LOSSES = {0: None, 1: 1.0, 2: 1.0, 3: 1.0, 4: 1.0, 5: 1.0}  # by round; of the initial state there is none


def followed_by(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Path:
    """The folder that a tracker wrote: of a run that was killed after round 3 and went on from round 2."""
    for variable in ("WANDB_MODE", "WANDB_DIR", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(folder)
    run = Followed(folder, {"name": name, **options})
    assert run.follow(0, 4, "killed") == []
    assert run.follow(3, 6) == []
    assert [path.name for path in folder.iterdir()] == ["runs"]  # nothing in the working directory
    return run.directory / "trackers" / name


def test_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    folder = followed_by("tensorboard", tmp_path, monkeypatch)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), {"histograms": 0}).Reload()
    assert [(e.step, e.value) for e in events.Scalars("rounds/train_loss")] == [(i, 1.0) for i in range(1, 6)]
    assert [e.step for e in events.Scalars("rounds/eval_loss")] == [0, 2, 4]
    assert [(e.step, e.value) for e in events.Scalars("test/loss")] == [(5, 0.25)]
    assert [e.value for e in events.Scalars("client_summary/loss/mean")] == [0.75]
    assert [e.step for e in events.Histograms("clients/loss_last")] == list(range(6))
    assert events.Histograms("clients/loss_last")[-1].histogram_value.num == 3
    columns = {f"rounds/{name}" for name in record(2).row()} - {"rounds/round"}
    assert columns <= {*events.Tags()["scalars"]}
    (configuration_text,) = events.Tensors("configuration/text_summary")
    assert b"| client.lr | 0.5 |" in configuration_text.tensor_proto.string_val[0]
    assert b"| a \\| b | e<br>f | c / d |" in events.Tensors("samples/text_summary")[0].tensor_proto.string_val[0]
    assert not [path for path in folder.iterdir() if b"secret" in path.read_bytes()]


def test_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    folder = followed_by("mlflow", tmp_path, monkeypatch, project="ours")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder}/mlflow.db")
    (run,) = client.search_runs([client.get_experiment_by_name("ours").experiment_id])
    assert (run.info.run_name, run.info.status) == ("mine", "FINISHED")
    assert {k: run.data.tags[k] for k in ("group", "method")} == {"group": "runs", "method": "lora"}
    assert run.data.params["client.lr"] == "0.5" and run.data.params["data.source"] == "https://host/d"
    history = client.get_metric_history(run.info.run_id, "rounds/train_loss")
    assert sorted((m.step, m.value) for m in history) == [(i, 1.0) for i in range(1, 6)]
    assert run.data.metrics["test/loss"] == 0.25 and "trackers.0.name" not in run.data.params
    assert [file.path for file in client.list_artifacts(run.info.run_id)] == ["samples.json"]


def test_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    folder = followed_by("wandb", tmp_path, monkeypatch)
    (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")  # the one of the killed process is gone
    records = list(records_of(file))
    (run,) = [one.run for one in records if one.WhichOneof("record_type") == "run"]
    assert (run.project, run.run_group, run.display_name) == ("fedhpc", "runs", "mine")
    assert list(run.tags) == ["lora", "federated", "builtin"]
    rows = [{"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in one.history.item}
            for one in records if one.WhichOneof("record_type") == "history"]  # fmt: skip
    assert [(row["_step"], row.get("rounds/train_loss")) for row in rows[:6]] == [*LOSSES.items()]
    assert rows[5]["clients/loss_last/_type"] == "histogram" and rows[6]["samples/_type"] == "table-file"
    assert len(rows) == 7
    assert b"secret" not in file.read_bytes()


def records_of(file: Path) -> Iterator[Any]:
    """The records of a file of W&B, which is a log as LevelDB has it behind a header of 7 bytes."""
    from wandb.proto import wandb_internal_pb2

    data, at, content = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, part = struct.unpack_from("<IHB", data, at)
        content += data[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(content)
            content = b""


def test_trackio(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    if find_spec("trackio") is None:  # not importorskip: when it is imported it takes the folder from the environment
        pytest.skip("trackio is not installed")
    folder = followed_by("trackio", tmp_path, monkeypatch)
    assert capfd.readouterr() == ("", "")
    with sqlite3.connect(folder / "fedhpc.db") as database:
        rows = database.execute("select run_name, step, metrics from metrics order by id").fetchall()
        (kept,) = database.execute("select config from configs").fetchall()
    values = [(step, json.loads(metrics)) for _, step, metrics in rows]
    assert {name for name, *_ in rows} == {"mine"}
    assert [(step, row.get("rounds/train_loss")) for step, row in values[:6]] == [*LOSSES.items()]
    assert values[6][0] == 5 and values[6][1]["test/loss"] == 0.25 and len(values) == 7
    assert json.loads(kept[0])["client.lr"] == 0.5 and b"secret" not in (folder / "fedhpc.db").read_bytes()
