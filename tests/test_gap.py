"""The sweeps of configs/gap: they expand to valid runs of the same number of rows, and tuning has a seed of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedhpc import registry, sweep
from fedhpc.config import load
from fedhpc.errors import UserError
from tests import tiny

ROOT = Path(__file__).resolve().parents[1]
SWEEPS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs/gap/sweeps").glob("*.yaml"))
REPORTS = {"first_report": 5, "baselines": 5, "recipe": 5, "averaged": 5, "more_rows": 3}  # and their seeds
CHECKED = ["levers", "prefix"]  # the tuning read seed 100; two more tell what helps from chance


@pytest.mark.parametrize("file", SWEEPS, ids=lambda path: path.stem)
def test_every_arm_has_the_same_rows(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    _, cells = sweep.load(file)
    seeds = REPORTS.get(file.stem)
    tuning = {100, 101, 102} if file.stem in CHECKED else {100}
    assert {cell.config.run.seed for cell in cells} == (set(range(seeds)) if seeds else tuning)
    for cell in cells:
        config = cell.config
        assert seeds or config.evaluation.test_max_examples == 1, "the test has no part in the tuning"
        clients = 1 if config.mode == "centralized" else config.federation.cohort_size
        rows = clients * config.client.steps * config.client.batch_size * config.federation.rounds
        times = {"x2": 2, "x4": 4}.get(cell.name.split("-")[1], 1)
        assert rows == (640 if file.stem.startswith("first_") else 2560 * times), cell.name


def test_there_are_sweeps() -> None:
    tuning = {"central", "shapes", "levers", "prefix", "passed"}
    first = {f"first_{name}" for name in ("rates", "levers", "recipe_rates", "check", "report")}
    assert {path.stem for path in SWEEPS} == {*tuning, *first, *REPORTS}


def test_matched_tokens_come_in_the_order_of_those_received(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    base = tiny.base("llama")
    plugin = registry.choice("methods", "./configs/gap/matched_prefix.py")
    method = plugin(plugin.Options(num_virtual_tokens=6), base, 0)
    received = torch.randn(3, 6, method.width, generator=torch.Generator().manual_seed(0))
    orders = [[2, 0, 1, 5, 4, 3], [0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0]]
    trained = torch.stack([prefix[order] for prefix, order in zip(received, orders, strict=True)]) + 0.1
    finished = method.finish({"prompt_embeddings": trained}, {"prompt_embeddings": received})
    torch.testing.assert_close(finished["prompt_embeddings"], received + 0.1)
    trained[1, 2, 3] = float("nan")  # a client that diverged is rejected later, and alone
    assert method.finish({"prompt_embeddings": trained}, {"prompt_embeddings": received})[
        "prompt_embeddings"
    ].isfinite().flatten(1).all(1).tolist() == [True, False, True]


@pytest.mark.parametrize("override", ["client.scaffold=true", "client.moments=second"])
def test_what_is_of_single_tokens_does_not_go_with_matching(override: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=f"{override.partition('=')[0]} is of each virtual token.* give one"):
        load(None, ["method.name=./configs/gap/matched_prefix.py", override])


def test_a_mean_start_is_the_mean_of_the_starts_from_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    base = tiny.base("llama")
    rows = ["The mill is a pub.", "A cheap bar by the river, for families.", "Is it far?"]
    plugin = registry.choice("methods", "./configs/gap/mean_prefix.py")
    mean = plugin(plugin.Options(num_virtual_tokens=6, init_text="\n".join(rows)), base, 0).initial()
    prefix = registry.choice("methods", "prefix")
    starts = [prefix(prefix.Options(num_virtual_tokens=6, init_text=row), base, 0).initial() for row in rows]
    expected = sum(start["prompt_embeddings"] for start in starts) / len(rows)
    torch.testing.assert_close(mean["prompt_embeddings"], expected, rtol=0, atol=1e-12)
