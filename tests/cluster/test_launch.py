"""The launch scripts, each with the same arguments and the same bits."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.conftest import LIMIT_S
from tests.ranks import BIN, REPOSITORY, _clean_environ, free_port
from tests.test_kill import same_as, write
from tests.test_transport import IN_PIECES


def launched(script: str, path: Path, environ: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """`script` of launch/ run to its end on the configuration `path`."""
    common = {**_clean_environ(), "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "RANKS": "2"}
    common["PATH"] = os.pathsep.join([str(BIN), common["PATH"]])
    return subprocess.run(
        ["bash", str(REPOSITORY / "launch" / script), path.name, *arguments], cwd=path.parent,
        env={**common, "PORT": str(free_port()), **environ}, capture_output=True, text=True, timeout=LIMIT_S,
    )  # fmt: skip


def completes(whole: Path, tmp_path: Path, script: str, environ: dict[str, str], world: str, *arguments: str) -> None:
    """A run by `script` ends well, says what its ranks are, such as "2 ranks over mpi", and has the bits of `whole`."""
    done = launched(script, write(tmp_path, tmp_path / "run"), environ, *arguments)
    assert done.returncode == 0, done.stderr
    assert world in done.stdout
    same_as(whole, tmp_path / "run")


@pytest.mark.parametrize(
    ("script", "environ", "transport"),
    [
        ("torchrun.sh", {}, "gloo"),
        ("torchrun_nodes.sh", {"NODES": "1", "HEAD": "127.0.0.1"}, "gloo"),
        ("mpirun.sh", {}, "mpi"),
    ],
)
def test_script(whole: Path, tmp_path: Path, script: str, environ: dict[str, str], transport: str) -> None:
    completes(whole, tmp_path, script, environ, f"2 ranks over {transport}", "--fresh")


def test_open_mpi(whole: Path, tmp_path: Path, open_mpi: dict[str, str]) -> None:
    """Its ranks are not MPICH's: the world has two, and the bits are the same. Then with torch's transport in it."""
    completes(whole, tmp_path, "mpirun.sh", {**open_mpi, "RANKS": "3"}, "3 ranks over mpi")
    master = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    torch_in_it = ("--fresh", "runtime.transport=torch")
    completes(whole, tmp_path, "mpirun.sh", {**open_mpi, **master}, "2 ranks over gloo", *torch_in_it)


# What other launchers set, in place of MPICH's own pair.
PALS = "PMI_LOCAL_RANK=$MPI_LOCALRANKID PMI_LOCAL_SIZE=$MPI_LOCALNRANKS PALS_RANKID=$PMI_RANK PALS_LOCAL_RANKID=0"
FLUX = "FLUX_TASK_RANK=$PMI_RANK FLUX_JOB_SIZE=$PMI_SIZE FLUX_TASK_LOCAL_ID=$MPI_LOCALRANKID FLUX_JOB_NNODES=2"


@pytest.mark.parametrize("variables", [PALS, FLUX], ids=["pals", "flux"])
def test_another_launcher(whole: Path, tmp_path: Path, variables: str) -> None:
    """MPICH in the clothes of another: one run of two ranks."""
    dressed = tmp_path / "mpiexec"
    dress = f"exec env -u MPI_LOCALRANKID -u MPI_LOCALNRANKS {variables} "
    dressed.write_text(f'#!/bin/bash\nexec {BIN}/mpiexec $1 $2 bash -c \'{dress}"$0" "$@"\' "${{@:3}}"\n')
    dressed.chmod(0o755)
    completes(whole, tmp_path, "mpirun.sh", {"MPIEXEC": str(dressed)}, "2 ranks over mpi")


def test_a_launcher_whose_ranks_are_no_world_of_mpi(tmp_path: Path) -> None:
    """MVAPICH2's variables around another MPI: no rank begins a run of its own."""
    path = write(tmp_path, tmp_path / "run")
    lonely = tmp_path / "mpiexec"
    variables = "MV2_COMM_WORLD_RANK=$r MV2_COMM_WORLD_SIZE=2 MV2_COMM_WORLD_LOCAL_RANK=$r MV2_COMM_WORLD_LOCAL_SIZE=2"
    ranks = f'for r in 0 1; do env {variables} "${{@:3}}" & done'
    lonely.write_text(f"#!/bin/bash\n{ranks}\nwait -n; code=$?; wait; exit $code\n")
    lonely.chmod(0o755)
    done = launched("mpirun.sh", path, {"MPIEXEC": str(lonely)})
    assert done.returncode == 2, done.stderr
    assert "the launcher says rank 0 of 2, MPI says rank 0 of 1" in done.stderr
    assert not (tmp_path / "run").exists()


def test_check(tmp_path: Path, open_mpi: dict[str, str]) -> None:
    """The plan, and nothing is written."""
    path = write(tmp_path, tmp_path / "run")
    done = launched("mpirun.sh", path, open_mpi, "--check")
    assert done.returncode == 0, done.stderr
    assert "2 ranks over mpi" in done.stdout and "rounds: 12; round 1: 6 clients" in done.stdout
    assert not (tmp_path / "run").exists()


def in_open_mpi(tmp_path: Path, open_mpi: dict[str, str], program: str) -> subprocess.CompletedProcess[str]:
    """`program`, two ranks of it."""
    script = tmp_path / "program.py"
    script.write_text(program)
    environ = {**_clean_environ(), **open_mpi, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [open_mpi["MPIEXEC"], "-n", "2", sys.executable, str(script)]
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=LIMIT_S)


BROADCAST = """
import os, torch
from fedhpc.ranks.launch import detect
from fedhpc.ranks.transport import open_transport
with open_transport(detect(os.environ), "auto", 60) as transport:
    tensor = torch.zeros(2**31 + 8, dtype=torch.uint8)
    if transport.rank == 0:
        tensor[[0, 2**30, 2**31, -1]] = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    transport.broadcast(tensor)
    assert tensor[[0, 1, 2**30, 2**31, -1]].tolist() == [1, 0, 2, 3, 4]
    os.write(1, b"broadcast is right\\n")
"""


def test_more_than_two_gigabytes_in_open_mpi(tmp_path: Path, open_mpi: dict[str, str]) -> None:
    """One call of it takes 2^31 - 1 bytes: here is a broadcast of more, then the whole contract in small pieces."""
    done = in_open_mpi(tmp_path, open_mpi, BROADCAST)
    assert (done.returncode, done.stdout.count("broadcast is right")) == (0, 2), done.stderr
    done = in_open_mpi(tmp_path, open_mpi, IN_PIECES)
    assert (done.returncode, done.stdout.count("contract kept")) == (0, 2), done.stderr


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
