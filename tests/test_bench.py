"""What the bench measures with: the workloads' tokens, processes watched from outside, and how figures are judged."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import pytest

from fedhpc.bench import peers, private, processes, rounds, sharding, workloads
from fedhpc.bench.processes import Watched
from fedhpc.bench.table import Row, interleaved, markdown, ratio, skipped
from fedhpc.errors import UserError
from tests.test_kill import until


def test_a_target_is_met_from_its_own_side() -> None:
    assert Row("a", 1.5, 1.5).verdict == "met" and Row("a", 1.4, 1.5).verdict == "missed"
    assert Row("a", 0.5, 0.5, most=True).verdict == "met" and Row("a", 0.6, 0.5, most=True).verdict == "missed"
    assert Row("a", 3.0).verdict == "" and skipped("a", "no GPU").verdict == ""
    assert skipped("a", "no GPU").json()["measured"] is None
    share = Row("share", 0.0123, 0.03, most=True, unit="%")
    assert markdown(share) == "| share | 1.23 % | ≤ 3 % | met |  |"
    assert (share.json()["measured"], share.json()["target"]) == (pytest.approx(1.23), 3.0)
    assert markdown(skipped("b", "why")) == "| b | - |  |  | why |"


def test_runs_are_interleaved_and_the_first_is_a_warm_up() -> None:
    order: list[str] = []
    ticks = iter(range(100))
    found = interleaved({name: lambda name=name: order.append(name) for name in "ab"}, 2, lambda: float(next(ticks)))
    assert order == ["a", "b"] * 3 and {name: len(s) for name, s in found.items()} == {"a": 2, "b": 2}
    assert ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


# Burns CPU and starts another that does so too, which ends before it. After each step they write what they have spent
# and wait until the watch has seen it.
PROGRAM = """
import subprocess, sys, time
from pathlib import Path

def wait_for(name):
    sys.stdout.write(f"{len(sys.argv)} {time.process_time()}\\n")
    sys.stdout.flush()
    while not Path(name).exists():
        time.sleep(0.05)

def burn(until):
    while time.process_time() < until:
        pass

if first := len(sys.argv) == 1:
    wait_for("start")
    other = subprocess.Popen([sys.executable, *sys.argv, "other"])
memory = bytearray(30 << 20)
burn(0.4)
wait_for("both")
if first:
    other.wait()
    burn(0.8)
    wait_for("end")
