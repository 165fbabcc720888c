"""Runs that train together: each ends as if it were alone, and none harms its neighbours."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from fedhpc import config as configuration
from fedhpc import federation, main, sweep
from fedhpc.approaches.averaging import local
from fedhpc.approaches.averaging.approach import Averaging
from fedhpc.approaches.base import AnyApproach
from fedhpc.approaches.prepare import prepare
from fedhpc.config import Config
from fedhpc.config.together import shared_settings
from fedhpc.errors import UserError
from fedhpc.federation import run_together
from fedhpc.halving import Halving
from fedhpc.ranks import process
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.process import Rank, SavedRounds
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.ranks.verdict import RefusedError
from fedhpc.results.lock import take_lock
from fedhpc.results.results_file import Results
from fedhpc.results.status import read_status, write_status
from fedhpc.training.block import train_block
from tests.federations import (
    Interrupted,
    federate,
    federate_together,
    final,
    save_random_bert,
    settings,
    table,
    tree,
    write_texts,
)

METHODS: dict[str, dict[str, Any]] = {
    "prefix": {"name": "prefix", "num_virtual_tokens": 4},
    "lora": {"name": "lora", "rank": 2},
}
SMALL = {"every": 2, "max_examples": 4, "test_max_examples": 4, "metrics": ["loss"], "samples": 0}
#: What a run may have of its own.
OWN: Sequence[Mapping[str, Any]] = (
    {},
    {"run": {"seed": 3}, "client": {"lr": 0.02, "schedule": "cosine", "warmup": 0.2, "steps": 3}},
    {"partition": {"alpha": 0.5}, "federation": {"cohort_size": 3, "rounds": 2}, "server": {"optimizer": "adam"}},
)
ONE_ROUND = [{**own, "federation": {**own.get("federation", {}), "rounds": 1}} for own in OWN]


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def runs(folder: Path, texts: Path, method: str, dtype: str = "float64", own: Any = OWN) -> list[Config]:
    """The configurations of runs that differ in `own`."""
    client = {"optimizer": "adamw", "lr": 0.05, "batch_size": 3, "steps": 2}
    common = {"model": {"dtype": dtype}, "client": client, "evaluation": SMALL}
    configs = []
    for number, changes in enumerate(own):
        sections: dict[str, Any] = {"federation": {"rounds": 3, "cohort_size": 5}, **common}
        for section, values in changes.items():
            sections[section] = {**sections.get(section, {}), **values}
        configs.append(settings(folder / str(number), {**tree(texts, **sections), "method": METHODS[method]}))
    return configs


def same(one: Path, other: Path, within: float) -> None:
    """Two runs have the same results, up to a share of each value."""
    for tensor, wanted in final(other).items():
        found = final(one)[tensor]
        assert np.linalg.norm(found - wanted) <= within * np.linalg.norm(wanted), tensor
    for name, columns in {
        "rounds": ("round", "train_loss", "eval_loss", "tokens", "bytes_up", "bytes_down", "completed", "update_norm"),
        "clients": ("client_id", "num_examples", "tokens", "steps", "loss_first", "loss_last", "status", "block"),
    }.items():
        for column in columns:
            found, wanted = table(one, name)[column], table(other, name)[column]
            np.testing.assert_allclose(found, wanted, rtol=max(within, 1e-12), err_msg=f"{name}/{column}")


@pytest.mark.parametrize(
    ("method", "dtype", "ranks", "own", "within"),
    [
        ("prefix", "float64", 1, OWN, 1e-9),
        ("lora", "float64", 3, OWN, 1e-9),
        ("prefix", "float32", 1, OWN, 1e-5),
        # One round: gradients that are nearly zero grow the rounding under AdamW, as another block_size would.
        ("lora", "float32", 1, ONE_ROUND, 1e-5),
    ],
)
def test_together_is_alone(
    tmp_path: Path,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    method: str,
    dtype: str,
    ranks: int,
    own: Sequence[Mapping[str, Any]],
    within: float,
) -> None:
    """Seeds, rates, schedules, steps, split, cohort, rounds and the server are each run's own."""
    configs, seeds = runs(tmp_path / "together", texts, method, dtype, own), []

    def training(*arguments: Any) -> Any:
        seeds.append({work.local.seed for work in arguments[4]})
        return train_block(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(local, "train_block", training)
        federate_together(configs, ranks)
    assert {0, 3} in seeds  # clients of several runs were in one forward
    for number, config in enumerate(runs(tmp_path / "alone", texts, method, dtype, own)):
        federate(config)
        same(configs[number].run_dir, config.run_dir, within)


def test_small_rounds_of_several_runs_keep_all_workers_at_work(tmp_path: Path, texts: Path) -> None:
    """Where a round of a run is one block, each run has it at another worker."""
    transport, approaches = LoopbackTransport(), list[AnyApproach]()
    transport.world_size = 4
    own = [{"run": {"seed": seed}, "federation": {"cohort_size": 2}} for seed in range(4)]
    for config in runs(tmp_path, texts, "prefix", own=own):
        approaches.append(prepare(config, transport, Launch(), write_cache=False, beside=approaches))
    assert [[block.worker for block in one.plan(1).blocks] for one in approaches] == [[0], [1], [2], [0]]


def test_classifiers_share_a_base_whose_head_is_the_same(tmp_path: Path, texts: Path) -> None:
    """A new head is drawn by the seed, so it is that of runs with the same one; a stored one is everybody's."""
    save_random_bert(tmp_path / "bert")
    own = ({}, {"client": {"lr": 0.02}}, {"run": {"seed": 3}}, {"run": {"seed": 3}, "client": {"lr": 0.02}})

    def of(folder: str, model: str) -> list[Config]:
        shared = {
            "model": {"name": str(tmp_path / model)},
            "data": {"max_length": 64, "prompt": "{mr}"},
        }
        return runs(tmp_path / folder, texts, "lora", own=[{**one, **shared} for one in own])

    def approaches(configs: Sequence[Config]) -> list[AnyApproach]:
        made: list[AnyApproach] = []
        for config in configs:
            made.append(prepare(config, LoopbackTransport(), Launch(), False, made))
        return made

    drawn = approaches(of("drawn", "bert"))
    assert [drawn.index(next(one for one in drawn if one.base is other.base)) for other in drawn] == [0, 0, 2, 2]
    assert all(one.objective is other.objective for one, other in (drawn[:2], drawn[2:]))
    assert drawn[0].joins == drawn[1].joins != drawn[2].joins
    drawn[0].base.model.save_pretrained(tmp_path / "stored")
    drawn[0].base.tokenizer.save_pretrained(tmp_path / "stored")
    stored = approaches(of("stored runs", "stored"))
    assert len({id(one.base) for one in stored}) == len({one.joins for one in stored}) == 1

    configs = of("together", "bert")
    federate_together(configs)
    for config, other in zip(configs, of("alone", "bert"), strict=True):
        federate(other)
        same(config.run_dir, other.run_dir, 1e-9)


def test_stopped_anywhere_and_resumed(tmp_path: Path, texts: Path) -> None:
    """Runs may stand at different rounds then; one that is complete leaves the others."""
    whole = runs(tmp_path / "whole", texts, "prefix")
    count = federate_together(whole)
    for stop_at in (count // 3, count * 2 // 3, count - 2):
        configs = runs(tmp_path / str(stop_at), texts, "prefix")
        with pytest.raises(Interrupted):
            federate_together(configs, stop_at=stop_at)
        federate_together([config for config in configs if not done(config)])
        for one, other in zip(configs, whole, strict=True):
            same(one.run_dir, other.run_dir, 1e-9)


def test_a_run_that_is_refused_leaves_all_directories_as_they_were(tmp_path: Path, texts: Path) -> None:
    configs = runs(tmp_path, texts, "prefix", own=({}, {"run": {"seed": 3}}))
    lock = take_lock(configs[1].run_dir)
    for ranks in (1, 2):
        with pytest.raises(RefusedError):
            federate_together(configs, ranks)
        assert read_status(configs[0].run_dir) is None
    lock.close()
    federate_together(configs)
    assert all(map(done, configs))


def done(config: Config) -> bool:
    status = read_status(config.run_dir)
    return status is not None and status.state == "complete"


@pytest.mark.parametrize("ranks", [1, 2])
def test_each_has_its_share_of_the_time(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """By the steps of its clients; a run does not wait for those that are closed after it, nor count their time."""
    took: list[float] = []
    own = [{"client": {"steps": steps}, "federation": {"rounds": 1, "cohort_size": 2}} for steps in (1, 3)]
    configs = runs(tmp_path, texts, "prefix", own=own)

    def slowly(*arguments: Any) -> Any:
        time.sleep(0.5)
        return train_block(*arguments)

    def timed(*arguments: Any) -> None:
        began = time.perf_counter()
        run_together(*arguments)
        took.append(time.perf_counter() - began)

    with monkeypatch.context() as patch:
        patch.setattr(local, "train_block", slowly)
        patch.setattr(federation, "run_together", timed)
        federate_together(configs, ranks)
    first, second = (table(config.run_dir, "rounds") for config in configs)
    assert first["seconds_local"][1] + second["seconds_local"][1] > 0.45
    assert second["seconds_local"][1] == pytest.approx(3 * first["seconds_local"][1], rel=0.1)
    for found in (first, second):
        assert found["seconds_reduce"][1] < 0.4 and found["seconds"][1] >= found["seconds_local"][1]
    walls = [Results.read(config.run_dir / "results.h5").attributes["wall_seconds"] for config in configs]
    assert sum(walls) <= max(took)
    assert all(wall > found["seconds"].sum() for wall, found in zip(walls, (first, second), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_a_run_that_diverges_leaves_the_bits_of_the_others(tmp_path: Path, texts: Path, method: str) -> None:
    results = {}
    for lr in (1.0, 1e300):
        own = ({"client": {"optimizer": "sgd"}}, {"client": {"optimizer": "sgd", "lr": lr}})
        configs = runs(tmp_path / str(lr), texts, method, own=own)
        federate_together(configs)
        results[lr] = final(configs[0].run_dir), table(configs[0].run_dir, "rounds")["train_loss"]
        if lr > 1:
            assert (table(configs[1].run_dir, "rounds")["rejected"] > 0).any()
    for name, tensor in results[1.0][0].items():
        assert np.array_equal(tensor, results[1e300][0][name])
    assert np.array_equal(results[1.0][1], results[1e300][1], equal_nan=True)


@pytest.mark.parametrize(
    ("changes", "fits"),
    [
        ([], True),
        (["run.seed=3", "client.lr=0.1", "client.schedule=cosine", "client.steps=7"], True),
        (["partition.name=iid", "federation.cohort_size=3", "server.aggregator=median"], True),
        (["client.batch_size=2"], False),
        (["client.optimizer=sgd"], False),
        (["method.num_virtual_tokens=5"], False),
        (["data.max_length=64"], False),
        (["runtime.precision=bfloat16"], False),
        (["mode=local"], False),
        (["client.server_momentum=0.5"], False),
        (
            ["privacy.name=example", "privacy.noise_multiplier=1.0", "privacy.clip_norm=1.0", "privacy.delta=1e-5"],
            False,
        ),
    ],
)
def test_which_runs_train_together(changes: list[str], fits: bool) -> None:
    shared = shared_settings(configuration.load(None, []))
    assert shared is not None
    assert (shared_settings(configuration.load(None, changes)) == shared) == fits


@pytest.mark.parametrize(
    "change", ["mode=local", "method.name=full", "method.name=fedbpt", "client.moments=second", "client.scaffold=true"]
)
def test_runs_that_train_alone(change: str) -> None:
    assert shared_settings(configuration.load(None, [change])) is None


# ---------------------------------------------------------------- sweeps


class EndedError(Exception):
    """Stands in for the end of a process, with its exit code."""

    def __init__(self, code: int) -> None:
        self.code = code


class Announced:
    """Stands in for liveness: a failure is told as rank 0 tells it."""

    def __init__(self, saved: Sequence[SavedRounds]) -> None:
        self.saved = saved

    def fail(self, code: int, reason: str, *, run: str = "", **_: object) -> None:
        process._announce(self.saved, True, code, reason, run)
        raise EndedError(code)


class Here:
    """Stands in for a process of fedhpc.main, in this process."""

    commands: list[list[str]]  # the names of the runs of each

    def __init__(self, command: Sequence[str], **_: object) -> None:
        arguments = list(command[command.index("fedhpc.main") + 1 :])
        options = main.parse(arguments)
        configs = [configuration.load(path, []) for path in options.configs]
        Here.commands.append([config.run.name for config in configs])
        main._check_together(options, configs)
        rank = Rank(configs, Launch(), LoopbackTransport(), [], [SavedRounds(config) for config in configs])
        try:
            self.code = process._work(rank, Announced(rank.saved), partial(main._work, options))  # type: ignore[arg-type]
        except EndedError as error:
            self.code = error.code

    def wait(self) -> int:
        return self.code

    poll = wait


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep.subprocess, "Popen", Here)
    monkeypatch.setattr(sweep, "compare", lambda *_, **__: None)
    Here.commands = []


def write_sweep(folder: Path, texts: Path, grid: Sequence[object], **keys: object) -> Path:
    """A sweep of tiny runs over `grid`; its runs go to `folder`/runs."""
    base = settings(folder / "base", tree(texts, federation={"rounds": 2, "cohort_size": 3}, evaluation=SMALL))
    (folder / "base.yaml").write_text(base.to_yaml())
    common = {"evaluation.every": 1, "client.lr": 1.0}
    written = {"name": "few", "dir": str(folder / "runs"), "base": str(folder / "base.yaml"), "set": common}
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({**written, "grid": list(grid), **keys}, sort_keys=False))
    return file


@pytest.mark.usefixtures("_here")
def test_a_run_that_cannot_begin_harms_nobody(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its group ends before anything is written, with its name; halves of the group go on, and it alone fails."""
    grid = [{"x": {"a": {}, "b": {"partition.num_clients": 5000}, "c": {"run.seed": 4}, "d": {"run.seed": 5}}}]
    assert sweep.main([str(write_sweep(tmp_path, texts, grid))]) == 1
    captured = capsys.readouterr()
    assert Here.commands == [["a-s0", "b-s0", "c-s4", "d-s5"], ["a-s0", "b-s0"], ["a-s0"], ["b-s0"], ["c-s4", "d-s5"]]
    assert "4 runs ended too early (exit code 2, its message is above): they go on, 2 and 2 together\n" in captured.out
    assert captured.err.count("fedhpc: error: b-s0: ") == 2 and captured.err.count("b-s0 failed") == 1
    states = [read_status(tmp_path / "runs" / name) for name in ("a-s0", "b-s0", "c-s4", "d-s5")]
    assert [status and status.state for status in states] == ["complete", None, "complete", "complete"]


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize("moment", ["download", "combine", "finish"])
def test_a_run_that_fails_ends_its_neighbours_beside_it(
    tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], moment: str
) -> None:
    """It alone has failed, by its name; the others go on from where they were, together."""
    called = getattr(Averaging, moment)

    def failing(self: Averaging, *arguments: Any) -> Any:
        if self.config.run.name == "b-s0":
            raise UserError("no room for this one")
        return called(self, *arguments)

    monkeypatch.setattr(Averaging, moment, failing)
    grid = [{"x": {"a": {}, "b": {"client.lr": 0.5}, "c": {"run.seed": 4}}}]
    assert sweep.main([str(write_sweep(tmp_path, texts, grid))]) == 1
    captured = capsys.readouterr()
    assert Here.commands[0] == ["a-s0", "b-s0", "c-s4"] and ["b-s0"] not in Here.commands
    assert Here.commands[1:] == [["c-s4"] if moment == "finish" else ["a-s0", "c-s4"]]
    assert "fedhpc: error: b-s0: no room for this one\n" in captured.err
    assert captured.err.endswith("fedhpc sweep: error: b-s0 failed: no room for this one\n")
    again = len(Here.commands[1])
    assert (
        f"{again} runs ended too early (ended beside b-s0: no room for this one): they go on, {again} " in captured.out
    )
    assert "c-s4: preempted, starting" in captured.out
    status = read_status(tmp_path / "runs" / "b-s0")
    assert status is not None and (status.state, status.reason) == ("failed", "no room for this one")
    for name in ("a-s0", "c-s4"):
        assert done(configuration.load(str(tmp_path / "runs" / f"{name}.yaml"), []))


def test_who_is_told_to_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A signal is of all runs but those that are at their ends, whatever a rank may have read before."""
    names = ("under_way", "ended", "waiting")
    configs = [configuration.load(None, [f"run.name={name}", f"run.dir={tmp_path / name}"]) for name in names]
    saved = [SavedRounds(config) for config in configs]
    for one in saved[:2]:
        one.directory.mkdir()
        one.reached(3)
        write_status(one.directory, "running", 3)
    saved[1].end()
    process._announce(saved, True, 75, "SIGTERM", "")
    line = f"fedhpc: SIGTERM; 3 rounds are kept in {tmp_path}/under_way, the same command goes on from there\n"
    assert capsys.readouterr().err == line
    states = [read_status(one.directory) for one in saved]
    assert [status and status.state for status in states] == ["preempted", "running", None]


@pytest.mark.usefixtures("_here")
def test_what_is_complete_takes_no_room(tmp_path: Path, texts: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sweep that goes on starts the groups that --dry-run shows."""
    file = write_sweep(tmp_path, texts, [{"run.seed": [0, 1, 2, 3]}], together=2)
    for index in ("0", "2"):
        assert sweep.main([str(file), "--index", index]) == 0
    capsys.readouterr()
    assert sweep.main([str(file), "--dry-run"]) == 0
    assert capsys.readouterr().out.count(f"fedhpc.main {tmp_path}/runs/few-s1.yaml {tmp_path}/runs/few-s3.yaml\n") == 1
    assert sweep.main([str(file)]) == 0
    assert Here.commands == [["few-s0"], ["few-s2"], ["few-s1", "few-s3"]]


@pytest.mark.parametrize(
    ("launch", "several"),
    [
        ("python -m fedhpc.main", True),
        ("python -m fedhpc.main --ranks 3", True),
        ("torchrun --standalone --nproc_per_node=3 -m fedhpc.main --fresh", True),
        ("/opt/bin/fedhpc run", True),
        ("python -m fedhpc.main client.lr=1", False),
        ("bash launch.sh", False),
    ],
)
def test_which_launches_take_several(
    launch: str,
    several: bool,
    tmp_path: Path,
    texts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    started: list[int] = []
    monkeypatch.setattr(
        sweep._Runner, "__call__", lambda _, some, until: started.append(len(some)) or ["x"] * len(some)
    )
    monkeypatch.setattr(sweep.shutil, "which", lambda *_, **__: "there")
    file = write_sweep(tmp_path, texts, [{"run.seed": [0, 1]}], launch=launch)
    assert sweep.main([str(file)]) == 1
    assert started[0] == 2 if several else started == [1, 1]
    told = f"sweep.launch: '{launch}' may not take several configurations: each run trains alone\n"
    assert (told in capsys.readouterr().out) != several


@pytest.mark.usefixtures("_here")
def test_groups_and_rungs(tmp_path: Path, texts: Path) -> None:
    """What differs in more than a row can is another group; the best of early_stop go on together."""
    grid = [{"client.lr": [0.5, 1.0, 2.0]}, {"client.batch_size": [2, 3]}]
    file = write_sweep(tmp_path, texts, grid, together=2, early_stop={"factor": 2, "after": [1]})
    assert sweep.main([str(file)]) == 0
    first = [["0.5", "1.0"], ["2.0"]]
    wanted = [[f"lr_{lr}-batch_size_{size}-s0" for lr in some] for some in first for size in (2, 3)]
    assert sorted(Here.commands[:4]) == sorted(wanted)
    going = {name for names in Here.commands[4:] for name in names}
    assert len(going) == 3 == sum(done(cell.config) for cell in sweep.load(file)[1])


@pytest.mark.usefixtures("_here")
def test_what_rungs_save(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process for each rung and full forwards, to the setting that is best where all runs go to their end, alone."""
    forwards: list[int] = []  # the clients of each

    def counted(*arguments: Any) -> Any:
        forwards.append(len(arguments[4]))
        return train_block(*arguments)

    rates, common = [0.01, 0.1, 1.0, 10.0], {"evaluation.every": 1, "federation.rounds": 4, "federation.cohort_size": 2}
    grid = [{"client.lr": rates}, {"run.seed": [0, 1]}]
    file = write_sweep(tmp_path, texts, grid, set=common, early_stop={"factor": 2, "after": [1, 2]})
    with monkeypatch.context() as patch:
        patch.setattr(local, "train_block", counted)
        assert sweep.main([str(file)]) == 0
    assert [len(names) for names in Here.commands] == [8, 4, 2]
    assert forwards == [8, 8, 8, 4, 4]

    everything = ["sweep.early_stop=null", "sweep.together=1", f"sweep.dir={tmp_path / 'all'}"]
    assert sweep.main([str(file), *everything]) == 0
    losses = {
        rate: sum(table(tmp_path / "all" / f"lr_{rate}-s{seed}", "rounds")["eval_loss"][-1] for seed in (0, 1))
        for rate in rates
    }
    best = min(losses, key=losses.__getitem__)
    ended = [cell.name for cell in sweep.load(file)[1] if done(cell.config)]
    assert ended == [f"lr_{best}-s0", f"lr_{best}-s1"]
    for name in ended:
        same(tmp_path / "runs" / name, tmp_path / "all" / name, 1e-4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["A", "B", "client.lr=1"], "section.key=value is for one configuration, and there are 2"),
        (["A", "B", "--check"], "--check is for one configuration"),
        (["A", "A"], "two configurations have the same run.dir"),
        (["A", "C"], "C cannot train together with {folder}/A: they differ in client.batch_size; run it alone"),
        (
            ["A", "D"],
            "/A: they differ in method.name, method.exchange, method.hidden_size, method.init and 12 more",
        ),
        (["A", "E"], "E can only train alone, by its mode, method, client, privacy"),
        (["A", "F"], "two configurations have the same run.name"),
    ],
)
def test_a_mistake_is_one_line(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    different = {"B": ["client.lr=0.1"], "C": ["client.batch_size=3"], "D": ["method.name=lora"], "E": ["mode=local"]}
    for name, changes in {"A": [], **different, "F": ["run.name=A"]}.items():
        config = configuration.load(None, [f"run.name={name}", *changes, f"run.dir={tmp_path / name}-run"])
        (tmp_path / name).write_text(config.to_yaml())
    given = [str(tmp_path / word) if len(word) == 1 else word for word in arguments]
    assert main.main(given) == 2
    error = capsys.readouterr().err
    assert message.format(folder=tmp_path) in error and error.count("\n") == 1
    assert not (tmp_path / "A-run").exists()


def kill(process: subprocess.Popen[bytes]) -> None:
    """End a sweep and its runs at once, as when a machine goes down."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    for child in children:  # in a session of its own
        os.kill(int(child), signal.SIGKILL)
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_ended_by_a_signal_and_the_same_command_again(tmp_path: Path, texts: Path, number: signal.Signals) -> None:
    """All runs go on from their checkpoints, and end as if nothing had been."""
    grid = [{"client.lr": [0.5, 1.0]}, {"run.seed": [0, 1]}]
    common = {"evaluation.every": 1, "federation.rounds": 12}
    folders = {name: tmp_path / name for name in ("whole", "ended")}
    for folder in folders.values():
        folder.mkdir()
    files = {name: write_sweep(folder, texts, grid, set=common) for name, folder in folders.items()}
    command = [sys.executable, "-m", "fedhpc.sweep"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(files["ended"])], env=environment)
    names = [cell.name for cell in sweep.load(files["ended"])[1]]
    directories = [folders["ended"] / "runs" / name for name in names]
    deadline = time.monotonic() + 300
    while not all((status := read_status(one)) and status.round > 2 for one in directories):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    if number == signal.SIGKILL:
        kill(process)
    else:
        process.send_signal(number)
        assert process.wait(120) == 75
        assert {read_status(one).state for one in directories} == {"preempted"}  # type: ignore[union-attr]
    for file in files.values():
        subprocess.run([*command, str(file)], env=environment, check=True, timeout=600)
    for name in names:
        ended = folders["ended"] / "runs" / name
        same(ended, folders["whole"] / "runs" / name, 1e-4)
        assert list(table(ended, "events")["kind"]).count("resumed") == 1


@pytest.mark.slow
def test_killed_on_the_way_to_a_rung(tmp_path: Path, texts: Path) -> None:
    """The same command comes to the same decisions, and what goes on ends as if nothing had been."""
    rungs = {"factor": 2, "after": [20, 40]}
    common = {"evaluation.every": 1, "federation.rounds": 60}
    folders = {name: tmp_path / name for name in ("whole", "ended")}
    for folder in folders.values():
        folder.mkdir()
    files = {
        name: write_sweep(folder, texts, [{"client.lr": [0.01, 0.1, 1.0, 10.0]}], set=common, early_stop=rungs)
        for name, folder in folders.items()
    }
    command = [sys.executable, "-m", "fedhpc.sweep"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen([*command, str(files["ended"])], env=environment)
    cells = sweep.load(files["ended"])[1]
    deadline = time.monotonic() + 300
    while not any((status := read_status(cell.config.run_dir)) and 20 < status.round < 40 for cell in cells):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    kill(process)
    assert not any(done(cell.config) for cell in cells)
    statuses: dict[str, list[str]] = {}
    for name, file in files.items():
        subprocess.run([*command, str(file)], env=environment, check=True, timeout=600)
        keys, cells = sweep.load(file)
        assert keys.early_stop is not None
        halving = Halving(keys.early_stop, [cell.config for cell in cells], str(file))
        statuses[name], _ = sweep.survey(cells, halving)
    assert statuses["ended"] == statuses["whole"] and statuses["whole"].count("complete") == 1
    best = cells[statuses["whole"].index("complete")].name
    same(folders["ended"] / "runs" / best, folders["whole"] / "runs" / best, 1e-4)
