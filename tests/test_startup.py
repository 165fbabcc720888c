"""What a process does before it imports torch."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from fedhpc.models.import_structure import Reader, Structure
from fedhpc.ranks import memory


@pytest.mark.parametrize("most", [2**30, 2**25])
def test_any_glibc_keeps_freed_memory(monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    """Before 2.35 it refuses a threshold above 32 MiB."""
    taken: dict[int, int] = {}

    def mallopt(option: int, value: int) -> int:
        if option == memory.M_MMAP_THRESHOLD and value > most:
            return 0
        taken[option] = value
        return 1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: SimpleNamespace(mallopt=mallopt))
    memory.keep_freed_memory()
    assert taken == {memory.M_MMAP_THRESHOLD: most, memory.M_TRIM_THRESHOLD: -1}


def test_tensors_lie_in_huge_pages_and_unused_ones_take_no_memory() -> None:
    mode = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not mode.exists() or "[never]" in mode.read_text():
        pytest.skip("this kernel gives no huge pages")
    program = (
        "import numpy, torch; from fedhpc.ranks import memory; memory.keep_freed_memory(); "
        "kept = [torch.ones(2**20) for _ in range(16)]; print(open('/proc/self/smaps_rollup').read())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    kib = {words[0]: int(words[1]) for words in map(str.split, done.stdout.splitlines()[1:]) if len(words) > 1}
    assert kib["AnonHugePages:"] >= 48 * 2**10  # of 64 MiB
    assert kib["Rss:"] < 700 * 2**10  # torch's own are half of it


def test_the_configuration_starts_no_threads() -> None:
    """Else a signal could find one that does not hold it back while ranks are forked."""
    program = "import os; from fedhpc.main import main; main(['--where']); print(len(os.listdir('/proc/self/task')))"
    environment = {name: v for name, v in os.environ.items() if not name.endswith("_NUM_THREADS")}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.split()[-1] == "1"


def test_what_transformers_would_import_unasked_stays_out_until_it_is_asked_for(tmp_path: Path) -> None:
    for name in ("scipy", "sklearn"):
        (tmp_path / f"{name}.py").write_text("")  # installed as far as Python can see, and of no use to transformers
    program = (
        "import sys; import torch; from fedhpc.config import Model; from fedhpc.models.load import load_base\n"
        "load_base(Model(), torch.device('cpu'))\n"
        "print(*{'scipy', 'sklearn', 'jinja2'} & set(sys.modules))\n"
        "import scipy, jinja2; print(scipy.__file__, jinja2.__name__)"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{Path.cwd()}"}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.splitlines() == ["", f"{tmp_path}/scipy.py jinja2"]


def test_what_a_run_has_no_use_for_is_not_imported(tmp_path: Path) -> None:
    """Torch's compiler and its tensors over many ranks take memory in every rank, other libraries time."""
    program = """
import sys
from fedhpc.main import main

unused = "_dynamo _inductor onnx distributed.tensor distributed.fsdp".split()
unused = [*(f"torch.{name}" for name in unused), "peft", "datasets", "pyarrow", "pandas", "scipy", "sklearn", "jinja2"]
unused += ["sacrebleu", "rouge_score", "matplotlib", "mpi4py", "wandb"]
for options in (["--check"], ["run.dir=run", "federation.rounds=1", "evaluation.metrics=[loss]"]):
    assert main(["evaluation.max_examples=8", "client.steps=1", *options]) == 0
    print("unused:", *{*unused} & {*sys.modules})

import torch
from fedhpc.models.imports import without_compiler

with without_compiler():
    left_out = torch.compiler.disable(lambda x: (torch.compiler.is_compiling(), x))
    print(left_out(1), "torch._inductor" in sys.modules)
    from torch._dynamo import decorators  # whatever else is asked of it imports it
    import torch._dynamo.decorators as of_compiler
print(left_out(2), "torch._inductor" in sys.modules, of_compiler is decorators, of_compiler.__spec__.name)
print(torch.compile(lambda x: x + 1, backend=lambda graph, _: graph)(torch.ones(1)))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("unused:")] == ["unused:", "unused:"]
    assert lines[-3:] == ["(False, 1) False", "(False, 2) True True torch._dynamo.decorators", "tensor([2.])"]


def test_transformers_models_are_read_once_and_then_known_from_the_cache(tmp_path: Path) -> None:
    """It fails where transformers reads them in another way than the one that the cache stands before."""
    program = """
import sys
from fedhpc.models.imports import transformers_for_a_run

read = set()
def hook(event, arguments):
    if event == "open" and "/transformers/models/" in str(arguments[0]) and str(arguments[0]).endswith(".py"):
        read.add(arguments[0])
