"""The run directory: atomic files, checkpoints that notice a flipped bit, the lock, and decide()."""

from __future__ import annotations

import fcntl
import json
import os
import resource
import signal
import stat
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedhpc.config import Config, load
from fedhpc.errors import UserError
from fedhpc.results.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from fedhpc.results.files import atomic_write
from fedhpc.results.lock import take_lock
from fedhpc.results.resume import decide
from fedhpc.results.run_directory import begin, remove_temporary_files, write_config
from fedhpc.results.status import read_status, write_status

FEDAVG = Path(__file__).parents[1] / "configs" / "fedavg.yaml"


def config(*overrides: str) -> Config:
    return load(str(FEDAVG), ["evaluation.metrics=[]", *overrides])


def make_run(directory: Path, *overrides: str, round: int = 5, state: str = "running", rounds: int = 20) -> Config:
    """A directory as a run leaves it after `round` rounds."""
    directory.mkdir(exist_ok=True)
    made = config(f"federation.rounds={rounds}", *overrides)
    write_status(directory, state, round)  # type: ignore[arg-type]
    write_config(directory, made)
    meta = {"round": round, "block_size": 4, "fingerprint_data": "d1", "fingerprint_model": "m1"}
    save_checkpoint(directory, {"theta": np.arange(3.0)}, meta)
    (directory / "results.h5").write_bytes(b"results")
    (directory / "adapter").mkdir()
    (directory / "adapter" / "adapter_config.json").write_text("{}")
    return made


