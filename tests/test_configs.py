"""The committed configurations resolve, and those on built-in data pass --check."""

from __future__ import annotations

from pathlib import Path

import pytest

from fedhpc import config as configuration
from fedhpc.main import main

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
FILES = sorted(path for path in CONFIGS.rglob("*.yaml") if path.parent.name != "sweeps")  # those: test_sweep.py


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONFIGS)))
def test_resolves(path: Path) -> None:
    config = configuration.load(str(path), [])
    assert config.run.name != "demo", "a committed configuration has a run name of its own"


@pytest.mark.parametrize("name", ["classification", "skewed", "reparametrised", "million"])
def test_check_passes_and_writes_nothing(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(CONFIGS / f"{name}.yaml"), "--check"]) == 0
    out = capsys.readouterr().out
    assert "payload:" in out and "at the end all 300 test examples" in out
    assert not list(tmp_path.iterdir())


def test_a_new_choice_within_a_choice_drops_the_options_of_the_old_one() -> None:
    raw = {"method": {"name": "distillation", "student": {"name": "lora", "rank": 2}}}
    for change, found in (("prefix", {"name": "prefix"}), ("lora", {"name": "lora", "rank": 2})):
        changed = configuration.override(raw, [("method.student.name", change)])
        assert changed["method"]["student"] == found
    assert raw["method"]["student"] == {"name": "lora", "rank": 2}
