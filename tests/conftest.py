"""What the tests share."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--each-once", action="store_true",
        help="of each test only as many cases as it takes to have every value of every parameter once",
    )  # fmt: skip


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the cases that --each-once does not need, after -m and -k have left out theirs."""
    if not config.getoption("--each-once"):
        return
    of_tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        of_tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {id(item) for cases in of_tests.values() for item in _each_value_once(cases)}
    config.hook.pytest_deselected(items=[item for item in items if id(item) not in kept])
    items[:] = [item for item in items if id(item) in kept]


def _each_value_once(cases: list[pytest.Item]) -> Iterator[pytest.Item]:
    """The cases of one test, always the one with the most new values next, until there are no new ones."""
    of_cases = {case: case.callspec.params if hasattr(case, "callspec") else {} for case in cases}
    yield from (case for case, parameters in of_cases.items() if not parameters)
    values = {case: {(name, repr(value)) for name, value in of_cases[case].items()} for case in of_cases}
    seen: set[tuple[str, str]] = set()
    while values:
        best = max(values, key=lambda case: len(values[case] - seen))
        new = values.pop(best) - seen
        if not new:
            return
        seen |= new
        yield best


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """With --durations also the files that took the longest, since most of the time goes into short tests."""
    if not config.getoption("durations"):
        return
    seconds: dict[str, float] = defaultdict(float)
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid.partition("::")[0]] += report.duration
    terminalreporter.section("slowest 25 files")
    for name, taken in sorted(seconds.items(), key=lambda one: -one[1])[:25]:
        terminalreporter.write_line(f"{taken:.0f}s {name}")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_token_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEDHPC_CACHE", str(tmp_path_factory.getbasetemp() / "tokens"))


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run in this process would wait a third of its time, and nobody takes the power away."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def shared() -> Path:
    """The folder with real data and models beside the checkout."""
    if not SHARED.is_dir():
        pytest.skip("the folder shared/ with real data and models is not beside the checkout")
    return SHARED
