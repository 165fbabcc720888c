"""fedhpc from Python and as a command: whole small runs, ^C, resuming, mistakes, and what a notebook shows."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import psutil
import pytest
import yaml

import fedhpc
from fedhpc import console, registry
from tests.federations import final, tree, write_texts

REPOSITORY = Path(__file__).resolve().parents[1]


def config(texts: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    """A run of a few seconds."""
    run = {"name": "small", "dir": str(run_dir)}
    evaluation = {"samples": 2, "max_examples": 8, "metrics": ["loss"]}
    return tree(texts, **{"run": run, "evaluation": evaluation, "federation": {"rounds": 2}, **changes})


def python(program: str, cwd: Path, *flags: str) -> subprocess.Popen[str]:
    """A Python process that runs `program` with this checkout's fedhpc."""
    paths = f"import sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
    command = [sys.executable, *flags, "-c", paths + textwrap.dedent(program)]
    return subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.fixture(autouse=True)
def _alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_texts(tmp_path_factory.mktemp("texts"))


@pytest.fixture(scope="module")
def small(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], fedhpc.Run]:
    """A configuration and its finished run on two ranks."""
    made = config(texts, tmp_path_factory.mktemp("runs") / "small")
    return made, fedhpc.run(made, ranks=2)


# ---------------------------------------------------------------- names


