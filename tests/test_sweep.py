"""Sweeps: what a grid expands to, one line for a mistake, and real runs that are skipped, continued and compared."""

from __future__ import annotations

import csv
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import yaml

from fedhpc import config as configuration
from fedhpc import federation, sweep
from fedhpc.halving import Halving
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.results.lock import take_lock
from fedhpc.results.status import read_status, write_status
from tests import test_quadratic
from tests.federations import Interrupted, final, table

SWEEPS = Path(__file__).resolve().parents[1] / "configs" / "sweeps"
GRID = [
    {
        "method": {
            "prefix": {"method.name": "prefix", "method.num_virtual_tokens": 4, "client.lr": 0.1},
            "lora": {"method.name": "lora", "method.rank": 2},
        }
    },
    {"partition.alpha": [0.1, 1.0], "run.seed": [0, 3]},
]


def write(path: Path, **keys: object) -> Path:
    """A sweep in the folder `path`; its runs go to runs/ there."""
    path.mkdir(parents=True, exist_ok=True)
    file = path / "sweep.yaml"
    file.write_text(yaml.safe_dump({"name": "few", "dir": str(path / "runs"), "grid": GRID, **keys}, sort_keys=False))
    return file


def early(
    factor: int = 3,
    after: Sequence[int] = (1, 3),
    grid: Sequence[object] = ({"client.lr": [0.1, 0.2]},),
    **keys: object,
) -> dict[str, object]:
    """The keys of a sweep with rungs, of runs of nine rounds."""
    common = {"federation.rounds": 9, "evaluation.every": 1, **keys}
    return {"early_stop": {"factor": factor, "after": list(after)}, "grid": list(grid), "set": common}


def listed(file: Path, capsys: pytest.CaptureFixture[str], *arguments: str) -> list[list[str]]:
    capsys.readouterr()
    assert sweep.main([str(file), "--list", *arguments]) == 0
    return [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]


# ---------------------------------------------------------------- the grid


def test_expansion(tmp_path: Path) -> None:
    _, cells = sweep.load(write(tmp_path, set={"client.epochs": 2, "method.name": "lora", "method.alpha": 3.0}))
    assert [cell.name for cell in cells] == [
        *("prefix-alpha_0.1-s0", "prefix-alpha_0.1-s3", "prefix-alpha_1.0-s0", "prefix-alpha_1.0-s3"),
        *("lora-alpha_0.1-s0", "lora-alpha_0.1-s3", "lora-alpha_1.0-s0", "lora-alpha_1.0-s3"),
    ]
    prefix, lora = cells[3].config, cells[6].config
    assert (prefix.method.name, prefix.method.num_virtual_tokens, prefix.client.lr) == ("prefix", 4, 0.1)
    assert (prefix.partition.alpha, prefix.run.seed, prefix.client.epochs) == (1.0, 3, 2)
    assert prefix.run_dir == tmp_path / "runs" / "prefix-alpha_1.0-s3"
    # lora is what `set` chose too, so the option given there is its own; lr is the base's.
    assert (lora.method.rank, lora.method.alpha, lora.run.seed) == (2, 3.0, 0)
    assert lora.client.lr == configuration.load(None, []).client.lr
    assert not hasattr(prefix.method, "rank") and not (tmp_path / "runs").exists()


