"""fedhpc from Python: start a run from a script or a notebook, and read what it measured as DataFrames.

    run = fedhpc.run("mine.yaml", ranks=3, overrides=["client.lr=0.02"])
    run.rounds[["round", "train_loss", "eval_loss"]]

A run has processes of its own (`python -m fedhpc.main`), so torch, its threads and its memory stay out of the caller's.
No torch is imported here.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from html import escape
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from fedhpc import config as configuration
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.ranks.launch import detect
from fedhpc.ranks.startup import DONE, REFUSED
from fedhpc.report.plots import draw_losses
from fedhpc.report.runs import LoadedRun, load_run
from fedhpc.report.text import as_number, in_order, title_of
from fedhpc.results.status import read_status

if TYPE_CHECKING:
    import pandas
    from matplotlib import pyplot
else:
    from fedhpc.lazy import lazy

    pandas = lazy("pandas", extra="pandas")
    pyplot = lazy("matplotlib.pyplot", extra="report")

#: What stands for a configuration: a YAML file, a tree like one, a resolved one; None is the embedded default.
Configuration = str | os.PathLike[str] | Mapping[str, Any] | Config | None
#: `section.key=value` as on the command line, or {section.key: value}.
Overrides = Sequence[str] | Mapping[str, Any]

_SAYS = "fedhpc: "  # how the line begins that says why a run ended


def load_config(config: Configuration = None, overrides: Overrides = ()) -> Config:
    """Resolve and check a configuration. UserError with one line that names the key.

    A mapping is a tree of sections like a YAML file. Relative paths are relative to the working directory.
    """
    if isinstance(overrides, Mapping):
        changes = [(str(key), _plain(value)) for key, value in overrides.items()]
    elif isinstance(overrides, (list, tuple)) and all(isinstance(text, str) for text in overrides):
        changes = configuration.parse_overrides(overrides, "overrides")
    else:
        raise UserError(f"overrides: a list of texts like section.key=value is needed, got {overrides!r}")
    if config is None or isinstance(config, (str, os.PathLike)):
        return configuration.load_changed(None if config is None else Path(config), changes, "overrides")
    if isinstance(config, Config):
        return configuration.changed(config, changes, "overrides")
    if not isinstance(config, Mapping):
        raise UserError(f"config: a file, a mapping of sections or a fedhpc.Config is needed, got {config!r}")
    return configuration.resolve(configuration.override(_plain(config), changes, "overrides"))


def run(config: Configuration = None, ranks: int = 1, overrides: Overrides = (), fresh: bool = False) -> Run:
    """Run `config` to its end in `ranks` processes of this machine, or resume it; the finished run.

    Progress is shown line by line. ^C, or the interrupt of a notebook, stops the run so that the same call goes on from
    its last round, and raises KeyboardInterrupt. fresh: start over where the run directory holds a run.
    UserError where configuration or data are wrong (nothing was written), RuntimeError where the run failed later or
    was preempted; both with the one line that says why.
    """
    if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 1:
        raise UserError(f"ranks: {ranks!r}: a number of 1 or more is needed")
    launch = detect(os.environ)
    if launch.launcher != "single":
        raise UserError(
            f"fedhpc.run starts ranks of its own, but {launch.launcher} has started this process: use "
            "python -m fedhpc.main under a launcher"
        )
    resolved = load_config(config, overrides)
    with tempfile.TemporaryDirectory(prefix="fedhpc-") as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(resolved.to_yaml(), encoding="utf-8")
        command = [sys.executable, "-m", "fedhpc.main", str(file), "--ranks", str(ranks)]
        child = _Child([*command, "--fresh"] if fresh else command)
        code = child.follow(_Screen().line)
    if child.interrupted:
        raise KeyboardInterrupt(_how_to_go_on(resolved.run_dir, code))
    if code == REFUSED:
        raise UserError(child.reason(code).removeprefix("error: "))
    if code != DONE:
        raise RuntimeError(child.reason(code).removeprefix("error: "))
    return open_run(resolved.run_dir)


def open_run(path: str | os.PathLike[str]) -> Run:
    """Read the run in a directory, finished or not, as far as it has come. UserError where there is none."""
    loaded = load_run(Path(path))
    return Run(replace(loaded, directory=loaded.directory.absolute()))  # also after the caller has gone elsewhere


class Run:
    """A run on disk as it was when it was opened: its tables as pandas DataFrames, its configuration, its adapter."""

    def __init__(self, loaded: LoadedRun) -> None:
        self._loaded = loaded

    @property
    def path(self) -> Path:
        """The run directory."""
        return self._loaded.directory

    @property
    def complete(self) -> bool:
        """Whether the run reached its last round and its test."""
        return bool(self._loaded.results.complete)

    @property
    def config(self) -> Config:
        """The resolved configuration of the run; running it again reproduces the run."""
        return configuration.restore(self._loaded.config, f"{self.path}: configuration")

    @property
    def adapter(self) -> Path | None:
        """The folder that peft (or transformers, after full fine-tuning) loads; None before the run is complete."""
        folder = self.path / "adapter"
        return folder if folder.is_dir() else None

    @property
    def rounds(self) -> pandas.DataFrame:
        """A row for each round: losses, clients, tokens, bytes, seconds. Row 0 is the evaluated initial state."""
        return pandas.DataFrame(self._loaded.results.rounds)

    @property
    def clients(self) -> pandas.DataFrame:
        """A row for each client sampled in each round."""
        return pandas.DataFrame(self._loaded.results.clients)

    @property
    def experts(self) -> pandas.DataFrame:
        """A row for each round, layer and expert of a mixture: which share of the tokens it was sent. Else empty."""
        return pandas.DataFrame(self._loaded.results.experts)

    @property
    def events(self) -> pandas.DataFrame:
        """What happened beside the rounds: clients rejected, the run resumed, and so on."""
        return pandas.DataFrame(self._loaded.results.events)

    @property
    def test(self) -> pandas.DataFrame:
        """A row for each metric: of the final state on the test split, and of the untouched base where measured.

        low and high are the 95 % interval of `test` over the drawing of its n items (docs/results.md).
        """
        test, base = self._loaded.metrics("test"), self._loaded.metrics("base")
        names = in_order(test, base)
        sampling = [self._loaded.sampling("test", n) for n in names]
        columns = {"test": [test.get(n) for n in names], "base": [base.get(n) for n in names]}
        columns |= {key: [one and getattr(one, key) for one in sampling] for key in ("low", "high", "n")}
        return pandas.DataFrame(columns, index=pandas.Index(names, name="metric"), dtype="float64")

    @property
    def samples(self) -> list[dict[str, Any]]:
        """Texts that the final state generated: `prompt`, `references` (a list) and `text`."""
        group = self._loaded.results.groups["samples"]
        columns = [group.get(name, ()) for name in ("prompt", "references", "text")]
        return [
            {"prompt": str(prompt), "references": json.loads(references), "text": str(text)}
            for prompt, references, text in zip(*columns, strict=True)
        ]

    def plot(self, axes: Any = None) -> Any:
        """Draw training and validation loss by round; the matplotlib axes, new ones unless some are given."""
        if axes is None:
            _, axes = pyplot.subplots(layout="constrained")
        draw_losses(axes, self._loaded)
        return axes

    def __repr__(self) -> str:
        return f"<fedhpc.Run {self.path}: {self._loaded.state}>"

    def _repr_html_(self) -> str:
        """What a notebook shows: what was run, how far it came, and the test."""
        attributes = self._loaded.results.attributes
        rows = [("state", self._loaded.state), ("directory", str(self.path))]
        rows += [(key, str(attributes[key])) for key in ("mode", "method", "model", "seed") if key in attributes]
        rows.append(("last validation loss", as_number(self._loaded.last_loss)))
        test, base = self._loaded.metrics("test"), self._loaded.metrics("base")
        for name in in_order(test):
            untouched = f" (untouched base {as_number(base[name])})" if name in base else ""
            rows.append((f"test {title_of(name)}", as_number(test[name]) + untouched))
        cells = "".join(f"<tr><th>{escape(key)}</th><td>{escape(value)}</td></tr>" for key, value in rows)
        return f"<table><caption>fedhpc run {escape(self._loaded.name)}</caption>{cells}</table>"


def _plain(tree: Any) -> Any:
    """A tree as YAML could give it: tuples become lists, paths become texts, numpy's numbers plain ones."""
    if isinstance(tree, Mapping):
        return {str(key): _plain(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain(value) for value in tree]
    if isinstance(tree, (np.generic, np.ndarray)):
        return tree.tolist()
    return os.fspath(tree) if isinstance(tree, os.PathLike) else tree


def _how_to_go_on(directory: Path, code: int) -> str:
    status = read_status(directory)
    if code == DONE:
        return f"the run is complete: fedhpc.open_run({str(directory)!r})"
    if status is None:
        return "stopped before anything was written"
    return f"stopped; {status.round} rounds are kept in {directory}, the same fedhpc.run(...) goes on from there"


class _Child:
    """A run in processes of its own, whose lines are handed on while it lasts; ^C stops it at its last round."""

    def __init__(self, command: Sequence[str]) -> None:
        self.interrupted = False
        self._command = command
        self._process: subprocess.Popen[str] | None = None
        self._messages: list[str] = []  # the lines of fedhpc itself on standard error

    def follow(self, show: Callable[[str], None]) -> int:
        """Run it, and show its lines until it ends; its exit code."""
        with self._interrupts():
            # In a session of its own: ^C on a terminal reaches it through us alone, and once.
            self._process = process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=_environment(),
                start_new_session=True,
            )
            if self.interrupted:  # by now
                process.terminate()
            assert process.stdout is not None and process.stderr is not None
            listener = threading.Thread(target=self._listen, args=(process.stderr,), daemon=True)
            listener.start()
            try:
                for line in process.stdout:
                    show(line.rstrip("\n"))
                code = process.wait()
            finally:
                if process.poll() is None:  # `show` failed, or the caller's program is being ended
                    process.terminate()
                    process.wait()
            listener.join()
        return code

    @contextlib.contextmanager
    def _interrupts(self) -> Iterator[None]:
        """In the block ^C goes to the run instead of raising KeyboardInterrupt in the middle of anything."""
        if threading.current_thread() is not threading.main_thread():  # where ^C never arrives
            yield
            return
        before = signal.signal(signal.SIGINT, self._stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before if before is not None else signal.default_int_handler)

    def _stop(self, *_: object) -> None:
        """Preempt the run; a second time kill it."""
        process = self._process
        if process is not None and process.poll() is None:
            if self.interrupted:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.terminate()
        self.interrupted = True

    def reason(self, code: int) -> str:
        """Why it ended, in one line."""
        if self._messages:
            return self._messages[-1]
        return f"the run was ended by signal {-code}" if code < 0 else f"the run ended with exit code {code}"

    def _listen(self, errors: IO[str]) -> None:
        """Hand on warnings and tracebacks; what fedhpc says becomes the text of an exception."""
        for line in errors:
            if line.startswith(_SAYS):
                self._messages.append(line.removeprefix(_SAYS).rstrip("\n"))
            else:
                print(line, end="", file=sys.stderr, flush=True)