def test_public_names() -> None:
    classes = {path.partition(":")[2]: path.partition(":")[0] for path in registry.BASES.values()}
    for name in fedhpc.__all__:
        value = getattr(fedhpc, name)
        assert value.__name__ == name and name in dir(fedhpc)
        assert value.__module__ == classes.get(name, value.__module__)
    assert {"run", "open_run", "load_config", "Run", "Config", "UserError"} <= set(fedhpc.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = fedhpc.nonsense  # type: ignore[attr-defined]


def test_importing_costs_nothing_and_the_api_needs_no_torch(tmp_path: Path) -> None:
    program = """
        import fedhpc
        heavy = {"torch", "transformers", "numpy", "pydantic", "yaml", "h5py", "matplotlib", "pandas"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        fedhpc.load_config(), fedhpc.run, fedhpc.Run
        assert not {"torch", "transformers", "matplotlib", "pandas"} & set(sys.modules)
    """
    process = python(program, tmp_path)
    assert process.communicate() == ("", "") and process.returncode == 0


# ---------------------------------------------------------------- runs


def test_a_finished_run_has_its_tables(small: tuple[dict[str, Any], fedhpc.Run]) -> None:
    _, run = small
    assert run.complete and "complete" in repr(run)
    assert run.rounds["round"].tolist() == [0, 1, 2]
    assert np.isnan(run.rounds["train_loss"][0]) and np.isfinite(run.rounds["eval_loss"]).all()
    assert len(run.clients) == 12 and set(run.clients["worker"]) == {1}
    assert run.test.index.tolist() == ["loss"] and np.isfinite(run.test["test"]["loss"])
    loss = run.test.loc["loss"]
    assert loss["low"] < loss["test"] < loss["high"] and loss["n"] > 8  # all of them: not evaluation.max_examples
    assert list(run.events.columns) == ["round", "kind", "message"]
    assert [set(sample) for sample in run.samples] == [{"prompt", "references", "text"}] * 2
    assert isinstance(run.samples[0]["references"], list)
    assert run.adapter is not None and (run.adapter / "adapter_config.json").exists()
    assert run.config.federation.rounds == 2 and isinstance(run.config, fedhpc.Config)
    assert fedhpc.load_config(run.config) == run.config
    html = run._repr_html_()
    assert "fedhpc run small" in html and "test loss" in html and str(run.path) in html


def test_a_run_is_plotted(small: tuple[dict[str, Any], fedhpc.Run]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    axes = small[1].plot()
    assert [line.get_label() for line in axes.lines] == ["training (clients' data)", "validation (o: every round)"]
    assert small[1].plot(axes) is axes and len(axes.lines) == 4
    pyplot.close(axes.figure)


def test_a_finished_run_is_not_run_again(
    small: tuple[dict[str, Any], fedhpc.Run], capsys: pytest.CaptureFixture[str]
) -> None:
    made, run = small
    again = fedhpc.run(made)
    assert again.rounds.equals(run.rounds)
    assert "this run is finished" in capsys.readouterr().out


def test_overrides_extend_a_run_and_fresh_starts_it_over(
    texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(config(texts, tmp_path / "run")))
    run = fedhpc.run(file, overrides=["federation.rounds=1"])
    assert len(run.rounds) == 2
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("round 1/1  train_loss ") for line in lines) and lines[-1].startswith("complete: ")
    run = fedhpc.run(str(file), overrides={"federation.rounds": 2})
    assert len(run.rounds) == 3 and "resuming after round 1" in capsys.readouterr().out
    run = fedhpc.run(fedhpc.load_config(file, ["client.lr=5.0"]), fresh=True)
    assert run.config.client.lr == 5.0 and "resuming" not in capsys.readouterr().out


INTERRUPTED = """
    import fedhpc
    try:
        fedhpc.run("mine.yaml", ranks=2)
    except KeyboardInterrupt as stopped:
        print("stopped:", stopped)
        sys.exit(75)
"""


def _waiting_for(process: subprocess.Popen[str], beginning: str) -> Iterator[str]:
    assert process.stdout is not None
    for line in process.stdout:
        yield line
        if line.startswith(beginning):
            return
    raise AssertionError(process.communicate()[1])


def _is_run(process: psutil.Process) -> bool:
    """Whether a process is the one that the API has started; False for one that has just ended."""
    try:
        return "fedhpc.main" in process.cmdline()
    except psutil.Error:
        return False


def test_an_interrupt_stops_a_run_that_goes_on_later(texts: Path, tmp_path: Path) -> None:
    made = config(texts, tmp_path / "run", federation={"rounds": 40}, evaluation={"every": 40})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(made))
    process = python(INTERRUPTED, tmp_path)
    list(_waiting_for(process, "round 2/40"))
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (75, "")
    said = re.search(r"stopped: stopped; (\d+) rounds are kept in .*run, the same fedhpc.run\(...\) goes on", out)
    assert said is not None, out
    assert not [child for child in children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE]
    kept = int(said[1])
    assert 2 <= kept < 40
    half = fedhpc.open_run(tmp_path / "run")
    assert not half.complete and "preempted" in repr(half) and half.adapter is None
    assert half.rounds["round"].tolist() == list(range(kept + 1))
    made["federation"]["rounds"] = kept + 1
    run = fedhpc.run(made)
    assert run.complete and run.rounds["round"].tolist() == list(range(kept + 2))
    assert "resumed" in run.events["kind"].tolist()
    whole = fedhpc.run(config(texts, tmp_path / "whole", federation={"rounds": kept + 1}, evaluation={"every": 40}))
    there, here = final(whole.path), final(run.path)
    assert all(np.array_equal(there[name], here[name]) for name in there)


