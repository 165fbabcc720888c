"""What reaches the screen of a run: its own lines, and no warning of a library, which would tear the progress bar.

The same runs are made with the newest releases of the libraries (launch/newest.sh).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fedhpc.builtin.world import rows
from tests.federations import final, save_random_bert, save_random_t5, tree, write_texts
from tests.ranks import Launcher, Result, run_ranks

_WARNS = re.compile(r"Warning:|WARNING|[Dd]eprecat|will be removed|\[transformers\]")
# Runs one configuration after the other as `python -m fedhpc.main` does; libraries are imported once.
_ONE_AFTER_THE_OTHER = """
import sys

from fedhpc.main import main
from fedhpc.ranks import process

for file in sys.argv[1:]:
    if code := main([file]):
        process.leave(code)
process.leave(0)
"""
VIRTUAL = {"num_virtual_tokens": 2}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts with a random model of each sort beside them."""
    folder = write_texts(tmp_path_factory.mktemp("texts"))
    for name, save in (("bert", save_random_bert), ("t5", save_random_t5)):
        (folder / name).mkdir()
        save(folder / name)
    (folder / "library").mkdir()
    for split, table, count in (("train", "passages", 20), ("test", "questions", 6)):
        lines = [json.dumps({**row, "client": f"c{i % 4}"}) for i, row in enumerate(rows(table, split)[:count])]
        (folder / "library" / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def trained(world: Path, method: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A run of one round that trains, evaluates, writes samples and exports."""
    raw = tree(world, evaluation={"samples": 2, "max_new_tokens": 3, "max_examples": 8, "metrics": ["loss"]})
    raw["client"] = {"optimizer": "adamw", "lr": 0.01, "batch_size": 3, "steps": 2}
    raw["federation"] = {"rounds": 1, "cohort_size": 3}
    for section, value in changes.items():
        raw[section] = {**raw.get(section, {}), **value} if isinstance(value, dict) else value
    return {**raw, "method": method}


def encoder_decoder(world: Path, method: dict[str, Any]) -> dict[str, Any]:
    return trained(world, method, model={"name": str(world / "t5")}, data={"prompt": "{mr}", "target": "{ref}"})


def classifier(world: Path, method: dict[str, Any]) -> dict[str, Any]:
    data = {"prompt": "{mr}", "max_length": 40}
    metrics = {"metrics": ["loss", "accuracy"]}
    return trained(world, method, model={"name": str(world / "bert")}, data=data, evaluation=metrics)


def searched(world: Path, method: dict[str, Any]) -> dict[str, Any]:
    raw = trained(world, method)
    del raw["client"]
    return raw


def library(world: Path, method: dict[str, Any]) -> dict[str, Any]:
    raw = trained(world, method, federation={"cohort_fraction": 1.0}, evaluation={"metrics": ["recall"]})
    raw["data"] = {"source": str(world / "library"), "prompt": "{question}", "target": " {answer}", "client": "client"}
    raw["model"], raw["partition"] = {"name": str(world / "model")}, {"name": "natural"}
    del raw["client"], raw["federation"]["cohort_size"]
    return raw


def retriever(world: Path, method: dict[str, Any]) -> dict[str, Any]:
    raw = trained(world, method, model={"name": str(world / "bert"), "task": "embedding"})
    raw["data"] |= {"prompt": "{mr}", "target": "{ref}", "max_length": 40}
    return raw


RUNS: dict[str, tuple[Callable[[Path, dict[str, Any]], dict[str, Any]], dict[str, Any]]] = {
    "prefix": (trained, {"name": "prefix", **VIRTUAL}),
    "prompt": (trained, {"name": "prompt", **VIRTUAL}),
    "lora": (trained, {"name": "lora", "rank": 2}),
    "full": (trained, {"name": "full"}),
    "t5-prefix": (encoder_decoder, {"name": "prefix", **VIRTUAL}),
    "t5-prompt": (encoder_decoder, {"name": "prompt", **VIRTUAL}),
    "t5-full": (encoder_decoder, {"name": "full"}),
    "bert-prefix": (classifier, {"name": "prefix", **VIRTUAL}),
    "bert-lora": (classifier, {"name": "lora", "rank": 2}),
    "distillation": (
        trained,
        {"name": "distillation", "student": {"name": "lora", "rank": 2}, "public": {"max_examples": 6}, "top_k": 3},
    ),
    "prompt_search": (
        searched,
        {"name": "prompt_search", "instructions": ["a b", "c"], "population": 2, "survivors": 1},
    ),
    "fedbpt": (searched, {"name": "fedbpt", **VIRTUAL, "dimension": 4, "popsize": 4, "iterations": 1}),
    "rag": (library, {"name": "rag", "gold": "passage_id", "k": 2, "context_tokens": 40}),
    "retriever": (retriever, {"name": "retriever"}),
}


def configuration(world: Path, name: str, folder: Path) -> Path:
    """The file of a run in `folder`."""
    make, method = RUNS[name]
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump({**make(world, method), "run": {"name": name, "dir": str(folder / name)}}))
    return file


def warned(text: str) -> list[str]:
    """The lines of the screen that are a library's warning."""
    return [line for line in text.splitlines() if _WARNS.search(line)]


def test_warnings_are_seen() -> None:
    assert warned("round 1/2\nx.py:3: FutureWarning: `a` is old\n") and warned("`a` is deprecated")
    assert not warned("round 1/2  train_loss 5.786  cohort 4  0.3 s\ncomplete: results.h5")


@pytest.fixture(scope="module")
def alone(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    """A folder with all the runs in one process, and what it said."""
    folder = tmp_path_factory.mktemp("alone")
    files = [str(configuration(world, name, folder)) for name in RUNS]
    script = folder / "runs.py"
    script.write_text(_ONE_AFTER_THE_OTHER)
    (result,) = run_ranks(1, [str(script), *files], timeout=600)
    return folder, result


@pytest.mark.slow
def test_the_screen_of_every_approach_and_model_is_clean(alone: tuple[Path, Result]) -> None:
    _, result = alone
    assert result.code == 0, result.err
    assert result.err == ""
    assert warned(result.out) == [] and result.out.count("complete: ") == len(RUNS)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "mpiexec"])
def test_the_screen_of_a_launcher_is_clean(
    world: Path, tmp_path: Path, alone: tuple[Path, Result], launcher: Launcher
) -> None:
    for result in run_ranks(
        2, ["-m", "fedhpc.main", str(configuration(world, "prefix", tmp_path))], launcher, timeout=600
    ):
        assert result.code == 0, result.err
        assert result.err == "" and warned(result.out) == []
    one, other = (final(folder / "prefix") for folder in (alone[0], tmp_path))
    assert all((one[name] == other[name]).all() for name in one)