def _environment() -> dict[str, str]:
    """The environment of the child process, in which it imports this same package, installed or not."""
    root = Path(__file__).parents[1]
    added = {} if root.name in ("site-packages", "dist-packages") else {"PYTHONPATH": str(root)}
    if added and os.environ.get("PYTHONPATH"):
        added["PYTHONPATH"] += os.pathsep + os.environ["PYTHONPATH"]
    return {**os.environ, "PYTHONIOENCODING": "utf-8", **added}


class _Screen:
    """Shows lines of progress: below the cell of a notebook in one place, elsewhere one after the other."""

    def __init__(self) -> None:
        self._display = _notebook_display()
        self._lines: list[str] = []
        self._handle: Any = None

    def line(self, text: str) -> None:
        """Show one more line; in a notebook that of a round without evaluation gives way to the next one."""
        if self._display is None:
            print(text, flush=True)
            return
        if self._lines and self._lines[-1].startswith("round ") and "eval_" not in self._lines[-1]:
            self._lines.pop()
        self._lines.append(text)
        shown = {"text/plain": "\n".join(self._lines)}
        if self._handle is None:
            self._handle = self._display(shown, raw=True, display_id=True)
        else:
            self._handle.update(shown, raw=True)


def _notebook_display() -> Callable[..., Any] | None:
    """IPython's `display` in a notebook; None in a script or on a terminal."""
    ipython = sys.modules.get("IPython")  # imported long ago by whoever runs a notebook
    shell = ipython.get_ipython() if ipython is not None else None
    if getattr(shell, "kernel", None) is None:
        return None
    from IPython.display import display

    shown: Callable[..., Any] = display
    return shown