sys.addaudithook(hook)
transformers_for_a_run(write_cache=True)
print(len(read))
import transformers
from transformers.utils import import_utils

reader = import_utils.define_import_structure.__self__
for path, prefix in ((reader.models, "models"), (reader.models / "__init__.py", None), (reader.models / "gpt2", None)):
    assert reader.structure(path, prefix) == reader.read(path, prefix)
print(transformers.GPT2LMHeadModel.__name__, import_utils.__loader__ is import_utils.__spec__.loader)
"""
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd()), "FEDHPC_CACHE": str(tmp_path)}
    counts = []
    for _ in range(2):
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        count, line = done.stdout.splitlines()
        counts.append(int(count))
        assert line == "GPT2LMHeadModel True"
    assert counts[0] > 1000
    assert counts[1] < 100
    assert len(list((tmp_path / "imports").iterdir())) == 1


def test_models_of_transformers_are_read_again_where_a_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FEDHPC_CACHE", str(tmp_path / "cache"))
    models, program = tmp_path / "models", tmp_path / "import_utils.py"
    (models / "gpt2").mkdir(parents=True)
    for file in (program, models / "__init__.py", models / "gpt2" / "modeling_gpt2.py"):
        file.write_text("1")
    calls = []

    def read(module_path: str | Path, prefix: str | None = None) -> Structure:
        calls.append(module_path)
        return {frozenset(): {"gpt2": {"GPT2Config"}}, frozenset(["torch"]): {"gpt2.modeling_gpt2": {"GPT2Model"}}}

    def ask(write: bool = True) -> int:
        """How many times the files have been read."""
        reader = Reader(read, program, models, write)
        assert reader.structure(models, "models") == {
            frozenset(): {"models.gpt2": {"GPT2Config"}},
            frozenset(["torch"]): {"models.gpt2.modeling_gpt2": {"GPT2Model"}},
        }
        assert reader.structure(models / "__init__.py") == read("") and calls.pop() == ""
        return len(calls)

    assert ask(write=False) == 1 and not (tmp_path / "cache").exists()
    assert ask() == 2 and ask() == 2
    (models / "gpt2" / "modeling_gpt2.py").write_text("22")
    assert ask() == 3 and ask() == 3
    program.write_text("22")
    assert ask() == 4
    written = max((tmp_path / "cache" / "imports").iterdir(), key=os.path.getmtime).read_text()
    for number, damaged in enumerate([written[:-3], "", "[[[], {}]]", written.replace("gpt2", "gpt3")], start=5):
        for file in (tmp_path / "cache" / "imports").iterdir():
            file.write_text(damaged)
        assert ask() == number and ask() == number
    models = models.rename(tmp_path / "elsewhere")
    assert ask() == 8  # the same files: an environment that each job unpacks
    (tmp_path / "cache" / "imports").chmod(0o500)
    (models / "gpt2" / "configuration_gpt2.py").write_text("1")
    assert ask() == 9
    monkeypatch.delenv("FEDHPC_CACHE")
    monkeypatch.setattr(Path, "expanduser", raising := Mock(side_effect=RuntimeError("no home directory")))
    assert ask() == 10 and raising.called


def test_a_call_that_the_cache_does_not_know_goes_to_transformers(tmp_path: Path) -> None:
    read = Mock(return_value={})
    reader = Reader(read, tmp_path / "import_utils.py", tmp_path, write=False)
    assert reader.structure(tmp_path, "models", lazy=True) == {}
    read.assert_called_once_with(tmp_path, "models", lazy=True)


def test_forked_ranks_import_nothing_heavy_of_their_own(tmp_path: Path) -> None:
    """What each of them would import, or compile, its parent has before the fork."""
    program = """
import re, sys
from fedhpc import config, main

compiled, patterns = re.compile, []
re.compile = lambda *arguments, **named: patterns.append(arguments) or compiled(*arguments, **named)
main._imports(config.load(None, []), write_cache=False, for_ranks=True)
there, patterns[:] = {*sys.modules}, []
assert main.main(["--check", "run.dir=run"]) == 0
late = {*sys.modules} - there
heavy = ("torch.", "transformers.", "fedhpc.approaches.", "fedhpc.training.", "fedhpc.ranks.", "numpy.random", "sympy")
print("late:", *sorted(name for name in late if name.startswith(heavy) and name != "torch.utils._device"))
print("patterns:", len(patterns))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path.cwd())},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    late, patterns = done.stdout.splitlines()[-2:]
    assert len(late.split()) <= 1 + 4  # torch 2.15 has four small ones for a network on the device meta; it was 80
    assert int(patterns.removeprefix("patterns: ")) < 200  # transformers' 900 for names of weights are not among them
