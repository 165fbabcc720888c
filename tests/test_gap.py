"""The sweeps of configs/gap: they expand to valid runs of the same number of rows, and tuning has a seed of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedhpc import sweep

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs/gap/sweeps").glob("*.yaml"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_every_arm_has_the_same_rows(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, cells = sweep.load(file)
    report = file.stem == "report"
    assert {cell.config.run.seed for cell in cells} == (set(range(5)) if report else {100})
    for cell in cells:
        config = cell.config
        assert report or config.evaluation.test_max_examples == 1, "the test has no part in the tuning"
        clients = 1 if config.mode == "centralized" else config.federation.cohort_size
        rows = clients * config.client.steps * config.client.batch_size * config.federation.rounds
        assert rows == 640, cell.name


def test_there_are_sweeps() -> None:
    assert {"rates", "levers", "recipe_rates", "check", "report"} == {path.stem for path in SWEEPS}
