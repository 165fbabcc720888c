"""results.h5: what it holds, that it is never torn, and that a resumed run completes it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import h5py
import numpy as np
import pandas
import pytest

from fedhpc.errors import UserError
from fedhpc.results.checkpoint import load_checkpoint, save_checkpoint
from fedhpc.results.record import Sampling
from fedhpc.results.results_file import CLIENTS, EVENTS, ROUNDS, Results


def blank(metrics: tuple[str, ...] = ("loss", "bleu")) -> Results:
    attributes = {"method": "prefix", "mode": "federated", "seed": 7, "config": "mode: federated\n"}
    return Results(attributes, metrics, [f"eval_samples/{name}" for name in ("round", "prompt", "references", "text")])


def play(results: Results, first: int, last: int, mark: float = 0.0) -> None:
    """Rounds first..last of a made-up run of 3 clients a round; `mark` (seconds) tells passes apart."""
    for t in range(first, last + 1):
        if t % 2 == 0:
            results.add_eval_samples(t, [{"prompt": "né :", "references": ["a b", "c"], "text": f"x\0 {t} 日本"}])
        if t == 0:
            results.add_round({"round": 0, "eval_loss": 4.0, "eval_bleu": 1.0})
            continue
        row = {**dict.fromkeys(ROUNDS, 1), "round": t, "train_loss": 3.0 / t, "seconds": mark}
        row.pop("eval_loss")
        results.add_round({**row, **({"eval_loss": 4.0 / t} if t % 2 == 0 else {})})
        results.add_clients({**{k: np.full(3, t) for k in CLIENTS}, "client_id": np.arange(3) + t, "status": [0, 0, 1]})
        results.add_event(t, "dropped", f"client {t + 2} did not report back")


def frame(path: Path, group: str) -> pandas.DataFrame:
    with h5py.File(path, "r") as file:
        return pandas.DataFrame({name: values[:] for name, values in file[group].items()})


def test_readable_with_h5py_and_pandas_alone(tmp_path: Path) -> None:
    path = tmp_path / "results.h5"
    results = blank()
    play(results, 0, 4)
    results.set_partition(np.array([3, 2]), np.array([[1, 2], [2, 0]]), ["a", ""], np.arange(5), np.array([0, 3, 5]))
    results.set_base({"loss": 5.0})
    results.set_test({"loss": 2.5, "bleu": 30.0})
    results.set_client_eval({"client_id": np.arange(2), "loss": np.array([1.0, np.nan])})
    results.set_samples([{"prompt": "né :", "references": ["a b", "c"], "text": "x\0y \ud800 日本"}])
    results.set_final({"past.0.key": np.ones((2, 3), np.float32), "scale": np.float32(2)})
    results.write(path, complete=True)

    rounds, clients, events = (frame(path, group) for group in ("rounds", "clients", "events"))
    assert list(rounds["round"]) == [0, 1, 2, 3, 4] and set(rounds.columns) == {*ROUNDS, "eval_bleu"}
    assert np.isnan(rounds["train_loss"][0]) and rounds["cohort_size"][0] == 0
    assert np.isnan(rounds["eval_loss"][1]) and rounds["eval_loss"][2] == 2.0 and np.isnan(rounds["eval_bleu"][2])
    assert len(clients) == 12 and set(clients.columns) == set(CLIENTS) and clients["status"].sum() == 4
    texts = frame(path, "eval_samples")
    assert texts["text"][1].decode() == "x␀ 2 日本" and texts["round"].tolist() == [0, 2, 4]
    assert events["message"][0].decode() == "client 3 did not report back" and set(events.columns) == set(EVENTS)
    with h5py.File(path, "r") as file:
        assert file.attrs["format"] == "fedhpc-run" and bool(file.attrs["complete"]) is True
        assert file.attrs["complete"].dtype == np.int64  # netCDF4 does not list a boolean attribute
        assert file.attrs["config"] == "mode: federated\n" and file.attrs["h5py_version"] == h5py.__version__
        assert "nats" in file["rounds/train_loss"].attrs["description"]
        assert file["partition/label_names"].asstr()[:].tolist() == ["a", ""]
        assert file["partition/label_counts"].shape == (2, 2)
        assert file["test/bleu"][()] == 30.0 and file["base/loss"][()] == 5.0
        assert json.loads(file["samples/references"].asstr()[0]) == ["a b", "c"]
        assert file["samples/text"].asstr()[0] == "x␀y ? 日本"
        assert file["final/past.0.key"].dtype == np.float32 and file["final/scale"][()] == 2


def test_read_gives_back_what_was_written(tmp_path: Path) -> None:
    first, second = tmp_path / "1.h5", tmp_path / "2.h5"
    results = blank()
    results.attributes["config"] = "x: é\n" * 40_000  # more than HDF5's 64 KiB for attributes stored in line
    play(results, 0, 3)
    results.set_samples([])
    results.set_partition(np.array([3]), label_names=["é"])
    results.set_final({"w": np.arange(3.0)})
    results.write(first, complete=False)
    again = Results.read(first)
    assert again.num_rounds == 3 and not again.complete
    assert again.attributes == results.attributes
    again.write(second, complete=False)
    for group in ("rounds", "clients", "events", "eval_samples", "partition", "samples", "final"):
        pandas.testing.assert_frame_equal(frame(first, group), frame(second, group))


def test_what_a_test_was_measured_on_is_beside_it(tmp_path: Path) -> None:
    path, again = tmp_path / "results.h5", tmp_path / "again.h5"
    results = blank()
    results.add_round({"round": 0, "eval_loss": 4.0})
    results.set_evaluated({"loss": Sampling(8, 196, "examples")})
    tested = {"loss": Sampling(300, 300, "examples", 2.4, 2.6, "normal"), "bleu": Sampling(50, 60, "prompts")}
    results.set_test({"loss": 2.5, "bleu": 30.0, "mine": 1.0}, tested)
    results.set_base({"loss": 5.0})
    results.set_tables({"questions": {"cut": np.array([True, False])}})
    results.write(path, complete=True)
    Results.read(path).write(again, complete=True)
    for one in (path, again):
        with h5py.File(one) as file:
            attributes = dict(file["test/loss"].attrs)
            assert attributes.pop("description").startswith("loss of the final state on the test split")
            assert attributes == tested["loss"]._asdict()
            assert (file["test/bleu"].attrs["of"], file["test/bleu"].attrs["unit"]) == (60, "prompts")
            assert "n" not in file["test/mine"].attrs and "n" not in file["base/loss"].attrs
            assert (file["rounds/eval_loss"].attrs["n"], file["rounds/eval_loss"].attrs["of"]) == (8, 196)
            assert "nats" in file["rounds/eval_loss"].attrs["description"]
            assert file["tables/questions/cut"].dtype == np.int8
    read = Results.read(again)
    assert read.sampling("test/loss") == tested["loss"] and read.sampling("test/mine") is None
    assert read.sampling("test/bleu") == pytest.approx(tested["bleu"], nan_ok=True)


def test_other_readers_of_hdf5_see_all_of_it(tmp_path: Path) -> None:
    netcdf, xarray = pytest.importorskip("netCDF4"), pytest.importorskip("xarray")
    path = tmp_path / "results.h5"
    results = blank()
    play(results, 0, 2)
    results.set_test({"loss": 2.5}, {"loss": Sampling(3, 3, "examples", 2.0, 3.0, "normal")})
    results.set_samples([{"prompt": "né :", "references": ["a"], "text": "日本"}])
    results.set_tables({"questions": {"cut": np.array([True, False])}})
    for complete in (False, True):
        results.write(path, complete)
        with h5py.File(path) as file:
            datasets: list[str] = []
            file.visit(datasets.append)
            names = {name: set(file[name].attrs) for name in datasets if isinstance(file[name], h5py.Dataset)}
            about = set(file.attrs)
        with netcdf.Dataset(path) as file:
            assert set(file.ncattrs()) == about and file.getncattr("complete") == complete
            for name, attributes in names.items():
                assert set(file[name].ncattrs()) == attributes
                file[name][...]
        for engine, more in (("netcdf4", {}), ("h5netcdf", {"phony_dims": "access"})):
            with xarray.open_dataset(path, engine=engine, **more) as root:
                assert bool(root.attrs["complete"]) is complete
            with xarray.open_dataset(path, engine=engine, group="rounds", **more) as rounds:
                assert rounds["eval_loss"].values[2] == 2.0


def test_rows_must_be_whole_and_in_order() -> None:
    results = blank()
    with pytest.raises(ValueError, match="after 0 rows"):
        results.add_round({"round": 1})
    play(results, 0, 0)
    with pytest.raises(ValueError, match="missing or unknown"):
        results.add_round({"round": 1, "train_loss": 1.0})
    with pytest.raises(ValueError, match="equally long"):
        results.add_clients({**{name: [1] for name in CLIENTS}, "tokens": [1, 2]})


@pytest.mark.parametrize("content", [b"", b"not HDF5", "cut", "other"])
def test_damaged_or_foreign_file_is_a_user_error(tmp_path: Path, content: bytes | str) -> None:
    path = tmp_path / "results.h5"
    if content == "other":
        with h5py.File(path, "w") as file:
            file["x"] = 1
    elif content == "cut":
        results = blank()
        play(results, 0, 3)
        results.write(path, complete=False)
        path.write_bytes(path.read_bytes()[:-4000])
    else:
        assert isinstance(content, bytes)
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"results\.h5"):
        Results.read(path)
    with pytest.raises(UserError, match="no such"):
        Results.read(tmp_path / "absent.h5")


def through_checkpoint(results: Results, directory: Path, round: int) -> None:
    meta, arrays = results.pending()
    save_checkpoint(directory, arrays, {"round": round, "results": meta})


def resumed(directory: Path) -> Results:
    checkpoint = load_checkpoint(directory)
    assert checkpoint is not None
    arrays, meta = checkpoint
    path = directory / "results.h5"
    results = Results.read(path) if path.exists() else blank()
    results.restore((meta["results"], arrays), meta["round"])
    assert results.num_rounds == meta["round"]
    return results


@pytest.mark.parametrize(("checkpoint_every", "write_every"), [(1, 1), (1, 3), (3, 1), (2, 3)])
@pytest.mark.parametrize("write_after_checkpoint", [True, False])
def test_resumed_file_equals_uninterrupted_one(
    tmp_path: Path,
    checkpoint_every: int,
    write_every: int,
    write_after_checkpoint: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Killed between any two steps of any round, twice: same rows, none lost on the way, none twice."""
    monkeypatch.setattr(
        "fedhpc.results.files.to_disk", lambda path: None
    )  # no power is cut here, and it takes most of the time
    rounds = 5
    path = tmp_path / "results.h5"
    whole = blank()
    play(whole, 0, rounds)
    for killed_at in (0, 2, 3):
        for file in tmp_path.rglob("*.*"):
            if file.is_file():
                file.unlink()
        results = blank()
        for attempt, stop in enumerate((killed_at, min(killed_at + 1, rounds), rounds)):
            if load_checkpoint(tmp_path) is not None:
                results = resumed(tmp_path)
                results.add_event(results.num_rounds, "resumed", f"attempt {attempt}")
                first = results.num_rounds + 1
            else:
                results, first = blank(), 0
            for t in range(first, stop + 1):
                play(results, t, t, mark=attempt)
                if t % checkpoint_every == 0 or t == rounds:
                    through_checkpoint(results, tmp_path, t)
                    if t == stop < rounds and not write_after_checkpoint:
                        break  # killed between checkpoint and results.h5
                if t % write_every == 0 or t == rounds:
                    before = len(Results.read(path).rounds["round"]) if path.exists() else 0
                    results.write(path, complete=t == rounds)
                    assert len(Results.read(path).rounds["round"]) >= max(before, t + 1)
        final = Results.read(path)
        for name, column in whole.rounds.items():
            if name != "seconds":
                np.testing.assert_array_equal(final.rounds[name], column)
        for name, column in whole.clients.items():
            np.testing.assert_array_equal(final.clients[name], column)
        for name, column in whole.eval_samples.items():
            assert [
                text.replace("␀", "\0") if isinstance(text, str) else text for text in final.eval_samples[name]
            ] == list(column)
        lost = [m for m in whole.events["message"] if m not in list(final.events["message"])]
        dropped = [
            m for m, kind in zip(final.events["message"], final.events["kind"], strict=True) if kind == "dropped"
        ]
        assert not lost and len(dropped) == rounds


