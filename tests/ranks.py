"""Start ranks for tests: plain processes with torchrun's variables, the same forked from one that has imported the
libraries, torchrun, or mpiexec. All are ended."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Literal

import psutil

REPOSITORY = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LIMIT_S = 600.0  # that anything may take on a busy machine: a limit, not a pause
Launcher = Literal["env", "forked", "torchrun", "mpiexec"]


@dataclass(frozen=True)
class Result:
    """How one process ended: a rank under "env" and "forked", the launcher itself under torchrun and mpiexec."""

    code: int
    out: str
    err: str


@cache
def forks() -> ForkServerContext:
    """Where processes are forked from; that one has imported the libraries, once for all tests of this process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.failing_rank"])
    check = context.Process(target=_check_imported)
    # The server imports from the folder where it is started, and a test may have left ours; it ignores what it misses.
    with _in_folder(REPOSITORY):
        check.start()
    check.join()
    assert check.exitcode == 0, "ranks would be forked from a process that has not imported the libraries"
    return context


@contextlib.contextmanager
def _in_folder(folder: Path) -> Iterator[None]:
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _check_imported() -> None:
    """Leave with 1 where this process was forked from one without the libraries."""
    sys.exit("tests.failing_rank" not in sys.modules)


class Forked:
    """A forked process, with what the tests use of subprocess.Popen."""

    def __init__(self, environ: Mapping[str, str], program: Sequence[str], out: Path, err: Path, cwd: str) -> None:
        self._process: ForkServerProcess = forks().Process(
            target=_become, args=(dict(environ), list(program), str(out), str(err), cwd)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a forked process", timeout or 0.0)
        return self.returncode

    def send_signal(self, number: signal.Signals) -> None:
        if self.returncode is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _become(environ: dict[str, str], program: list[str], out: str, err: str, cwd: str) -> None:
    """This forked process as `python *program`."""
    from fedhpc.main import main
    from fedhpc.ranks.process import leave

    os.setsid()
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w", buffering=1)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environ)
    if program[:2] == ["-m", "fedhpc.main"]:
        leave(main(program[2:]))
    sys.argv = program
    runpy.run_path(program[0], run_name="__main__")


class Ranks:
    """`n` running ranks of one program; a context manager that leaves nothing behind.

    program: Python source, or the arguments after `python` (["-m", "fedhpc.main", ...], [script, ...]).
    launcher "env" starts plain processes (no torchrun, 3 s), and "forked" the same without their imports; torchrun and
    mpiexec are the real ones.
    """

    def __init__(
        self,
        n: int,
        program: str | Sequence[str],
        launcher: Launcher = "env",
        env: Mapping[str, str] | None = None,
        launcher_args: Sequence[str] = (),
        cwd: Path | str | None = None,
    ) -> None:
        self.n = n
        self.launcher = launcher
        self._files = tempfile.TemporaryDirectory(prefix="ranks-")
        folder = Path(self._files.name)
        if isinstance(program, str):
            script = folder / "program.py"
            script.write_text(program)
            program = [str(script)]
        common = {
            **_clean_environ(),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(REPOSITORY),
            "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", "")]),
            **(env or {}),
        }
        if launcher in ("env", "forked"):
            port = str(free_port())
            places = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n)}
            master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            commands = [
                (
                    [sys.executable, *program],
                    {**common, **places, **master, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                )
                for rank in range(n)
            ]
        elif launcher == "torchrun":
            torchrun = [str(BIN / "torchrun"), "--standalone", f"--nproc_per_node={n}"]
            commands = [([*torchrun, *launcher_args, *program], common)]
        else:
            mpiexec = [str(BIN / "mpiexec"), "-n", str(n), *launcher_args]
            commands = [([*mpiexec, sys.executable, *program], common)]
        self.processes: list[subprocess.Popen[bytes] | Forked] = []
        self._outputs = []
        for index, (command, environ) in enumerate(commands):
            out, err = folder / f"{index}.out", folder / f"{index}.err"
            self._outputs.append((out, err))
            if launcher == "forked":
                out.touch()
                err.touch()
                self.processes.append(Forked(environ, command[1:], out, err, str(cwd or REPOSITORY)))
                continue
            with out.open("wb") as out_file, err.open("wb") as err_file:
                self.processes.append(
                    subprocess.Popen(
                        command,
                        stdin=subprocess.DEVNULL,
                        stdout=out_file,
                        stderr=err_file,
                        env=environ,
                        cwd=cwd or REPOSITORY,
                        start_new_session=True,
                    )
                )
        self._seen: dict[int, psutil.Process] = {}

    def rank_processes(self) -> dict[int, psutil.Process]:
        """The ranks' own processes that live now, by rank."""
        if self.launcher == "forked":
            return {
                rank: psutil.Process(process.pid)
                for rank, process in enumerate(self.processes)
                if process.poll() is None
            }
        variable = "PMI_RANK" if self.launcher == "mpiexec" else "RANK"
        found = {}
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                environ = process.environ()
                if variable in environ and process.status() != psutil.STATUS_ZOMBIE:
                    found[int(environ[variable])] = process
        return found

    def output(self) -> str:
        """What all processes have written so far, stdout and stderr."""
        return "".join(path.read_text() for pair in self._outputs for path in pair)

    def wait_for(self, text: str, count: int = 1, timeout: float = LIMIT_S) -> None:
        """Wait until `text` was written `count` times."""
        deadline = time.monotonic() + timeout
        while self.output().count(text) < count:
            ended = all(process.poll() is not None for process in self.processes)
            if ended or time.monotonic() > deadline:
                raise AssertionError(f"{text!r} not seen {count} times in:\n{self.output()}")
            time.sleep(0.02)
        self._family()

    def wait(self, timeout: float = LIMIT_S) -> list[Result]:
        """Wait for the end of all processes, ranks included, and return how they ended."""
        deadline = time.monotonic() + timeout
        self._family()
        for process in self.processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"still running after {timeout} s:\n{self.output()}") from None
        left = self.survivors(max(0.0, deadline - time.monotonic()))
        if left:
            raise AssertionError(f"ranks {left} outlived their launcher by {timeout} s:\n{self.output()}")
        return [
            Result(process.returncode, out.read_text(), err.read_text())
            for process, (out, err) in zip(self.processes, self._outputs, strict=True)
        ]

    def survivors(self, timeout: float) -> list[psutil.Process]:
        """The processes ever seen of this launch that still live after `timeout` seconds."""
        self._family()
        gone_or_not = psutil.wait_procs(list(self._seen.values()), timeout=timeout)[1]
        return [p for p in gone_or_not if p.is_running() and _status(p) != psutil.STATUS_ZOMBIE]

    def close(self) -> None:
        """End whatever still runs, stopped processes included."""
        for process in self._family():
            with contextlib.suppress(psutil.Error):
                process.kill()
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._files.cleanup()

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _family(self) -> list[psutil.Process]:
        """All processes of this launch seen so far, launchers included; orphans stay in the list."""
        for process in self.processes:
            with contextlib.suppress(psutil.Error):
                top = psutil.Process(process.pid)
                for member in (top, *top.children(recursive=True)):
                    self._seen[member.pid] = member
        return [process for process in self._seen.values() if process.is_running()]


def run_ranks(
    n: int,
    program: str | Sequence[str],
    launcher: Launcher = "env",
    env: Mapping[str, str] | None = None,
    timeout: float = LIMIT_S,
    launcher_args: Sequence[str] = (),
    cwd: Path | str | None = None,
) -> list[Result]:
    """Run `program` on `n` ranks to its end (see Ranks)."""
    with Ranks(n, program, launcher, env, launcher_args, cwd) as ranks:
        return ranks.wait(timeout)


def free_port() -> int:
    """A TCP port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _clean_environ() -> dict[str, str]:
    """This environment without what a launcher around pytest may have left in it."""
    prefixes = ("SLURM_", "OMPI_", "PMI", "MPI_", "TORCHELASTIC_", "MASTER_", "LOCAL_", "GROUP_", "ROLE_")
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(prefixes) and name not in ("RANK", "WORLD_SIZE")
    }


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return psutil.STATUS_ZOMBIE
