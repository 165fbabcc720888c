"""Notebooks and tutorials do what they say: every cell and every command runs, one after the other, in an empty folder.

The first run is started as a user's is, in a process of its own; the others are threads of this one, which has the
libraries already (tests/test_api.py has runs in processes).
"""

from __future__ import annotations

import ast
import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pandas
import pytest

import fedhpc
from fedhpc import api, sweep
from fedhpc.console import COMMANDS
from tests.federations import federate
from tests.ranks import REPOSITORY

DOCS = REPOSITORY / "docs"
NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))
TUTORIALS = sorted((DOCS / "tutorials").glob("*.md"))


def in_this_process(config: api.Configuration = None, ranks: int = 1, overrides: api.Overrides = ()) -> fedhpc.Run:
    """What fedhpc.run does, on threads."""
    resolved = fedhpc.load_config(config, overrides)
    federate(resolved, ranks)
    return fedhpc.open_run(resolved.run_dir)


def execute(source: str, name: str, names: dict[str, Any]) -> object:
    """Run the lines of a cell; the value of the last one where that is an expression."""
    tree = ast.parse(source)
    last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, name, "exec"), names)
    return eval(compile(ast.Expression(last.value), name, "eval"), names) if isinstance(last, ast.Expr) else None


@pytest.fixture(scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tutorials")


@pytest.fixture(autouse=True)
def _there(_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(_folder)
    monkeypatch.setenv("MPLBACKEND", "agg")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Committed without outputs, which would be those of one machine; every run in it is complete."""
    if path.stem != "first_federation":
        monkeypatch.setattr(api, "run", in_this_process)
    cells = [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)
    names: dict[str, Any] = {"__name__": "__main__"}
    shown = [execute("".join(cell["source"]), f"{path.name}, cell {n}", names) for n, cell in enumerate(cells, 1)]
    runs = [run for run in [*names.values(), *names.get("runs", {}).values()] if isinstance(run, fedhpc.Run)]
    assert runs and all(run.complete for run in runs)
    tables = [value for value in shown if isinstance(value, pandas.DataFrame)]
    assert tables and all(len(table) and not table.isna().all().any() for table in tables)


@pytest.mark.slow
@pytest.mark.parametrize("path", TUTORIALS, ids=lambda path: path.stem)
def test_a_tutorial(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its files are saved, its Python is run, and so is each line of its commands."""
    text = path.read_text()
    names: dict[str, Any] = {"__name__": "__main__"}
    for before, language, block in re.findall(r"(?:`([\w.]+)`[^`\n]*:\n)?```(\w*)\n(.*?)```", text, re.DOTALL):
        if language == "yaml":
            Path(before).write_text(block)
        elif language == "python":
            execute(block, path.name, names)
        else:
            for line in block.splitlines():
                command(shlex.split(line))
    said = capsys.readouterr()
    assert said.err == "" and said.out
    if path.stem == "hospitals":  # the order that it promises
        pooled, federated, alone = (
            fedhpc.open_run(f"runs/{run}").test.loc["loss", "test"] for run in ("pooled", "hospitals", "alone")
        )
        assert pooled < federated < alone


def command(words: list[str]) -> None:
    """Run a line of a tutorial in this process: fedhpc's commands as they are, on one rank; a job array as its runs."""
    if words[0] == "sbatch":
        _, array, script, file = words
        assert (REPOSITORY / script).is_file()
        first, last = map(int, array.removeprefix("--array=").partition("%")[0].split("-"))
        cells = sweep.load(Path(file))[1]
        assert (first, last) == (0, len(cells) - 1)
        for cell in cells:
            federate(cell.config)
        return
    program, name, *arguments = words
    assert program == "fedhpc"
    if "--ranks" in arguments:
        at = arguments.index("--ranks")
        del arguments[at : at + 2]
    module = importlib.import_module(COMMANDS[name].module)
    if hasattr(module, "__path__"):
        module = importlib.import_module(f"{module.__name__}.__main__")
    assert module.main(arguments) == 0, words