def test_an_interrupt_before_anything_is_written(texts: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config(texts, tmp_path / "run")))
    process = python(INTERRUPTED, tmp_path)
    # Libraries may start other programs while they are imported, before anybody waits for ^C.
    while not any(_is_run(child) for child in psutil.Process(process.pid).children()):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=300)
    assert process.returncode == 75 and "stopped: stopped before anything was written" in out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("number", "said"), [(signal.SIGTERM, "preempted by SIGTERM"), (signal.SIGKILL, "ended by signal 9")]
)
def test_a_run_that_somebody_else_ends(texts: Path, tmp_path: Path, number: int, said: str) -> None:
    def end() -> None:
        while not (tmp_path / "run" / "results.h5").exists():
            time.sleep(0.05)
        for child in psutil.Process().children():
            if _is_run(child):
                child.send_signal(number)

    thread = threading.Thread(target=end)
    thread.start()
    made = config(texts, tmp_path / "run", federation={"rounds": 400}, evaluation={"every": 400})
    with pytest.raises(RuntimeError, match=said):
        fedhpc.run(made)
    thread.join()


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("made", "more", "said"),
    [
        ({"client": {"lr": -1}}, {}, r"configuration: client\.lr: must be greater than or equal to 0, got -1"),
        ({"clint": {}}, {}, "configuration: unknown key 'clint'; did you mean 'client'"),
        ({}, {"overrides": ["client.lr"]}, "'client.lr' is not of the form"),
        ({}, {"overrides": "client.lr=1"}, "overrides: a list of texts"),
        ({}, {"overrides": {"client.rl": 1}}, "unknown key 'client.rl'"),
        ({}, {"ranks": 0}, "ranks: 0: a number of 1 or more is needed"),
        ({}, {"overrides": [3]}, r"overrides: a list of texts like section.key=value is needed, got \[3\]"),
        (5, {}, "config: a file, a mapping of sections or a fedhpc.Config is needed, got 5"),
        ("none.yaml", {}, r"none\.yaml: there is no such configuration file"),
    ],
)
def test_a_wrong_call_is_one_line_and_starts_nothing(
    made: Any, more: Mapping[str, Any], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(subprocess, "Popen", None)
    with pytest.raises(fedhpc.UserError, match=said) as error:
        fedhpc.run(made, **more)
    assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_wrong_data_is_one_line(texts: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(fedhpc.UserError, match=r"data\.prompt names the column 'nothing'") as error:
        fedhpc.run(config(texts, tmp_path / "run", data={"prompt": "{nothing} :"}), ranks=2)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()
    assert capfd.readouterr().err == ""


def test_under_a_launcher_it_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(fedhpc.UserError, match="torchrun has started this process"):
        fedhpc.run({})


def test_a_resolved_configuration_is_changed_to_another_method() -> None:
    config = fedhpc.load_config(None, {"client.lr": np.float32(0.5), "federation.rounds": np.int64(3)})
    assert config.client.lr == 0.5 and config.federation.rounds == 3
    assert fedhpc.load_config(config, ["method.name=rag"]).method.name == "rag"
    with pytest.raises(fedhpc.UserError, match=r"overrides: client\.lr: method\.name rag does not read it"):
        fedhpc.load_config(config, ["method.name=rag", "client.lr=0.25"])


def test_a_run_stays_the_same_when_the_program_goes_elsewhere(
    small: tuple[dict[str, Any], fedhpc.Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(small[1].path.parent)
    run = fedhpc.open_run(small[1].path.name)
    monkeypatch.chdir(tmp_path)
    assert run.path == small[1].path and run.adapter == small[1].path / "adapter"


def test_no_run_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(fedhpc.UserError, match=r"holds no results\.h5"):
        fedhpc.open_run(tmp_path)


def test_pandas_is_an_extra_that_the_error_names(small: tuple[dict[str, Any], fedhpc.Run], tmp_path: Path) -> None:
    program = f"""
        sys.modules["pandas"] = None
        import fedhpc
        run = fedhpc.open_run({str(small[1].path)!r})
        assert run.samples and "complete" in run._repr_html_()
        try:
            run.rounds
        except fedhpc.UserError as error:
            print(error)
    """
    out, err = python(program, tmp_path).communicate()
    assert (out, err) == ("this needs the package 'pandas': pip install 'fedhpc[pandas]'\n", "")


# ---------------------------------------------------------------- notebook, README, console


def test_a_notebook_shows_progress_in_one_place(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[str] = []

    def display(data: Mapping[str, str], raw: bool, display_id: bool) -> Any:
        assert raw and display_id
        shown.append(data["text/plain"])
        return SimpleNamespace(update=lambda data, raw: shown.append(data["text/plain"]))

    notebook, module = ModuleType("IPython"), ModuleType("IPython.display")
    notebook.get_ipython = lambda: SimpleNamespace(kernel=object())  # type: ignore[attr-defined]
    module.display = display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    fedhpc.run(config(texts, tmp_path / "run", federation={"rounds": 5}, evaluation={"every": 3}))
    assert capsys.readouterr().out == ""
    rounds = [line.split()[1] for line in shown[-1].splitlines() if line.startswith("round ")]
    assert rounds[-2:] == ["3/5", "5/5"] and "complete: " in shown[-1]
    assert any("round 1/5" in text for text in shown) and any("round 2/5" in text for text in shown)


def test_the_example_of_the_readme(texts: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (REPOSITORY / "README.md").read_text(), re.DOTALL)
    [example] = [block for block in blocks if "fedhpc.run(" in block]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(config(texts, Path("runs/mine"))))
    process = python("import matplotlib; matplotlib.use('Agg')\n" + example, tmp_path)
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert "eval_loss" in out and (tmp_path / "runs" / "mine" / "results.h5").exists()


def command(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "fedhpc", *words], capture_output=True, text=True, cwd=cwd, check=False
    )


def test_the_command_helps_with_a_line_and_an_example_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert console.main(["--help"]) == 0
    text = capsys.readouterr().out
    for name, entry in console.COMMANDS.items():
        assert f"  {name} " in text and entry.example.startswith(f"fedhpc {name}") and entry.example in text
    assert console.main([]) == 2 and capsys.readouterr().out == text
    assert console.main(["--version"]) == 0 and capsys.readouterr().out == f"{fedhpc.__version__}\n"


def test_pyproject_names_the_command() -> None:
    line = f'fedhpc = "{console.main.__module__}:{console.main.__name__}"'
    assert f"[project.scripts]\n{line}\n" in (REPOSITORY / "pyproject.toml").read_text()


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("rum", "unknown command 'rum'; did you mean 'run'? valid: run, report, "),
        ("client.lr=1", "'client.lr=1' is no command; a run is started by: fedhpc run client.lr=1"),
        ("pyproject.toml", "'pyproject.toml' is no command; a run is started by: fedhpc run pyproject.toml"),
    ],
)
def test_an_unknown_command_is_one_line(
    word: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(REPOSITORY)
    assert console.main([word]) == 2
    err = capsys.readouterr().err
    assert err.startswith("fedhpc: error: command line: ") and said in err and err.count("\n") == 1


def test_commands_are_the_modules_of_python_m(small: tuple[dict[str, Any], fedhpc.Run], tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(small[0]))
    done = command("run", "mine.yaml", cwd=REPOSITORY)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and "mine.yaml: there is no such" in done.stderr
    done = command("run", str(tmp_path / "mine.yaml"), "--where", cwd=REPOSITORY)
    assert (done.returncode, done.stdout) == (0, f"{small[1].path}\n")
    done = command("report", str(small[1].path), "--out", str(tmp_path / "report"), cwd=REPOSITORY)
    assert done.returncode == 0 and (tmp_path / "report" / "report.md").exists()
    for word in ("report", "sweep", "bench", "run"):
        done = command(word, "--help", cwd=REPOSITORY)
        assert done.returncode == 0 and done.stdout.startswith(f"usage: fedhpc {word} "), done


@pytest.mark.parametrize("words", [("config",), ("config", "run"), ("watch", "RUN"), ("report", "RUN")])
def test_output_that_nobody_reads_is_no_error(words: tuple[str, ...], small: tuple[Any, fedhpc.Run]) -> None:
    """As with `fedhpc config | head`, which closes the pipe: also where all would come with the last flush."""
    words = tuple(str(small[1].path) if word == "RUN" else word for word in words)
    process = subprocess.Popen(
        [sys.executable, "-m", "fedhpc", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, err) == (1 if words[0] == "report" else console.UNREAD, "")  # 1: rich's own


def test_config_prints_the_sections_that_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    from fedhpc.config.__main__ import main

    assert main(["checkpoint", "run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == ["run:", "checkpoint:"]
    assert main(["servr"]) == 2
    assert "no section 'servr'; did you mean 'server'? valid: run, model" in capsys.readouterr().err


def test_help_and_config_import_no_torch(tmp_path: Path) -> None:
    program = """
        from fedhpc.console import main
        main(["--help"])
        assert not {"torch", "numpy", "pydantic"} & set(sys.modules)
        try:
            main(["config"])
        except SystemExit as ended:
            assert not ended.code
        assert not {"torch", "transformers", "h5py"} & set(sys.modules)
    """
    process = python(program, tmp_path)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, "")
    assert "num_virtual_tokens" in out
