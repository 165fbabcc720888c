"""The forecast for other numbers of ranks: what it scales, and that it says what it does not know."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fedhpc.approaches.base import Approach
from fedhpc.approaches.prepare import prepare
from fedhpc.main import main
from fedhpc.participation.forecast import forecast
from fedhpc.ranks.devices import peak_memory
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import LoopbackTransport
from tests.federations import federate, settings, table, tree, write_texts

ROUNDS = 4


@pytest.fixture(scope="module")
def approach(tmp_path_factory: pytest.TempPathFactory) -> Approach:
    """Six clients a round in three blocks, evaluated every other round in five batches."""
    texts = write_texts(tmp_path_factory.mktemp("texts"))
    changes = {
        "federation": {"rounds": ROUNDS, "cohort_size": 6},
        "evaluation": {"every": 2, "max_examples": 10, "batch_size": 2, "samples": 0},
        "runtime": {"block_size": 2},
    }
    config = settings(tmp_path_factory.mktemp("run") / "run", tree(texts, **changes))
    return prepare(config, LoopbackTransport(), Launch(), False)


def pilot(approach: Approach, ranks: int) -> dict[str, np.ndarray]:
    """/rounds as a machine without noise would have left it: a microsecond a token."""
    tokens = []
    for round_ in range(1, ROUNDS + 1):
        blocks = approach.plan(round_).blocks
        assert len(blocks) == 3
        # Three blocks: one worker has them all, two have two and one, three one each.
        costs = sorted((b.cost for b in blocks), reverse=True)
        tokens.append({1: sum(costs), 2: sum(costs), 3: max(costs[0], costs[1] + costs[2]), 4: costs[0]}[ranks])
    local = np.array([0.0, *tokens]) * 1e-6
    columns = {"round": np.arange(ROUNDS + 1), "seconds_local": local}
    columns["seconds_broadcast"] = np.full(ROUNDS + 1, 0.25)
    columns["seconds_reduce"] = np.full(ROUNDS + 1, 0.75)
    columns["seconds_server"] = np.full(ROUNDS + 1, 0.5)
    columns["seconds_eval"] = np.array([9.0, 0.0, 5.0, 0.0, 5.0])
    columns["peak_memory_bytes"] = np.full(ROUNDS + 1, 10**9)
    return columns


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_what_was_measured_is_forecast_as_it_was(approach: Approach, ranks: int) -> None:
    (found,) = forecast(approach, [ranks], pilot(approach, ranks), ranks)
    rounds = pilot(approach, ranks)
    assert found.local_s == pytest.approx(rounds["seconds_local"][1:].mean())
    assert found.exchange_s == pytest.approx(1.0)
    assert found.other_s == pytest.approx(0.5 + 2.5)
    assert found.round_s == pytest.approx(found.local_s + 4.0)
    assert found.memory_bytes == 10**9


def test_other_numbers_of_ranks(approach: Approach) -> None:
    two, three, four, many = forecast(approach, [2, 3, 4, 1024], pilot(approach, 2), 2)
    for found, ranks in ((two, 2), (three, 3), (four, 4), (many, 4)):
        assert found.local_s == pytest.approx(pilot(approach, ranks)["seconds_local"][1:].mean())
    assert [f.busy for f in (two, three, four, many)] == [1, 2, 3, 3]  # no more than there are blocks
    assert [f.exchange_s for f in (two, three, four, many)] == pytest.approx([1, 2, 2, 10])
    # Five batches of evaluation: three on the busiest of two ranks, two of three or four, one of many.
    assert [f.other_s - 0.5 for f in (two, three, four, many)] == pytest.approx([2.5 * n / 3 for n in (3, 2, 2, 1)])
    each = approach.bytes_up(approach.plan(1)) / 6
    assert [f.held for f in (two, three, four, many)] == [6 * each, 4 * each, 2 * each, 2 * each]
    assert four.memory_bytes == 10**9 - 4 * each


def test_one_rank_says_nothing_of_the_exchange(approach: Approach) -> None:
    (found,) = forecast(approach, [8], pilot(approach, 1), 1)
    assert np.isnan(found.exchange_s) and found.round_s == pytest.approx(found.local_s + found.other_s)
    (found,) = forecast(approach, [8], None, 1)
    assert np.isnan(found.local_s) and found.busy == 3


def test_check(approach: Approach, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a run there are no times; after one on three ranks they are of that run. Nothing is written."""
    config = approach.config
    config.run_dir.parent.mkdir(exist_ok=True)
    path = config.run_dir.with_name("config.yaml")
    path.write_text(config.to_yaml())
    assert main([str(path), "--check", "ranks=2,64"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "holds no run of this configuration" in said[-4] and not config.run_dir.exists()
    federate(config, ranks=3)
    before = {p: p.stat().st_mtime_ns for p in config.run_dir.rglob("*")}
    capsys.readouterr()
    assert main([str(path), "--check", "ranks=3,64"]) == 0
    three, many = capsys.readouterr().out.splitlines()[-2:]
    assert three.split()[:2] == ["3", "2.0"] and many.split()[:2] == ["64", "3.0"]
    measured = table(config.run_dir, "rounds")["seconds_local"][1:].mean()
    assert float(three.split()[4]) == pytest.approx(measured, rel=0.5, abs=0.01)
    assert before == {p: p.stat().st_mtime_ns for p in config.run_dir.rglob("*")}
    for more in (["ranks=64"], []):
        assert main([str(path), "client.steps=3", "--check", *more]) == 2
        assert "another configuration" in capsys.readouterr().err
    assert main([str(path), "client.steps=3", "--check", "--fresh"]) == 0


FAILS = """
from contextlib import contextmanager
from fedhpc.methods.prompt import Prompt

class Fails(Prompt):
    \"\"\"Fails as soon as a batch goes through it.\"\"\"

    @contextmanager
    def attach(self, trained, received, rows, row_keys=None):
        raise KeyError("no layer\\nof this name")
        yield
"""


def test_check_takes_a_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What it passes can run: a method that fails in its first batch is one line, and nothing is written."""
    texts = write_texts(tmp_path)
    (tmp_path / "fails.py").write_text(FAILS)
    config = settings(tmp_path / "run", tree(texts, method={"name": str(tmp_path / "fails.py")}))
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    capsys.readouterr()
    assert main([str(path), "--check"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "a step of round 1 fails: KeyError: 'no layer" in line
    assert not config.run_dir.exists()


def test_check_measures_memory(approach: Approach) -> None:
    """The largest block is trained for a step, and what that took is said beside what is held."""
    plan = approach.plan(1)
    assert "without activations" in "".join(approach.details(plan))
    before = approach.initial_payload()
    approach.rehearse(plan)
    title, names, one, *_ = approach.details(plan)[-6:]
    assert title.startswith("memory in MiB, of ") and title.endswith("by runtime.worker_ranks:")
    said = float(one.split()[names.replace("a rank", "a_rank").split().index("a_rank")].replace(",", ""))
    assert said * 2**20 >= peak_memory(approach.base.device) * 0.99
    assert torch.equal(approach.initial_payload(), before)


@pytest.mark.parametrize(
    ("words", "said"),
    [(["ranks=8"], "is for --check"), (["--check", "ranks=8,x"], "not a list"), (["--check", "ranks=0"], "not a list")],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], words: list[str], said: str, tmp_path: Path) -> None:
    assert main([f"run.dir={tmp_path / 'run'}", *words]) == 2
    assert said in capsys.readouterr().err
