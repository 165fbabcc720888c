"""The sweeps of configs/paper: they expand to valid runs, with or without the data and models that they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedhpc import sweep

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs/paper/sweeps").glob("*.yaml"))


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_expands(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, cells = sweep.load(file)
    assert len({cell.name for cell in cells}) == len(cells) > 3
    assert len({cell.config.run_dir.parent for cell in cells}) == 1
    seeds = {cell.config.run.seed for cell in cells}
    rates = file.stem.endswith("_rates")
    assert seeds == ({100} if rates else {0, 1, 2}), "rates are chosen with a seed that is used for nothing else"
    for cell in cells:
        config = cell.config
        if rates:
            assert config.data.test == "dev" or config.evaluation.test_max_examples == 1, "the test has no part in it"
        elif config.mode != "local":
            steps = config.client.steps * (1 if config.mode == "centralized" else config.federation.cohort_size)
            same = cells[0].config
            rows = steps * config.client.batch_size * config.federation.rounds
            wanted = same.client.steps * same.federation.cohort_size * same.client.batch_size * same.federation.rounds
            assert rows == wanted or "cohort" in cell.name, "every arm is given the same number of rows"


def test_there_are_sweeps() -> None:
    assert {"e2e_rates", "e2e_performance", "trec_rates", "trec_robustness"} <= {path.stem for path in SWEEPS}