def test_event_written_after_the_checkpoint_survives(tmp_path: Path) -> None:
    results = blank()
    play(results, 0, 2)
    through_checkpoint(results, tmp_path, 2)
    results.add_event(2, "preempted", "signal 15")
    results.set_base({"loss": 5.0})
    results.write(tmp_path / "results.h5", complete=False)
    kinds = resumed(tmp_path).events["kind"].tolist()
    assert kinds == ["dropped", "dropped", "preempted"]


def test_pending_is_what_the_file_lacks(tmp_path: Path) -> None:
    results = blank()
    play(results, 0, 2)
    results.set_base({"loss": 5.0})
    results.write(tmp_path / "results.h5", complete=False)
    play(results, 3, 3)
    meta, arrays = results.pending()
    assert arrays["rounds/round"].tolist() == [3] and len(arrays["clients/round"]) == 3
    assert meta["start"] == {"rounds": 3, "clients": 6, "events": 2, "eval_samples": 2}
    assert json.loads(json.dumps(meta)) == meta
    with pytest.raises(UserError, match=r"--fresh"):
        blank().restore((meta, arrays), 3)


def test_killed_writer_never_leaves_a_torn_file(tmp_path: Path) -> None:
    path = tmp_path / "results.h5"
    child = textwrap.dedent(f"""
        from pathlib import Path
        import numpy as np
        from fedhpc.results.results_file import CLIENTS, ROUNDS, Results
        path = Path({str(path)!r})
        results = Results.read(path) if path.exists() else Results({{}})
        results.set_final({{"w": np.zeros(1 << 17)}})
        while True:
            t = len(results.rounds["round"])
            results.add_round({{**dict.fromkeys(ROUNDS, 1), "round": t}})
            results.add_clients({{name: np.full(100, t) for name in CLIENTS}})
            results.write(path, complete=False)
            print(t, flush=True)
    """)
    reported = -1
    for kill in range(10):
        process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        reported = int(process.stdout.readline())
        time.sleep(0.007 * kill)
        process.send_signal(signal.SIGKILL)
        reported = max([reported, *map(int, process.communicate()[0].split())])
        results = Results.read(path)
        assert results.num_rounds >= reported  # what was reported is in the file
        assert len(results.clients["round"]) == 100 * (results.num_rounds + 1)
    assert reported >= 9


def test_thousand_rounds_of_a_hundred_clients_are_cheap() -> None:
    results = blank()
    results.add_round({"round": 0})
    rows = {name: np.arange(100) for name in CLIENTS}
    start = time.process_time()
    for t in range(1, 1001):
        results.add_round({**dict.fromkeys(ROUNDS, 1), "round": t})
        results.add_clients(rows)
    image = results.image(complete=False)
    assert time.process_time() - start < 5 and len(image) < 12e6