def test_command_line_and_base(tmp_path: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("run: {name: other, seed: 7}\nclient: {steps: 3}\npartition: {name: iid}\n")
    file = write(tmp_path, base=str(base), grid=[{"client.clip_norm": [None, 1.5]}, {"mode": ["federated", "local"]}])
    _, cells = sweep.load(file, ["client.epochs=2", f"sweep.dir={tmp_path / 'elsewhere'}"])
    assert [cell.name for cell in cells] == [
        *("clip_norm_null-federated-s7", "clip_norm_null-local-s7"),
        *("clip_norm_1.5-federated-s7", "clip_norm_1.5-local-s7"),
    ]
    assert all(cell.config.client.epochs == 2 and cell.config.client.steps is None for cell in cells)
    assert cells[3].config.run_dir == tmp_path / "elsewhere" / cells[3].name


@pytest.mark.parametrize("path", sorted(SWEEPS.glob("*.yaml")), ids=lambda p: p.stem)
def test_committed_sweeps_resolve(path: Path) -> None:
    _, cells = sweep.load(path)
    assert len(cells) > 1


@pytest.mark.parametrize(
    ("keys", "arguments", "message"),
    [
        ({"gird": []}, [], "did you mean 'grid'"),
        ({"grid": None}, [], "sweep.grid"),
        ({"name": "a/b"}, [], "sweep.name"),
        ({"base": "missing.yaml"}, [], "missing.yaml: there is no such"),
        ({"grid": [{"client.lrr": [1, 2]}]}, [], "run lrr_1-s0: unknown key 'client.lrr'; did you mean 'lr'"),
        ({"grid": [{"client.lr": [0.1, "fast"]}]}, [], "run fast-s0: client.lr"),
        ({"grid": [{"clinet.lr": [0.1]}]}, [], "did you mean 'client'"),
        ({"grid": [{"client.lr": []}]}, [], "client.lr must be a list of values or"),
        ({"grid": [{"client.lr": 0.1}]}, [], "client.lr must be a list of values or"),
        ({"grid": [{"client.lr": [0.1, 0.1]}]}, [], "two runs are called 'lr_0.1-s0'"),
        ({"grid": [{"evaluation.metrics": [["loss"]]}]}, [], "['loss'] needs a label"),
        ({"grid": [{"x": {"a/b": {"client.lr": 1.0}}}]}, [], "the label 'a/b'"),
        ({"grid": [{"x": {"a": 3}}]}, [], "x: a must be {section.key: value}, got 3"),
        ({"grid": [{"x": {"a": {"client.lr": 0.1}}, "client.lr": [0.2]}]}, [], "client.lr is set by two axes"),
        ({"grid": [{"run.name": ["a"]}]}, [], "run.name cannot be set here"),
        ({"set": {"run.dir": "a"}}, [], "run.dir cannot be set here"),
        ({"set": {"method.rank": 3}}, [], "unknown key 'method.rank'"),
        ({}, ["method.name=lora"], "method.name is set by an axis"),
        ({}, ["client.lr"], "not of the form"),
        ({}, ["--index", "8"], "there are runs 0 to 7"),
        ({"launch": "no-such-command x"}, [], "there is no such command"),
        ({"launch": "'"}, [], "sweep.launch"),
        ({"dir": "a=b"}, [], "must not have a '='"),
        (early(after=[]), [], "sweep.early_stop.after"),
        (early(after=[0]), [], "sweep.early_stop.after.0"),
        (early(after=[2, 1]), [], "each round must come after the one before it, got [2, 1]"),
        (early(factor=1), [], "sweep.early_stop.factor"),
        (early(after=[9]), [], "after round 9 there is none to go on with (federation.rounds 9)"),
        (early(**{"evaluation.every": 2}), [], "run lr_0.1-s0: it is not evaluated after round 1 (evaluation.every 2)"),
        (early(**{"evaluation.metrics": ["perplexity"]}), [], "not in evaluation.metrics ['perplexity']"),
        (early(grid=[{"run.seed": [0, 1]}]), [], "there is nothing to choose"),
        (early(grid=[{"data.max_length": [64, 96]}]), [], "max_length_96-s0: its loss does not compare with that of"),
        (early(), ["--index", "1"], "--index does one run alone, and sweep.early_stop ranks all"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(
    keys: dict[str, object], arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # "true" would take any configuration, so a run that starts shows in the folder.
    file = write(tmp_path, **{"launch": "true", **keys})
    assert sweep.main([str(file), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1 and error.startswith("fedhpc sweep: error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["sweep.yaml"]


def test_a_folder_of_another_configuration_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, launch="true")
    folder = tmp_path / "runs" / "lora-alpha_1.0-s3"
    folder.mkdir(parents=True)
    (folder / "results.h5").touch()
    assert sweep.main([str(file)]) == 2
    assert "lora-alpha_1.0-s3: holds no run of fedhpc" in capsys.readouterr().err
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_list_and_dry_run_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, launch="true")
    rows = listed(file, capsys)
    assert rows[5] == ["5", "lora-alpha_0.1-s3", "waiting"] and len(rows) == 8
    assert listed(file, capsys, "--index", "5") == rows[5:6]
    assert sweep.main([str(file), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert 'method.name="lora" method.rank=2 partition.alpha=0.1 run.seed=3' in text
    assert f"true {tmp_path}/runs/lora-alpha_0.1-s3.yaml" in text
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- what a run's exit means; no federation is run


def started(file: Path) -> list[str]:
    """The runs that a command of `logging` was started for, in order."""
    log = file.parent / "log"
    return [Path(line).stem for line in log.read_text().split()] if log.exists() else []


def logging(folder: Path, rest: str) -> str:
    """A launch command that notes its configuration file and then does `rest`."""
    script = folder / "launch.sh"
    folder.mkdir(parents=True, exist_ok=True)
    script.write_text(f'echo "$1" >> {folder}/log\n{rest}\n')
    return f"bash {script}"


def test_a_failing_run_does_not_stop_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, launch=logging(tmp_path, "exit 1"), grid=[{"run.seed": [0, 1, 2]}])
    assert sweep.main([str(file)]) == 1
    assert started(file) == ["few-s0", "few-s1", "few-s2"]
    captured = capsys.readouterr()
    assert captured.err.count("few-s1 failed: exit code 1") == 1
    assert "[2/3] few-s1: waiting, starting\n[2/3] few-s1: exit code 1" in captured.out
    # The file that the command gets is the whole configuration of the run.
    config = configuration.load(str(tmp_path / "runs" / "few-s2.yaml"), [])
    assert (config.run.seed, config.run_dir) == (2, tmp_path / "runs" / "few-s2")
    folder = tmp_path / "runs" / "few-s0"
    folder.mkdir()
    write_status(folder, "failed", 3, "rank 1 died")
    assert [row[2] for row in listed(file, capsys)] == ["failed", "waiting", "waiting"]


def test_a_preempted_run_stops_the_sweep_with_75(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, launch=logging(tmp_path, "exit 75"))
    assert sweep.main([str(file)]) == 75
    assert len(started(file)) == 1 and "the same command goes on" in capsys.readouterr().err


def test_one_index_runs_one_run(tmp_path: Path) -> None:
    file = write(tmp_path, launch=logging(tmp_path, "exit 1"))
    assert sweep.main([str(file), "--index", "6"]) == 1
    assert started(file) == ["lora-alpha_1.0-s0"]


def test_a_run_in_use_is_left_to_its_owner(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path, launch=logging(tmp_path, "exit 1"), grid=[{"run.seed": [0, 1]}])
    lock = take_lock(tmp_path / "runs" / "few-s0")
    assert listed(file, capsys) == [["0", "few-s0", "in use"], ["1", "few-s1", "waiting"]]
    assert sweep.main([str(file), "--index", "0"]) == 2
    assert "in use by another process: few-s0" in capsys.readouterr().err
    assert sweep.main([str(file)]) == 1 and started(file) == ["few-s1"]
    lock.close()
    assert sweep.main([str(file)]) == 1 and started(file) == ["few-s1", "few-s0", "few-s1"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2, signal.SIGINT])
def test_a_signal_goes_to_the_run(number: signal.Signals, tmp_path: Path) -> None:
    rest = f"trap 'echo ended >> {tmp_path}/log; kill $!; exit 75' TERM; sleep 60 & wait"
    file = write(tmp_path, launch=logging(tmp_path, rest))
    process = subprocess.Popen([sys.executable, "-m", "fedhpc.sweep", str(file)], stderr=subprocess.PIPE, text=True)
    until(lambda: len(started(file)) == 1)
    time.sleep(0.2)  # the trap comes after the line
    process.send_signal(number)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 75 and error.count("\n") == 1
    assert started(file) == ["prefix-alpha_0.1-s0", "ended"]


def until(condition: Callable[[], bool], limit_s: float = 120.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---------------------------------------------------------------- successive halving

RATES = [0.001, 0.003, 0.006, 0.01, 0.02, 0.06, 0.05, 0.04, 0.03]  # the sixth is best
QUADRATIC = {
    **{"model.dtype": "float64", "partition": {"name": "iid", "num_clients": 6}, "federation.cohort_size": 4},
    **{"client.optimizer": "sgd", "client.batch_size": 2, "client.schedule": "cosine", "evaluation.samples": 0},
    **{"evaluation.metrics": ["loss"], "runtime.workers": 1},
}


class Here:
    """Stands in for the process of a run, whose clients are those of tests/test_quadratic.py, in this process."""

    rounds = 0  # that were trained
    killed_after: set[int]  # of these
    failing: set[str]  # names of runs

    def __init__(self, command: Sequence[str], **_: object) -> None:
        file, until = command[1], command[3] if command[2:3] == ["--until"] else None
        config = configuration.load(file, [])
        self.code, self.began = int(config.run.name in Here.failing), -1
        if not self.code:
            approach = test_quadratic.quadratic(test_quadratic.inputs(config))
            run = federation.Run(approach, self.on_round, nullcontext())
            federation.run_together([run], LoopbackTransport(), False, int(until) if until else None)

    def on_round(self, round_: int) -> None:
        Here.rounds += self.began >= 0 and round_ > self.began
        self.began = round_
        if Here.rounds in Here.killed_after:
            Here.killed_after.remove(Here.rounds)
            raise Interrupted

    def wait(self) -> int:
        return self.code

    poll = wait


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.subprocess, "Popen", Here)
    Here.rounds, Here.killed_after, Here.failing = 0, set(), set()


@pytest.mark.usefixtures("_here")
def test_the_best_go_on_also_when_the_sweep_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The winner is that of the sweep without rungs, to the bit, for 21 of 81 rounds."""
    file = write(tmp_path, launch="true", **early(grid=[{"client.lr": RATES}], **QUADRATIC))
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "compare", lambda *_, **__: None)
        assert sweep.main([str(file), "sweep.early_stop=null", f"sweep.dir={tmp_path / 'all'}"]) == 0
    assert Here.rounds == 9 * 9
    ends = {lr: table(tmp_path / "all" / f"lr_{lr}-s0", "rounds")["eval_loss"][-1] for lr in RATES}
    assert min(ends, key=ends.__getitem__) == 0.06

    Here.rounds, Here.killed_after = 0, {3, 11, 17}
    for _ in range(3):  # while it is on its way to each rung, and to the end
        with pytest.raises(Interrupted):
            sweep.main([str(file)])
    assert sweep.main([str(file), "--dry-run"]) == 0
    text = capsys.readouterr().out
    assert "the best 3 of 9 settings go on after round 1, the best 1 of 3 settings go on after round 3\n" in text
    assert text.count("true ") == 1 and f"true {tmp_path}/runs/lr_0.06-s0.yaml\n" in text
    assert sweep.main([str(file)]) == 0
    assert Here.rounds == 9 * 1 + 3 * 2 + 1 * 6
    text = capsys.readouterr().out
    assert "\nafter round 3: 1 of 3 settings go on, by validation loss: lr_0.06 (" in text
    assert "1 of 9 runs compared, 8 stopped early\n" in text
    one, other = (final(tmp_path / folder / "lr_0.06-s0") for folder in ("all", "runs"))
    assert one["x"].tobytes() == other["x"].tobytes()
    first, second = ("stopped early after round 1", "stopped early after round 3")
    assert [" ".join(row[2:]) for row in listed(file, capsys)] == [*[first] * 5, "complete", second, second, first]
    with open(tmp_path / "runs" / "comparison" / "comparison.csv") as csv_file:
        assert [row["run"] for row in csv.DictReader(csv_file)] == ["lr_0.06-s0"]
    page = (tmp_path / "runs" / "comparison" / "comparison.md").read_text()
    assert "Stopped after round 3 by their validation loss, and not compared: lr_0.05 (" in page


@pytest.mark.usefixtures("_here")
def test_a_failed_run_takes_its_setting_out_and_comes_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {**QUADRATIC, "federation.rounds": 2}
    file = write(tmp_path, launch="true", **early(after=[1], grid=[{"client.lr": [0.01, 0.06, 0.03]}], **changes))
    Here.failing = {"lr_0.06-s0"}
    assert sweep.main([str(file)]) == 1
    captured = capsys.readouterr()
    assert "; not ranked, since a run failed: lr_0.06\n" in captured.out and captured.err.count("\n") == 1
    assert [" ".join(row[2:]) for row in listed(file, capsys)] == ["paused after round 1", "waiting", "complete"]
    Here.failing = set()
    assert sweep.main([str(file)]) == 0
    assert [" ".join(row[2:]) for row in listed(file, capsys)] == ["stopped early after round 1", *["complete"] * 2]


def test_settings_are_ranked_by_the_mean_over_their_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss that is not a number comes last; who failed before a rung is out, who has not come there is waited for."""
    keys = early(factor=2, grid=[{"client.lr": [0.1, 0.2, 0.3, 0.4]}, {"run.seed": [0, 1]}])
    sweep_keys, cells = sweep.load(write(tmp_path, **keys))
    assert sweep_keys.early_stop is not None
    halving = Halving(sweep_keys.early_stop, [cell.config for cell in cells], "here")
    losses: dict[int, list[float | None]] = {
        1: [9.0, 1.0, 4.0, 4.0, math.nan, 0.0, 3.0, 3.5],
        3: [None, None, 4.0, 2.0, None, None, 1.0, None],
    }
    monkeypatch.setattr(halving, "_loss", lambda run, after: losses[after][run])
    (rung,) = halving.decided(failed=[])
    assert [setting.name for setting in rung.going] == ["lr_0.2", "lr_0.4"]
    assert [setting.name for setting in rung.losses] == ["lr_0.4", "lr_0.2", "lr_0.1", "lr_0.3"]
    _, rung = halving.decided(failed=[7])
    assert [setting.runs for setting in rung.going] == [(2, 3)]
    assert rung.line.endswith("by validation loss: lr_0.2 (3.0000); not ranked, since a run failed: lr_0.4")
    losses[1][0] = None
    assert halving.decided(failed=[]) == []
    rung, _ = halving.decided(failed=[0, 7])
    assert [setting.name for setting in rung.losses] == ["lr_0.4", "lr_0.2", "lr_0.3"]


# ---------------------------------------------------------------- real runs

TINY = {
    **{"client.steps": 1, "federation.rounds": 1, "federation.cohort_size": 2},
    **{"evaluation.metrics": ["loss"], "evaluation.max_examples": 4, "evaluation.samples": 0},
}


def launch(file: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "fedhpc.sweep", str(file), *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, text=True, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def test_stopped_in_the_middle_and_started_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second of two runs is interrupted after some rounds: nothing is lost, nothing repeated."""
    grid = [{"x": {"a": {}, "b": {"client.lr": 0.01, "federation.rounds": 50}}}]
    file = write(tmp_path, set=TINY, grid=grid)
    first, second = tmp_path / "runs" / "a-s0", tmp_path / "runs" / "b-s0"
    process = launch(file)
    until(lambda: (second / "results.h5").exists() and read_status(second).round > 2)  # type: ignore[union-attr]
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 75, text
    assert [row[2] for row in listed(file, capsys)] == ["complete", "preempted"]
    done = read_status(second).round  # type: ignore[union-attr]
    before = (first / "results.h5").stat()

    process = launch(file)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert f"resuming after round {done}" in text and f"round {done}/50 " not in text
    assert table(second, "rounds")["round"].tolist() == list(range(51))
    assert list(table(second, "events")["kind"]).count("resumed") == 1
    after = (first / "results.h5").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    comparison = tmp_path / "runs" / "comparison"
    with open(comparison / "comparison.csv") as csv_file:
        assert [row["run"] for row in csv.DictReader(csv_file)] == ["a-s0", "b-s0"]
    assert {"comparison.md", "eval_loss.png", "test.png"} <= {path.name for path in comparison.iterdir()}
    assert [row[2] for row in listed(file, capsys)] == ["complete", "complete"]


@pytest.mark.slow
def test_killed_in_the_middle_and_started_again(tmp_path: Path) -> None:
    """As when a machine goes down: the sweep and its run are gone at once. The run that is done is left as it is, the
    other one goes on and ends with the same bits."""
    file = write(tmp_path, together=1, set={**TINY, "federation.rounds": 12}, grid=[{"x": {"a": {}, "b": {}}}])
    first, second = tmp_path / "runs" / "a-s0", tmp_path / "runs" / "b-s0"
    process = launch(file)
    until(lambda: (second / "results.h5").exists() and read_status(second).round > 2)  # type: ignore[union-attr]
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for child in children:  # in a session of its own
        os.kill(int(child), signal.SIGKILL)
    process.communicate(timeout=120)
    assert read_status(second).state == "running" and len(children) == 1  # type: ignore[union-attr]
    before = (first / "results.h5").stat()

    process = launch(file)
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 0, text
    assert "a-s0: complete" in text and "b-s0: interrupted, starting" in text and "a-s0: waiting" not in text
    after = (first / "results.h5").stat()
    assert (after.st_mtime_ns, after.st_ino) == (before.st_mtime_ns, before.st_ino)
    assert table(second, "rounds")["round"].tolist() == list(range(13))
    assert list(table(second, "events")["kind"]).count("resumed") == 1
    for name, tensor in table(first, "final").items():
        np.testing.assert_array_equal(table(second, "final")[name], tensor)


@pytest.mark.soak
def test_two_sweeps_at_once_share_the_work_and_compare(tmp_path: Path) -> None:
    """Under torchrun too; with seeds in common there is a table of paired differences."""
    methods = {"prefix": {"method.name": "prefix"}, "lora": {"method.name": "lora"}}
    command = "torchrun --standalone --nproc_per_node=2 -m fedhpc.main"
    file = write(tmp_path, set=TINY, grid=[{"m": methods}, {"run.seed": [0, 1]}], launch=command)
    both = [launch(file), launch(file)]
    texts = [process.communicate(timeout=600)[0] for process in both]
    assert {process.returncode for process in both} <= {0, 2} and 0 in [p.returncode for p in both], texts
    test: dict[str, list[float]] = {}
    for method in methods:
        for seed in (0, 1):
            run = tmp_path / "runs" / f"{method}-s{seed}"
            assert read_status(run).state == "complete"  # type: ignore[union-attr]
            assert table(run, "rounds")["round"].tolist() == [0, 1]
            assert "resumed" not in list(table(run, "events")["kind"])
            test.setdefault(method, []).append(float(np.mean(table(run, "test")["loss"])))
    with open(tmp_path / "runs" / "comparison" / "differences.csv") as csv_file:
        (row,) = csv.DictReader(csv_file)
    assert (row["group"], row["baseline"], row["metric"], row["seeds"]) == ("lora", "prefix", "loss", "2")
    assert float(row["mean"]) == pytest.approx(np.mean(np.subtract(test["lora"], test["prefix"])))


@pytest.mark.slow
def test_a_run_that_cannot_be_done_names_its_reason(tmp_path: Path) -> None:
    grid = [{"data": {"bad": {"data.source": str(tmp_path / "nothing"), "data.label": "label"}, "good": {}}}]
    process = launch(write(tmp_path, set=TINY, grid=grid))
    text, _ = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "bad-s0 failed: exit code 2" in text and "good-s0: complete" in text and "1 of 2 runs compared" in text


def test_a_sweep_under_a_launcher_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert sweep.main([str(write(tmp_path)), "--dry-run"]) == 2
    assert "a sweep is one process" in capsys.readouterr().err
