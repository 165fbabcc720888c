"""The shell part of the job scripts, with stand-ins for Slurm's commands."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ranks import REPOSITORY

PREEMPTED = '{"format": "fedhpc-run", "state": "preempted", "round": 3, "reason": "", "updated_utc": ""}'


def job(folder: Path, program: str, **variables: str) -> str:
    """What the stand-ins were called with, a line each, by a shell that has sourced slurm/job.sh."""
    stands_in = folder / "scontrol"
    stands_in.write_text(f'#!/bin/sh\necho "$@" >> {folder}/calls\necho n1; echo n2\n')
    stands_in.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", **variables}
    source = f"set -euo pipefail; source {REPOSITORY}/slurm/job.sh; {program}"
    subprocess.run(["bash", "-c", source], env=environment, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    return (folder / "calls").read_text()


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({}, "requeue 41"),
        # Slurm 22.05 requeues every task of an array for the bare id of the one that has the array's own.
        ({"SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "0"}, "requeue 41_0"),
        ({"SLURM_ARRAY_JOB_ID": "39", "SLURM_ARRAY_TASK_ID": "2"}, "requeue 39_2"),
    ],
)
def test_a_task_of_an_array_requeues_itself_alone(tmp_path: Path, variables: dict[str, str], named: str) -> None:
    (tmp_path / "status.json").write_text(PREEMPTED.replace(", ", ",\n "))
    interrupted = "interrupted() { sed -i 's/3/4/' status.json; return 75; }; run . interrupted"
    assert job(tmp_path, interrupted, SLURM_JOB_ID="41", **variables).splitlines() == [named]


def test_ranks_are_placed_where_tmpdir_is_not_there(tmp_path: Path) -> None:
    show = 'place_ranks; cp "$SLURM_HOSTFILE" hosts; rm "$SLURM_HOSTFILE"'
    job(tmp_path, show, SLURM_GPUS_ON_NODE="1", SLURM_JOB_NODELIST="n[1-2]", TMPDIR="/not/there")
    assert (tmp_path / "hosts").read_text().split() == ["n1", "n1", "n2"]


@pytest.mark.parametrize(("script", "variables"), [("fedhpc", {}), ("sweep", {"SLURM_ARRAY_TASK_ID": "0"})])
def test_a_job_script_in_a_path_with_spaces(tmp_path: Path, script: str, variables: dict[str, str]) -> None:
    """With arguments that Slurm writes behind the path, and a run directory that has a space too."""
    project, bin_ = tmp_path / "my project" / "fed hpc", tmp_path / "bin"
    shutil.copytree(REPOSITORY / "slurm", project / "slurm")
    bin_.mkdir()
    command = f"{project}/slurm/{script}.sbatch base.yaml run.dir=runs/my run"
    stands_in = {
        "scontrol": f"echo 'JobId=7 JobName=a job Command={command} WorkDir={tmp_path} StdErr=/dev/null'",
        "python": f'[ "${{@: -1}}" != --where ] || echo "runs/my run"; printf "%s|" "$@" >> {tmp_path}/calls',
        "srun": 'shift; exec "$@"',
    }
    for name, text in stands_in.items():
        (bin_ / name).write_text(f"#!/bin/bash\n{text}\n")
        (bin_ / name).chmod(0o755)
    subprocess.run(
        ["bash", str(project / "slurm" / f"{script}.sbatch"), "base.yaml", "run.dir=runs/my run"],
        env={"PATH": f"{bin_}:{os.environ['PATH']}", "SLURM_JOB_ID": "7", **variables},
        cwd=tmp_path,
        check=True,
    )
    assert (tmp_path / "calls").read_text().count("|base.yaml|run.dir=runs/my run|") == 2