def listing(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A full disk, as far as a writer can tell (EFBIG instead of ENOSPC)."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


# ---------------------------------------------------------------- atomic files and checkpoint


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    atomic_write(path, b"old")
    atomic_write(path, b"new")
    assert listing(tmp_path) == {"file": b"new"}
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask  # readable for the group, unlike mkstemp's


def test_full_disk_keeps_the_old_file_and_says_so(tmp_path: Path) -> None:
    atomic_write(tmp_path / "results.h5", b"old")
    save_checkpoint(tmp_path, {"w": np.ones(3)}, {"round": 1})
    before = listing(tmp_path)
    with file_size_limit(50_000):
        with pytest.raises(UserError, match=r"results\.h5: cannot be written: File too large"):
            atomic_write(tmp_path / "results.h5", bytes(100_000))
        with pytest.raises(UserError, match=r"state\.safetensors: cannot be written: .*File too large"):
            save_checkpoint(tmp_path, {"w": np.ones(30_000)}, {"round": 2})
    assert listing(tmp_path) == before


def test_missing_directory_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be written: No such file"):
        atomic_write(tmp_path / "gone" / "file", b"")


def test_sweep_removes_only_stale_temporaries(tmp_path: Path) -> None:
    (tmp_path / "checkpoint").mkdir()
    stale = [
        tmp_path / ".results.h5.1.fedhpc-tmp",
        tmp_path / "checkpoint" / ".state.safetensors.1.fedhpc-tmp",
    ]
    for file in [*stale, tmp_path / ".hidden", tmp_path / "results.h5"]:
        file.write_bytes(b"x")
    remove_temporary_files(tmp_path)
    assert set(listing(tmp_path)) == {".hidden", "results.h5"}


def test_checkpoint_gives_back_tensors_and_meta(tmp_path: Path) -> None:
    assert load_checkpoint(tmp_path) is None
    tensors = {
        "scalar": np.float64(3.0),
        "transposed": np.arange(6, dtype=np.float32).reshape(2, 3).T,
        "sliced": np.arange(10)[::3],
        "empty": np.zeros((0, 4)),
        "mask": np.array([True, False]),
        "nan": np.array([np.nan, -0.0]),
    }
    meta = {"round": 3, "text": "é 日本 \0", "nan": float("nan"), "events": [[1, "x"]]}
    save_checkpoint(tmp_path, tensors, meta)
    loaded = load_checkpoint(tmp_path)
    assert loaded is not None
    assert repr(loaded[1]) == repr(meta)
    assert set(loaded[0]) == set(tensors)
    for name, array in tensors.items():
        assert loaded[0][name].shape == array.shape and loaded[0][name].dtype == array.dtype
        assert loaded[0][name].tobytes() == array.tobytes()
    save_checkpoint(tmp_path, {}, {"round": 4})
    assert load_checkpoint(tmp_path) == ({}, {"round": 4})


def test_every_flipped_bit_and_every_cut_is_noticed(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, {"a": np.arange(4.0), "b": np.arange(4.0)}, {"round": 3})
    path = tmp_path / CHECKPOINT
    whole = path.read_bytes()
    original = load_checkpoint(tmp_path)
    assert original is not None
    for position in range(len(whole)):
        broken = bytearray(whole)
        broken[position] ^= 1
        path.write_bytes(bytes(broken))
        try:
            loaded = load_checkpoint(tmp_path)
        except UserError:
            continue
        # A bit that says nothing: padding of the header, the value of "format".
        assert loaded is not None and loaded[1] == original[1]
        assert all(np.array_equal(loaded[0][name], original[0][name]) for name in original[0])
    for length in (0, 7, 8, 60, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"state\.safetensors: damaged.*--fresh"):
            load_checkpoint(tmp_path)


def test_killed_writer_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    child = textwrap.dedent(f"""
        from pathlib import Path
        import numpy as np
        from fedhpc.results.checkpoint import save_checkpoint
        for t in range(10**9):
            save_checkpoint(Path({str(tmp_path)!r}), {{"w": np.full(1 << 17, t)}}, {{"round": t}})
            print(t, flush=True)
    """)
    for kill in range(4):
        process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for _ in range(1 + 2 * kill):
            process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        reported = [int(line) for line in process.communicate()[0].split()]
        loaded = load_checkpoint(tmp_path)
        assert loaded is not None and (loaded[0]["w"] == loaded[1]["round"]).all()
        assert not reported or loaded[1]["round"] >= reported[-1]


# ---------------------------------------------------------------- status and lock


def test_status(tmp_path: Path) -> None:
    assert read_status(tmp_path) is None
    write_status(tmp_path, "preempted", 7, "signal 15")
    status = read_status(tmp_path)
    assert status is not None and (status.state, status.round, status.reason) == ("preempted", 7, "signal 15")
    content = json.loads((tmp_path / "status.json").read_text())
    assert content["state"] == "preempted" and content["updated_utc"].endswith("+00:00")


def test_lock_holds_until_the_process_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedhpc.results.lock.LOCK_WAIT_S", 0.2)
    directory = tmp_path / "a" / "run"
    child = textwrap.dedent(f"""
        import sys
        from pathlib import Path
        from fedhpc.results.lock import take_lock
        held = take_lock(Path({str(directory)!r}))
        print(held.held, flush=True)
        sys.stdin.read()
    """)
    process = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "True\n"
    for refused in (lambda: take_lock(directory), lambda: decide(config(), directory, fresh=True)):
        with pytest.raises(UserError, match=rf"in use by a live run, pid {process.pid} on "):
            refused()
    process.kill()
    process.communicate()
    held = take_lock(directory)
    held.close()
    assert decide(config(), directory, fresh=False) == "fresh"


def test_lock_waits_for_a_dying_predecessor_and_says_when_there_are_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    child = f"""
import time
from pathlib import Path
from fedhpc.results.lock import take_lock
held = take_lock(Path({str(tmp_path)!r}))
print("held", flush=True)
time.sleep(0.5)
"""
    process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    monkeypatch.setattr("fedhpc.results.lock.LOCK_WAIT_S", 30.0)
    take_lock(tmp_path).close()
    process.communicate()

    def no_locks(descriptor: int, kind: int) -> None:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    unheld = take_lock(tmp_path)
    assert unheld.held is False
    unheld.close()


# ---------------------------------------------------------------- decide


def test_new_and_foreign_directories(tmp_path: Path) -> None:
    assert decide(config(), tmp_path / "a" / "b", fresh=False) == "fresh"
    assert decide(config(), tmp_path, fresh=False) == "fresh"
    (tmp_path / "notes.txt").write_text("mine")
    assert decide(config(), tmp_path, fresh=False) == "fresh"
    (tmp_path / "config.yaml").write_text("mine too")
    (tmp_path / "adapter").mkdir()
    before = listing(tmp_path)
    for fresh in (False, True):
        with pytest.raises(UserError, match=r"holds no run of fedhpc, but config\.yaml, adapter"):
            decide(config(), tmp_path, fresh=fresh)
    assert listing(tmp_path) == before
    with pytest.raises(UserError, match="is not a directory"):
        decide(config(), tmp_path / "notes.txt" / "run", fresh=False)
    with pytest.raises(UserError, match="cannot be the run directory"):
        take_lock(tmp_path / "notes.txt" / "run")


def test_unwritable_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:  # root may write everywhere
        monkeypatch.setattr(os, "access", lambda *_: False)
    tmp_path.chmod(0o555)
    with pytest.raises(UserError, match=r"no permission to write.*choose another run\.dir"):
        decide(config(), tmp_path / "run", fresh=False)
    tmp_path.chmod(0o755)


def test_unfinished_run_resumes_and_nothing_is_written(tmp_path: Path) -> None:
    for state in ("running", "preempted", "failed"):
        run = tmp_path / state
        same = make_run(run, state=state)
        before = listing(run)
        assert decide(same, run, fresh=False) == "resume"
        assert decide(same, run, False, "d1", "m1") == "resume"
        assert decide(same, run, fresh=True) == "fresh"
        assert listing(run) == before
    (run / "status.json").unlink()
    assert decide(same, run, fresh=False) == "resume"


@pytest.mark.parametrize(
    "change",
    [
        ["run.name=other", "run.dir=elsewhere"],
        ["runtime.transport=mpi", "runtime.device=cpu", "runtime.timeout_s=30", "runtime.threads=2"],
        ["runtime.block_size=4"],  # what auto was resolved to
        ["checkpoint.every=3"],
        ["federation.rounds=25"],
        ["federation.rounds=5"],
        ["evaluation.test_max_examples=300"],
    ],
)
def test_what_a_resumed_run_may_change(tmp_path: Path, change: list[str]) -> None:
    make_run(tmp_path)
    assert decide(config("federation.rounds=20", *change), tmp_path, fresh=False) == "resume"


def test_the_cohort_of_ten_that_older_versions_wrote_down(tmp_path: Path) -> None:
    same = make_run(tmp_path)
    path = tmp_path / "config.yaml"
    assert same.federation.cohort_size is None and "cohort_size: null" in path.read_text()
    path.write_text(path.read_text().replace("cohort_size: null", "cohort_size: 10"))
    assert decide(same, tmp_path, fresh=False) == "resume"
    with pytest.raises(UserError, match=r"federation\.cohort_size 10 -> 9"):
        decide(config("federation.rounds=20", "federation.cohort_size=9"), tmp_path, fresh=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["client.lr=0.2"], r"another configuration: client\.lr 0\.05 -> 0\.2; choose"),
        (["runtime.block_size=8"], r"runtime\.block_size auto -> 8"),
        (["runtime.workers=2"], r"runtime\.workers 8 -> 2"),
        (["run.seed=1"], r"run\.seed 0 -> 1"),
        (["method.name=full"], r"method\.name prefix -> full, method\.num_virtual_tokens 16 -> \(absent\)"),
        (["data.where={near: [a]}"], r"data\.where {} -> \(absent\), data\.where\.near\.0 \(absent\) -> a"),
        (
            [f"client.{k}" for k in ("lr=1.0", "batch_size=2", "clip_norm=1.0", "weight_decay=0.1", "epochs=3")],
            "and 1 more; choose",
        ),
        (["federation.rounds=4"], "5 rounds are done, federation.rounds cannot be 4"),
    ],
)
def test_another_run_is_refused_with_what_differs(tmp_path: Path, change: list[str], message: str) -> None:
    make_run(tmp_path)
    with pytest.raises(UserError, match=message) as error:
        decide(config("federation.rounds=20", *change), tmp_path, fresh=False)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
    assert decide(config(*change), tmp_path, fresh=True) == "fresh"