"""


def test_programs_are_watched_with_all_that_they_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "program.py").write_text(PROGRAM)
    lines: list[str] = []
    looks: list[tuple[int, float]] = []  # process, its CPU seconds
    cpu_seconds = processes._cpu_seconds

    def noted(pid: int) -> float:
        looks.append((pid, cpu_seconds(pid)))
        return looks[-1][1]

    def spent() -> float:
        """The seconds in the last line of each process, together."""
        return sum(map(float, dict(line.split() for line in list(lines)).values()))

    def sees(count: int) -> bool:
        """Whether `count` lines were written, and the watch has looked since."""
        return len(lines) == count and abs(sum(dict(looks).values()) - spent()) < 0.1

    monkeypatch.setattr(processes, "_cpu_seconds", noted)
    command = [sys.executable, "program.py"]
    with Watched(
        [(command, os.environ)], tmp_path / "log", lambda _, line: lines.append(line), cwd=tmp_path
    ) as watched:
        until(lambda: sees(1))
        (tmp_path / "start").touch()
        until(lambda: sees(3) and watched.peak_pss_bytes > 60e6)
        looked = len(looks)
        until(lambda: len(looks) > looked + 4)  # at both of them once more, so that all before is recorded
        both, moment = spent(), time.time()
        (tmp_path / "both").touch()
        until(lambda: sees(4))
        (tmp_path / "end").touch()
        watched.wait(300)
    total = watched.cpu_at(time.time())
    assert abs(total - spent()) < 0.1
    assert watched.cpu_at(watched.began) == 0 < both - 0.1 < watched.cpu_at(moment) <= total
    assert watched.peak_pss_bytes < 300e6


def test_a_program_that_fails_or_takes_too_long_is_an_error_and_none_is_left(tmp_path: Path) -> None:
    before = set(psutil.Process().children(recursive=True))
    with (
        pytest.raises(UserError, match="no good"),
        Watched([([sys.executable, "-c", "raise SystemExit('no good')"], os.environ)], tmp_path / "log") as watched,
    ):
        watched.wait(60)
    sleeper = "import subprocess, sys\nsubprocess.run([sys.executable, '-c', 'import time; time.sleep(60)'])"
    with (
        pytest.raises(UserError, match=r"was not done after 1 s and was ended$"),
        Watched([([sys.executable, "-c", sleeper], os.environ)], tmp_path / "log") as watched,
    ):
        watched.wait(1)
    assert set(psutil.Process().children(recursive=True)) == before


def test_fedhpc_and_its_peers_are_given_the_same_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHPC_CACHE", str(tmp_path / "elsewhere"))  # put back when the test is over
    start, tokens = peers.prepare(workloads.W2, tmp_path, 2)
    work = np.load(tmp_path / "work.npz")
    shape = (2, workloads.COHORT, workloads.SEQUENCES, workloads.LENGTH)
    assert work["ids"].shape == shape and work["ids"].min() >= 2 and work["ids"].max() < 2048
    assert (work["ids"][..., -1] == 2).all()
    # Nothing stands in front of the first token; all others are predicted.
    assert (work["labels"][..., 0] == -100).all()
    assert np.array_equal(work["labels"][..., 1:], work["ids"][..., 1:])
    assert tokens == [16 * 32 * 47] * 2
    written = {
        tuple(int(t[1:]) for t in (row["first"], *row["rest"].split()))
        for row in map(json.loads, (tmp_path / "data" / "train.jsonl").read_text().splitlines())
    }
    trained = [tuple(row) for row in work["ids"][..., :-1].reshape(-1, 47).tolist()]
    assert set(trained) <= written and len(set(trained)) > 16 * 32  # two cohorts
    assert start and all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in start)


def test_updates_are_compared_from_where_they_start() -> None:
    start = {"a": np.full(3, 100.0)}
    assert peers.difference({"a": np.full(3, 101.1)}, {"a": np.full(3, 101.0)}, start) == pytest.approx(0.1)
    with pytest.raises(UserError, match="other parameters"):
        peers.difference({"b": np.zeros(3)}, start, start)


def test_a_round_without_work_needs_no_training(tmp_path: Path) -> None:
    assert 0 < rounds.idle_round(tmp_path, 4, 100, 3) < 5


def test_the_bench_says_where_the_peers_are_missing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fedhpc.bench", "--peers", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1 and "common.py" in done.stderr


def test_what_is_absent_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(workloads, "SHARED", tmp_path)
    assert str(workloads.W3.absent()).startswith("there is no ") and workloads.W1.absent() is None
    assert math.isnan(skipped("W3", str(workloads.W3.absent())).measured)


def test_private_steps_are_measured_also_where_there_is_no_opacus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(private, "find_spec", lambda name: None)
    assert len(private.parts(1, quick=True)) == 4
    whole, halves, throughput = private._speed(workloads.W1, 1)
    assert 0.2 < whole.measured < 5 and 0.2 < halves.measured < 5 and math.isnan(throughput.measured)
    assert [math.isnan(row.measured) for row in private._memory(workloads.W1)] == [True]


def test_steps_on_a_base_that_ranks_hold_together_are_measured() -> None:
    *of_links, received, nvlink, infiniband = sharding._steps(1, (8,), 3)
    assert [row.what.split(":")[0] for row in of_links] == ["8 tokens, loopback"] * 3 + ["8 tokens, slow link"] * 3
    assert all(math.isfinite(row.measured) for row in of_links)
    # Layers 0, 1, 2, 1, 0, and in the second of two steps 1, 2, 1, 0; not two for each of three.
    assert received.measured == pytest.approx((5 + 4) / (2 * 2 * 3), rel=0.01)
    assert infiniband.measured / nvlink.measured == pytest.approx(7.5)
    assert nvlink.measured == pytest.approx(received.measured * 4e14 / (2 * 3e11), rel=0.01)


def test_a_slow_link_takes_its_time_from_where_a_gather_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    now = [100.0]
    monkeypatch.setattr(sharding.time, "sleep", waits.append)
    monkeypatch.setattr(sharding.time, "perf_counter", lambda: now[0])
    layer = sharding._OverSlowLink(SimpleNamespace(
        size_bytes=10**8, parameters=list, prefetch=lambda: None, unshard=lambda: None, reshard=lambda: None
    ))  # fmt: skip
    layer.unshard()
    layer.reshard()
    layer.prefetch()
    now[0] += 0.2
    layer.unshard()
    layer.reshard()
    layer.prefetch()
    now[0] += 3
    layer.unshard()
    assert waits == [pytest.approx(0.5), pytest.approx(0.3), 0]
