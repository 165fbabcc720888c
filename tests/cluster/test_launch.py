"""The launch scripts, each with the same arguments and the same bits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.cluster.conftest import LIMIT_S
from tests.ranks import BIN, REPOSITORY, _clean_environ, free_port
from tests.test_kill import same_as, write


def launched(script: str, path: Path, environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`script` of launch/ run to its end on the configuration `path`."""
    common = {**_clean_environ(), "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "RANKS": "2"}
    common["PATH"] = os.pathsep.join([str(BIN), common["PATH"]])
    return subprocess.run(
        ["bash", str(REPOSITORY / "launch" / script), path.name, *arguments], cwd=path.parent,
        env={**common, "PORT": str(free_port()), **environ}, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "environ", "transport"),
    [
        ("torchrun.sh", {}, "gloo"),
        ("torchrun_nodes.sh", {"NODES": "1", "HEAD": "127.0.0.1"}, "gloo"),
        ("mpirun.sh", {}, "mpi"),
    ],
)
def test_script(whole: Path, tmp_path: Path, script: str, environ: dict[str, str], transport: str) -> None:
    path = write(tmp_path, tmp_path / "run")
    done = launched(script, path, environ, "--fresh")
    assert done.returncode == 0, done.stderr
    assert f"2 ranks over {transport}" in done.stdout
    same_as(whole, tmp_path / "run")


def test_open_mpi(whole: Path, tmp_path: Path, open_mpi: dict[str, str]) -> None:
    """Its ranks are not MPICH's: the world has two, and the bits are the same. Then with torch's transport in it."""
    path = write(tmp_path, tmp_path / "run")
    done = launched("mpirun.sh", path, {**open_mpi, "RANKS": "3"})
    assert done.returncode == 0, done.stderr
    assert "3 ranks over mpi" in done.stdout
    same_as(whole, tmp_path / "run")
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    done = launched("mpirun.sh", path, {**open_mpi, **master}, "--fresh", "runtime.transport=torch")
    assert done.returncode == 0, done.stderr
    assert "2 ranks over gloo" in done.stdout
    same_as(whole, tmp_path / "run")


def test_a_mistake_under_open_mpi(tmp_path: Path, open_mpi: dict[str, str]) -> None:
    """Exit code 2 and one line, as everywhere."""
    path = write(tmp_path, tmp_path / "run")
    done = launched("mpirun.sh", path, open_mpi, "federation.cohort_size=1000")
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("fedhpc: ") == 1 and "federation.cohort_size is 1000" in done.stderr
    assert not (tmp_path / "run").exists()


def test_the_mpiexec_of_another_mpi(tmp_path: Path, open_mpi: dict[str, str]) -> None:
    """Every rank would be a world of its own."""
    path = write(tmp_path, tmp_path / "run")
    done = launched("mpirun.sh", path, {**open_mpi, "MPIEXEC": str(BIN / "mpiexec")})
    assert done.returncode == 2, done.stderr
    assert "start with the mpiexec" in done.stderr
    assert not (tmp_path / "run").exists()