@pytest.mark.parametrize(("data", "model", "what"), [("d2", "m1", "data"), ("d1", "m2", "model")])
@pytest.mark.parametrize("state", ["running", "complete"])
def test_changed_content_is_refused(tmp_path: Path, data: str, model: str, what: str, state: str) -> None:
    same = make_run(tmp_path, state=state)
    with pytest.raises(UserError, match=f"content of the {what} changed"):
        decide(same, tmp_path, False, data, model)


def test_a_run_that_began_in_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 23: relative paths are other places there; only what is missing or changed stands in the way."""
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    (first / "texts").mkdir()
    (first / "base").mkdir()
    changes = ["data.source=texts", "partition.name=iid", "model.name=./base"]
    monkeypatch.chdir(first)
    meta = {"round": 5, "block_size": 4, "fingerprint_data": "d1", "fingerprint_model": "m1"}
    same = make_run(tmp_path / "run", *changes)
    save_checkpoint(tmp_path / "run", {"theta": np.arange(3.0)}, {**meta, "working_directory": str(first)})
    assert decide(same, tmp_path / "run", fresh=False) == "resume"
    monkeypatch.chdir(second)
    before = listing(tmp_path / "run")
    with pytest.raises(
        UserError, match=rf"began in {first}, where model\.name '\./base' is; here, in {second}, there is"
    ):
        decide(same, tmp_path / "run", fresh=False)
    (second / "base").mkdir()
    with pytest.raises(UserError, match=rf"where data\.source 'texts' is; .* give the same command in {first}"):
        decide(same, tmp_path / "run", fresh=False)
    (second / "texts").mkdir()
    (first / "prefix").mkdir()  # called like the method, which is no path
    assert decide(same, tmp_path / "run", False, "d1", "m1") == "resume"
    with pytest.raises(UserError, match=rf"content of the data changed .* it began in {first}, and relative paths are"):
        decide(same, tmp_path / "run", False, "d2", "m1")
    assert listing(tmp_path / "run") == before
    write_status(tmp_path / "run", "complete", 20)
    (second / "texts").rmdir()
    assert decide(same, tmp_path / "run", fresh=False) == "finished"


def test_finished_runs(tmp_path: Path) -> None:
    same = make_run(tmp_path, round=20, state="complete")
    assert decide(same, tmp_path, fresh=False) == "finished"
    assert decide(config("federation.rounds=30"), tmp_path, fresh=False) == "resume"
    with pytest.raises(UserError, match=r"evaluation\.test_max_examples null -> 9"):  # its test is done
        decide(config("evaluation.test_max_examples=9"), tmp_path, fresh=False)
    with pytest.raises(UserError, match="20 rounds are done"):
        decide(config("federation.rounds=10"), tmp_path, fresh=False)
    (tmp_path / CHECKPOINT).unlink()  # to save space
    assert decide(same, tmp_path, fresh=False) == "finished"
    with pytest.raises(UserError, match="cannot be extended"):
        decide(config("federation.rounds=30"), tmp_path, fresh=False)
    write_status(tmp_path, "failed", 20)
    with pytest.raises(UserError, match="has no checkpoint, cannot resume"):
        decide(same, tmp_path, fresh=False)


@pytest.mark.parametrize("course", ["client.schedule=linear", "client.warmup=0.1"])
@pytest.mark.parametrize("state", ["running", "complete"])
def test_rounds_cannot_change_under_a_schedule(tmp_path: Path, course: str, state: str) -> None:
    same = make_run(tmp_path, course, round=20, state=state)
    assert decide(same, tmp_path, fresh=False) == ("finished" if state == "complete" else "resume")
    with pytest.raises(UserError, match="would change the learning rates"):
        decide(config("federation.rounds=30", course), tmp_path, fresh=False)


def test_run_that_ended_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    begin(tmp_path)
    assert decide(config(), tmp_path, fresh=False) == "fresh"
    write_config(tmp_path, config())
    write_status(tmp_path, "failed", 0, "out of memory")
    assert decide(config("client.lr=0.2"), tmp_path, fresh=False) == "fresh"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.yaml", None, r"config\.yaml: there is no such.*mend it, or start over with --fresh"),
        ("config.yaml", "mode: fedrated", r"unknown value 'fedrated'.*mend it, or start over with --fresh"),
        ("checkpoint/state.safetensors", "x", r"state\.safetensors: damaged"),
        ("status.json", '{"format": "fedhpc-run"}', r"status\.json: damaged; delete it"),
    ],
)
def test_damaged_run(tmp_path: Path, file: str, content: str | None, message: str) -> None:
    same = make_run(tmp_path)
    if content is None:
        (tmp_path / file).unlink()
    else:
        (tmp_path / file).write_text(content)
    with pytest.raises(UserError, match=message):
        decide(same, tmp_path, fresh=False)


def test_begin_removes_our_files_and_nothing_else(tmp_path: Path) -> None:
    run = tmp_path / "run"
    make_run(run)
    (run / "clients").mkdir()
    (run / "clients" / "state").write_text("x")
    foreign: dict[str, Any] = {"notes.txt": b"mine", "report/table.md": b"mine", "data/config.yaml": b"mine"}
    for name, content in foreign.items():
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).write_bytes(content)
    (run / ".results.h5.99.fedhpc-tmp").write_bytes(b"x")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("mine")
    (run / "adapter" / "adapter_config.json").unlink()
    (run / "adapter").rmdir()
    (run / "adapter").symlink_to(elsewhere)
    begin(run)
    left = listing(run)
    status = json.loads(left.pop("status.json"))
    assert left == foreign and status["state"] == "running" and status["round"] == 0
    assert not (run / "adapter").exists() and (elsewhere / "kept").exists()
