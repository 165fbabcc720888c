"""The GPU's bench, on a CPU with tiny models: every part runs, and its figures are what they say."""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fedhpc.approaches.averaging import local
from fedhpc.bench import __main__, gpu, gpu_runs, workloads
from fedhpc.bench.bed import Bed, Clock, Sizes, ladder
from fedhpc.bench.table import Row
from fedhpc.errors import UserError
from fedhpc.training.block import train_block
from tests import tiny

CPU = torch.device("cpu")
NO_END, OVER = Clock(), Clock(0.0)
SIZES = Sizes(
    {name: lambda name=name: tiny.FAMILIES[name]().config for name in ("gpt2", "llama")},
    cells=[(2, 8), (1, 6)], blocks=(1, 2), bare=(2,), square=64, repeats=1, profiled=2,
)  # fmt: skip


@pytest.fixture
def tiny_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole runs train a tiny base, eight clients a round, one step each."""
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    monkeypatch.setitem(workloads._SIZES, "small", {**shape, "vocab_size": 128})
    monkeypatch.setattr(workloads, "SEQUENCES", workloads.BATCH)
    for module in (workloads, gpu_runs):
        monkeypatch.setattr(module, "COHORT", 8)
    for limit in ("_LIMIT_S", "_LEAST_S"):  # the machine may be busy
        monkeypatch.setattr(gpu_runs, limit, 3600.0)


def figures(rows: Any) -> dict[str, Row]:
    return {row.what: row for row in rows}


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("method", ["prefix", "lora"])
def test_a_grid_has_four_figures_a_cell(model: str, method: str) -> None:
    rows = figures(gpu.grid(model, method, CPU, SIZES, NO_END))
    assert len(rows) == 8 and all(row.measured > 0 for row in rows.values())
    at = f"{model} {method}, batch 2, 8 tokens"
    assert "1: " in next(row.note for what, row in rows.items() if what.startswith(f"{at}: block of"))
    assert f"{at}: over the bare loop at its best batch" in rows


def test_a_grid_says_what_it_leaves_out() -> None:
    (row,) = gpu.grid("llama", "lora", CPU, SIZES, OVER)
    assert row.what.startswith("llama lora, batch 2, 8 tokens and the 1 cells after it") and "was over" in row.note


def test_flops_are_four_for_each_weight_that_multiplies() -> None:
    bed = Bed("llama", "lora", CPU, SIZES)
    h, kv, inner, layers = 32, 16, 48, 2
    assert bed.flops == 4 * (layers * (2 * h * h + 2 * h * kv + 3 * h * inner) + h * tiny.VOCABULARY)
    assert bed.base.dtype == torch.bfloat16 and bed.start.dtype == torch.float32


def test_a_ladder_ends_where_memory_does_or_where_it_gets_no_faster() -> None:
    def short(size: int) -> tuple[float, int]:
        if size > 4:
            raise torch.OutOfMemoryError("full")
        return 10.0 * size, size

    found = ladder([1, 2, 4, 8, 16], short, CPU, NO_END)
    assert (found.best, found.rate, str(found)) == (4, 40.0, "tokens/s 1: 10, 2: 20, 4: 40; 8 does not fit in memory")
    flat = ladder([1, 2, 4, 8], lambda size: (min(10.0 * size, 20.1), 0), CPU, NO_END)
    assert (flat.best, list(flat.measured), flat.end) == (4, [1, 2, 4], "no faster")
    with pytest.raises(UserError, match="8 does not fit"):
        ladder([8], short, CPU, NO_END)
    ended = ladder([1, 2], short, CPU, OVER)
    assert list(ended.measured) == [1] and ended.end == "then the time was over"


def test_a_program_has_what_it_needs_to_start_as_far_as_there_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    schedule = gpu.Schedule(100.0, [(1.0, ["a", "b", "c", "d"])])
    until = schedule.begin("a")
    assert (until.left, until.at_least(60.0), until.at_least(10.0)) == (25.0, 60.0, 25.0)
    now += 70.0
    assert until.over and until.at_least(60.0) == 30.0  # of all that is left


def test_a_timeline_counts_what_overlaps_once() -> None:
    spans = [(0.0, 10.0, "a"), (5.0, 12.0, "b"), (20.0, 28.0, "a")]
    rows = figures(gpu.timeline("x", spans, 40e-6))
    assert rows["x: GPU busy"].measured == pytest.approx(0.5)
    assert rows["x: gaps under the profiler"].measured == pytest.approx(8 / 28)
    assert rows["x: a"].measured == pytest.approx(18 / 25) and rows["x: kernels and copies a step"].measured == 3 / 4


def test_a_profile_names_what_takes_most() -> None:
    rows = list(gpu.profile("llama", "lora", CPU, SIZES, NO_END))
    assert len(rows) == 13 and sum(row.measured for row in rows[3:]) < 1.01
    assert rows[1].measured > 0 and rows[0].measured > 10


def test_the_peak_is_a_product_and_says_what_runs() -> None:
    (row,) = gpu.peak(CPU, SIZES, NO_END)
    assert row.measured > 0 and "driver" in row.note and row.unit == "TFLOP/s"


def test_rows_come_at_once_as_json_and_the_other_parts_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails() -> Any:
        yield Row("a", 1.0)
        raise UserError("no more")

    monkeypatch.setattr(gpu, "parts", lambda *of: [fails, lambda: [Row("b", 2.0, 3.0)]])
    options = argparse.Namespace(
        scale=False, peers=None, gpu=True, only="", quick=False, repeats=None, json=True, minutes=None, rehearsal=False
    )
    assert __main__.measure(options) == 1
    said = capsys.readouterr()
    machine, *rows = map(json.loads, said.out.splitlines())
    assert machine["torch"] == torch.__version__
    assert [(row["what"], row["verdict"]) for row in rows] == [("a", ""), ("b", "missed")]
    assert said.err == "fedhpc: error: no more\n"


def test_parts_are_chosen_by_name_and_one_that_fails_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert len(gpu.parts("grid", False, 3)) == 4 and len(gpu.parts("grid-llama,peak", False, 3)) == 3
    assert len(gpu.parts("", True, 3)) < len(gpu.parts("", False, 3))
    with pytest.raises(UserError, match="there is no part 'gird'"):
        gpu.parts("gird", False, 3)

    def broken(until: Clock) -> Any:
        yield Row("first", 1.0)
        raise RuntimeError("CUDA error")

    rows = gpu.guarded("grid", broken, CPU, gpu.Schedule(60.0, [(1.0, ["grid"])]))
    assert next(rows).what == "first"
    with pytest.raises(UserError, match="grid: RuntimeError: CUDA error"):
        next(rows)
    assert "Traceback" in capsys.readouterr().err


def test_a_stage_ends_in_time_and_its_parts_share_it(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    schedule = gpu.Schedule(720.0, [(2 / 12, ["a", "b"]), (1.0, ["c", "d"])])
    assert schedule.begin("a").left == pytest.approx(60.0)
    now += 20.0  # it needed less, which the next one has
    assert schedule.begin("b").left == pytest.approx(100.0)
    now += 400.0  # it needed more, which is taken from the last stage
    assert schedule.begin("c").left == pytest.approx(150.0)
    now += 300.0
    until = schedule.begin("d")
    assert until.over and until.left == 0.0
    schedule = gpu.Schedule(0.0, [(1.0, ["late"])])
    (row,) = gpu.guarded("late", lambda until: iter([Row("late", 1.0)]), CPU, schedule)
    assert row.note == "no time was left for it" and row.verdict == ""


@pytest.mark.slow
def test_a_rehearsal_runs_every_part(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tiny_runs: None
) -> None:
    tests = tmp_path / "test_gpu.py"
    marked = "@pytest.mark.gpu\n"
    tests.write_text(f"import pytest\n{marked}def test_a(): pass\n{marked}def test_b(): pytest.skip('not here')\n")
    monkeypatch.setattr(gpu_runs, "_TESTS", tests)
    parts = "peak,tests,grid-llama-lora,auto-gpt2-prefix,scarce,profile-llama-prefix"
    options = ["--gpu", "--rehearsal", "--json", "--repeats", "1", "--minutes", "600", "--only", parts]
    assert __main__.main(options) == 0
    _, *rows = map(json.loads, capsys.readouterr().out.splitlines())
    what = " ".join(row["what"] for row in rows)
    assert "1 passed, 1 were skipped" in [row["note"] for row in rows]
    assert all(name in what for name in ("matrix peak", "test_gpu.py: tests that fail", "block of", "block_size auto"))
    assert all(row["measured"] is not None for row in rows if "too little memory" not in row["what"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_one_line() -> None:
    command = [sys.executable, "-m", "fedhpc.bench", "--gpu", "--only", "peak"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "--gpu: torch sees no NVIDIA GPU" in done.stderr


def test_auto_is_compared_with_the_best_that_a_cohort_has_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    rates = {1: (10.0, 0), 2: (18.0, 0), 4: (30.0, 0), 32: (60.0, 0), 64: (80.0, 0)}
    monkeypatch.setattr(Bed, "blocks", lambda self, ks, *of: ladder(ks, lambda k: rates.get(k, (40.0, 0)), CPU, NO_END))
    rows = list(gpu.auto("llama", "lora", CPU, replace(SIZES, blocks=(1, 2, 4, 32, 64)), NO_END))
    assert [row.measured for row in rows] == [pytest.approx(x) for x in (18 / 30, 40 / 80, 40 / 80)]
    assert [row.what.rpartition(": ")[2] for row in rows] == [
        f"block_size auto for a cohort of {cohort}, {k}, over the best, {best}"
        for cohort, k, best in ((16, 2, 4), (64, 8, 64), (256, 8, 64))
    ]


@pytest.mark.parametrize("fits", [0, pytest.param(4, marks=pytest.mark.slow)])
def test_a_run_without_memory_for_its_block_is_told(
    monkeypatch: pytest.MonkeyPatch, tiny_runs: None, fits: int
) -> None:
    limits: list[Any] = []

    def train(base: Any, method: Any, objective: Any, start: Any, works: Any, *about: Any) -> Any:
        if limits and len(works) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more")
        return train_block(base, method, objective, start, works, *about)

    monkeypatch.setattr(local, "train_block", train)
    monkeypatch.setattr(gpu_runs, "limit_memory", lambda device, size: limits.append(size))
    (row,) = gpu_runs.scarce(CPU, "small")
    assert row.measured == float(fits == 4) and row.what.startswith("block_size auto (8) with 70% of a block's ")
    assert row.note.startswith("it ran to its end" if fits else "UserError: one example of client ")
    assert limits[0] > 0 and limits[1:] == [None]


@pytest.mark.slow
def test_programs_of_one_process_and_of_two_ranks_are_compared(tiny_runs: None) -> None:
    rows = figures(gpu_runs.programs("lora", NO_END, "small", "cpu", rounds=3))
    for name in ("one process", "torchrun, 2 ranks", "--ranks 2"):
        outside = rows[f"lora, {name}: share of a round outside local training"]
        assert 0 < outside.measured < 1 and f"{1 if name == 'one process' else 2} ranks over" in outside.note
        assert rows[f"lora, {name}: from the command to the first round done"].measured > 1
    assert 0 < rows["lora: a round of one process over torchrun, 2 ranks"].measured < 10


@pytest.mark.slow
def test_bits_are_compared_over_runs_ranks_and_a_kill(monkeypatch: pytest.MonkeyPatch, tiny_runs: None) -> None:
    monkeypatch.setattr(gpu_runs, "_TORCHRUN", gpu_runs._FORKED)  # which the test before starts
    rows = list(gpu_runs.bits("prefix", NO_END, "small", "cpu", rounds=12))
    assert [row.verdict for row in rows] == ["met"] * 3 and "killed and resumed" in rows[0].what


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_the_compiled_loop_is_compared() -> None:
    (row,) = gpu.compiled("llama", "lora", CPU, SIZES, NO_END)
    assert row.measured > 0 and "its first 4 steps" in row.note
