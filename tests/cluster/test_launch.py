"""The launch scripts, each with the same arguments and the same bits."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.ranks import BIN, REPOSITORY, _clean_environ, free_port
from tests.test_kill import same_as, write


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
    common = {**_clean_environ(), "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "RANKS": "2"}
    common["PATH"] = os.pathsep.join([str(BIN), common["PATH"]])
    done = subprocess.run(
        ["bash", str(REPOSITORY / "launch" / script), path.name, "--fresh"],
        cwd=tmp_path, env={**common, "PORT": str(free_port()), **environ}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert f"2 ranks over {transport}" in done.stdout
    same_as(whole, tmp_path / "run")
