"""The state that a run ends with (evaluation.keep), and when it ends (evaluation.patience)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
import pytest
import torch

from fedhpc.approaches.prepare import is_finished
from fedhpc.errors import UserError
from fedhpc.export.source import _thetas
from fedhpc.ranks.transport.base import LoopbackTransport
from fedhpc.report.runs import load_run
from fedhpc.report.single import _facts
from fedhpc.results.status import read_status
from fedhpc.server.selection import Lawa, Selection
from fedhpc.server.state import ParameterState
from tests.federations import Interrupted, federate, final, settings, table, tree, write_texts
from tests.test_federation import same_results


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


def raw(texts: Path, seed: int, rounds: int = 8, **evaluation: Any) -> dict[str, Any]:
    """A run whose validation loss falls at first and, with some seeds, rises later."""
    small = tree(
        texts,
        run={"seed": seed},
        federation={"rounds": rounds, "cohort_size": 3},
        client={"optimizer": "adamw", "lr": 1.0, "steps": 2},
        evaluation={"samples": 0, "max_examples": 4, "test_max_examples": 4, **evaluation},
    )
    return {**small, "method": {"name": "lora"}}


class Run(NamedTuple):
    seed: int
    losses: np.ndarray


@pytest.fixture(scope="module")
def last(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run that is best before its end. With which seed that is differs between processors, whose sums differ."""
    for seed in range(20):
        folder = tmp_path_factory.mktemp("last")
        federate(settings(folder, raw(texts, seed)))
        measured: np.ndarray = table(folder, "rounds")["eval_loss"]
        if 0 < measured.argmin() < 6:
            return Run(seed, measured)
    raise AssertionError("no seed with a best round in between")


def test_the_best_state_is_tested_and_exported(texts: Path, tmp_path: Path, last: Run) -> None:
    best = int(last.losses.argmin())
    federate(settings(tmp_path / "best", raw(texts, last.seed, keep="best")), ranks=2)
    federate(settings(tmp_path / "until", raw(texts, last.seed, rounds=best)))
    np.testing.assert_array_equal(table(tmp_path / "best", "rounds")["eval_loss"], last.losses)
    kept, wanted = final(tmp_path / "best"), final(tmp_path / "until")
    for name in wanted:
        np.testing.assert_array_equal(kept[name], wanted[name])
    assert table(tmp_path / "best", "test")["loss"] == table(tmp_path / "until", "test")["loss"]
    with h5py.File(tmp_path / "best" / "results.h5") as file:
        assert file.attrs["best_round"] == best
    assert ["best round", str(best)] in _facts(load_run(tmp_path / "best")).rows


def test_a_run_ends_when_nothing_gets_better(
    texts: Path, tmp_path: Path, last: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path, raw(texts, last.seed, keep="best", patience=2))
    federate(config, ranks=3)
    best = next(i for i in range(len(last.losses)) if (last.losses[i + 1 : i + 3] >= last.losses[: i + 1].min()).all())
    best = int(last.losses[: best + 1].argmin())
    np.testing.assert_array_equal(table(tmp_path, "rounds")["eval_loss"], last.losses[: best + 3])
    assert f"ended: eval_loss was best after round {best}, 2 evaluations ago" in capsys.readouterr().out
    status = read_status(tmp_path)
    assert status is not None and (status.state, status.round) == ("complete", best + 2)
    assert is_finished(config, LoopbackTransport(), False)


@pytest.mark.parametrize("more", [{"patience": 2}, {"ema": 0.6}, {"lawa": 3, "keep": "last"}], ids=str)
def test_the_chosen_state_survives_a_stop(texts: Path, tmp_path: Path, last: Run, more: dict[str, Any]) -> None:
    """On any number of ranks, at collectives spread over the run, with fewer checkpoints than rounds."""
    tree_ = {**raw(texts, last.seed, **{"keep": "best", **more}), "checkpoint": {"every": 2}}
    collectives = federate(settings(tmp_path / "whole", tree_), ranks=2)
    config = settings(tmp_path / "stopped", tree_)
    for share, ranks in ((0.6, 2), (0.35, 3), (0.3, 1)):
        with pytest.raises(Interrupted):
            federate(config, ranks, stop_at=int(share * collectives))
    federate(config, ranks=3)
    same_results(tmp_path / "whole", tmp_path / "stopped", ("rounds", "clients"))


def test_a_longer_run_goes_on_from_the_last_state(texts: Path, tmp_path: Path, last: Run) -> None:
    federate(settings(tmp_path / "run", raw(texts, last.seed, rounds=6, keep="best")))
    federate(settings(tmp_path / "run", raw(texts, last.seed, keep="best")), ranks=2)
    np.testing.assert_array_equal(table(tmp_path / "run", "rounds")["eval_loss"], last.losses)


def test_a_round_that_is_exported_later_is_the_average_too() -> None:
    states = [torch.full((3,), float(value)) for value in (1, 2, 4)]
    state = ParameterState(torch.zeros(3), average=Lawa(2))
    assert torch.equal(state.evaluated, state.theta)
    for count, state.theta in zip((1, 2, 2), states, strict=True):
        assert state.average is not None
        state.average.see(state.theta)
        assert state.average.title == f"the mean of the states of the last {count} rounds"
    state.past = {2: states[1]}  # from which late clients start
    kept = _thetas(state, 3)
    assert list(kept) == [3] and torch.equal(kept[3], torch.full((3,), 3.0))


def test_what_is_better_follows_from_the_metric() -> None:
    loss, accuracy = Selection(), Selection()
    values = [math.nan, 3.0, 2.0, 2.0, math.nan, 1.0]
    assert [loss.see(i, value, False) for i, value in enumerate(values)] == [False, True, True, False, False, True]
    assert [accuracy.see(i, value, True) for i, value in enumerate(values)] == [False, True, False, False, False, False]
    again = Selection()
    again.load(accuracy.tensors())
    assert vars(again) == vars(accuracy) and accuracy.waited == 4 and accuracy.round == 1
    assert Selection().tensors() == {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": "local", "evaluation": {"keep": "best"}}, "evaluation.keep: with mode local"),
        ({"mode": "local", "evaluation": {"patience": 2}}, "evaluation.patience: with mode local"),
        ({"mode": "local", "evaluation": {"ema": 0.9}}, "evaluation.ema: with mode local"),
        ({"evaluation": {"ema": 0.9, "lawa": 3}}, "evaluation.lawa: evaluation.ema is an average of states too"),
        (
            {"personalization": {"parts": ["prompt*"]}, "evaluation": {"lawa": 3, "client_fraction": 0.2}},
            r"evaluation\.lawa: personalization\.parts stay on the clients",
        ),
        *(
            (
                {"method": {"name": "lora", "aggregation": rule}, "evaluation": {"ema": 0.9}},
                f"aggregation {rule} makes other factors in every round, which evaluation.ema would average",
            )
            for rule in ("svd", "flex")
        ),
        (
            {"personalization": {"parts": ["prompt*"]}, "evaluation": {"keep": "best", "client_fraction": 0.2}},
            r"personalization\.parts stay on the clients",
        ),
        ({"evaluation": {"keep": "best", "metrics": []}}, r"first of evaluation\.metrics, and there is none; name one"),
        (
            {"evaluation": {"patience": 1, "metrics": [], "test_metrics": ["loss"]}},
            r"first of evaluation\.metrics, and there is none",
        ),
    ],
)
def test_what_cannot_be_chosen_is_refused(texts: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(tmp_path, {**tree(texts), **changes})
