"""The job scripts on a real Slurm of two nodes: the same bits as in one process, whatever happens to the job."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import yaml

from tests.cluster.conftest import Slurm
from tests.ranks import REPOSITORY
from tests.test_kill import printed, recorded, resumes, same_as, write

JOB, SWEEP = REPOSITORY / "slurm" / "fedhpc.sbatch", REPOSITORY / "slurm" / "sweep.sbatch"


def state(run_dir: Path) -> str:
    return str(json.loads((run_dir / "status.json").read_text())["state"])


def test_a_job_over_two_nodes(slurm: Slurm, whole: Path) -> None:
    path = write(slurm.folder, slurm.folder / "run")
    job = slurm.submit(JOB, str(path), "--fresh")
    assert slurm.ended(job) == "COMPLETED", slurm.log()
    assert "2 ranks over gloo" in slurm.log()
    same_as(whole, slurm.folder / "run")


def test_a_rank_per_gpu_and_the_server_beside_them(slurm: Slurm, whole: Path) -> None:
    """Slurm's word on the GPUs, without any: 2 nodes of 1 make 3 ranks, two of them on the first node."""
    path = write(slurm.folder, slurm.folder / "run")
    site = slurm.folder / "slurm"  # a copy, with the variable that Slurm sets where there are GPUs
    shutil.copytree(REPOSITORY / "slurm", site)
    with (site / "env.sh").open("a") as file:
        file.write("export SLURM_GPUS_ON_NODE=1\n")
    script = str(site / JOB.name)
    job = slurm("sbatch", "--parsable", "--time=10", "--nodes=2", "--output=job-%j.log", script, str(path))
    assert slurm.ended(job) == "COMPLETED", slurm.log()
    assert "3 ranks over gloo" in slurm.log()
    same_as(whole, slurm.folder / "run")


def test_preempted_and_requeued_twice(slurm: Slurm, whole: Path) -> None:
    """First by Slurm, then as at the end of the time limit; it goes on by itself, at last on one node."""
    path = write(slurm.folder, slurm.folder / "run")
    job = slurm.submit(JOB, str(path), "--fresh")
    slurm.until(lambda: printed(slurm.log()) >= 2)
    slurm("scontrol", "requeue", job)
    slurm.until(lambda: "resuming after round" in slurm.log())
    first = printed(slurm.log())
    slurm.until(lambda: printed(slurm.log()) > first)
    slurm("scancel", "--signal=USR2", job)  # to the ranks alone, as --signal=USR2@120 does it
    slurm.until(lambda: "fedhpc: requeued" in slurm.log() and slurm.shown(job)["JobState"] == "PENDING")
    slurm("scontrol", "update", f"JobId={job}", "NumNodes=1", "NumTasks=1")
    assert slurm.ended(job) == "COMPLETED", slurm.log()
    shown = slurm.shown(job)
    assert (shown["Restarts"], shown["NumNodes"]) == ("2", "1"), shown
    assert slurm.log().count("2 ranks over gloo") == 3
    same_as(whole, slurm.folder / "run")


def test_a_job_without_progress_is_not_requeued(slurm: Slurm) -> None:
    """What both job scripts do after an attempt that left status.json as it was."""
    (slurm.folder / "status.json").write_text(json.dumps({"state": "preempted", "round": 3}, indent=1))
    stuck = slurm.folder / "stuck.sh"
    stuck.write_text(f"#!/bin/bash\nsource {REPOSITORY}/slurm/job.sh\nrun {slurm.folder} sh -c 'exit 75'\n")
    job = slurm.submit(stuck)
    assert slurm.ended(job) == "FAILED", slurm.log()
    assert "no round was finished" in slurm.log()
    assert slurm.shown(job)["Restarts"] == "0"


def test_scancel_leaves_a_run_that_goes_on(slurm: Slurm, whole: Path) -> None:
    path = write(slurm.folder, slurm.folder / "run")
    job = slurm.submit(JOB, str(path))
    slurm.until(lambda: printed(slurm.log()) >= 2)
    slurm("scancel", job)
    assert slurm.ended(job) == "CANCELLED"
    assert state(slurm.folder / "run") == "preempted"
    assert recorded(slurm.folder / "run") >= printed(slurm.log())
    resumes(whole, path)


def test_a_dead_node(slurm: Slurm, whole: Path) -> None:
    """Slurm requeues the job, and it goes on where it was."""
    path = write(slurm.folder, slurm.folder / "run")
    job = slurm.submit(JOB, str(path))
    slurm.until(lambda: printed(slurm.log()) >= 2)
    slurm("scontrol", "update", "NodeName=n2", "State=DOWN", "Reason=test")  # it reports back by itself
    slurm.until(lambda: "resuming after round" in slurm.log())
    assert slurm.ended(job) == "COMPLETED", slurm.log()
    same_as(whole, slurm.folder / "run")


def test_an_array_of_runs(slurm: Slurm) -> None:
    base = write(slurm.folder, slurm.folder / "run", federation={"rounds": 2})
    raw = yaml.safe_load(base.read_text())
    del raw["run"]
    base.write_text(yaml.safe_dump(raw))
    sweep = slurm.folder / "sweep.yaml"
    grid = [{"run.seed": [0, 1]}]
    sweep.write_text(
        yaml.safe_dump({"name": "two", "dir": str(slurm.folder / "runs"), "base": str(base), "grid": grid})
    )
    job = slurm.submit(SWEEP, str(sweep), options=("--nodes=1", "--ntasks-per-node=2", "--array=0-1%1"))
    for seed in (0, 1):
        assert slurm.ended(f"{job}_{seed}") == "COMPLETED", slurm.log()
        assert state(slurm.folder / "runs" / f"two-s{seed}") == "complete", slurm.log()
    assert slurm.log().count("2 ranks over gloo") == 2


def test_srun_and_mpi(slurm: Slurm, whole: Path) -> None:
    """In an allocation, with Slurm's own PMI-2 for MPICH."""
    path = write(slurm.folder, slurm.folder / "run")
    script = slurm.folder / "allocation.sh"
    script.write_text(f'#!/bin/bash\nexport SLURM_MPI_TYPE=pmi2\nexec bash {REPOSITORY}/launch/srun.sh "$@"\n')
    job = slurm.submit(script, str(path), "runtime.transport=mpi")
    assert slurm.ended(job) == "COMPLETED", slurm.log()
    assert "2 ranks over mpi" in slurm.log()
    same_as(whole, slurm.folder / "run")


def test_open_mpi_in_an_allocation(slurm: Slurm, whole: Path, open_mpi: dict[str, str]) -> None:
    """mpirun starts its daemons through srun, and the ranks on both nodes."""
    path = write(slurm.folder, slurm.folder / "run")
    script = slurm.folder / "allocation.sh"
    exports = "\n".join(
        f"export {name}={shlex.quote(value)}" for name, value in open_mpi.items() if "rmaps" not in name
    )
    launch = f'$MPIEXEC -n 2 hostname\nexec bash {REPOSITORY}/launch/mpirun.sh "$@"'
    script.write_text(f"#!/bin/bash\n{exports}\nexport RANKS=2\n{launch}\n")
    job = slurm.submit(script, str(path))
    assert slurm.ended(job) == "COMPLETED", slurm.log()
    assert "2 ranks over mpi" in slurm.log()
    assert {"n1", "n2"} <= set(slurm.log().splitlines()), slurm.log()
    same_as(whole, slurm.folder / "run")
