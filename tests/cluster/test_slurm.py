"""The job scripts on a real Slurm of two nodes: the same bits as in one process, whatever happens to the job."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path

import pytest
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
    job = slurm.submit(JOB, str(path), "--fresh", "--ranks-per-node", "2")
    assert slurm.ended(job) == "COMPLETED", slurm.log()
    assert "4 ranks over gloo" in slurm.log()
    same_as(whole, slurm.folder / "run")


def test_a_rank_per_gpu_and_the_server_beside_them(slurm: Slurm, whole: Path) -> None:
    """Slurm's word on the GPUs, without any: 2 nodes of 1 make 3 ranks, two of them on the first node. In a path with a
    space, where TMPDIR is not there and files are the owner's alone."""
    path = write(slurm.folder, slurm.folder / "run")
    site = slurm.folder / "my site" / "slurm"  # a copy, with the variable that Slurm sets where there are GPUs
    shutil.copytree(REPOSITORY / "slurm", site)
    with (site / "env.sh").open("a") as file:
        file.write("export SLURM_GPUS_ON_NODE=1 TMPDIR=/not/there\numask 077\n")
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


def test_nodes_whose_names_are_no_hosts(renamed: None, slurm: Slurm, whole: Path) -> None:
    """Slurm knows n1 and n2, and no host does: the job finds rank 0, is requeued, and ends with the same bits."""
    path = write(slurm.folder, slurm.folder / "run")
    script = slurm.folder / "look_up.sh"
    script.write_text(
        "#!/bin/bash\nhostname\nsrun sh -c 'getent hosts n1 n2 other$((2 - SLURM_NODEID)) || echo unknown'\n"
    )
    assert slurm.ended(slurm.submit(script)) == "COMPLETED", slurm.log()
    assert slurm.log().split() == ["other1", "unknown", "unknown"]
    job = slurm.submit(JOB, str(path))
    slurm.until(lambda: printed(slurm.log()) >= 2)
    slurm("scontrol", "requeue", job)
    slurm.until(lambda: "resuming after round" in slurm.log())
    assert slurm.ended(job) == "COMPLETED", slurm.log()
    assert slurm.shown(job)["Restarts"] == "1"
    assert slurm.log().count("2 ranks over gloo") == 2
    same_as(whole, slurm.folder / "run")


def test_a_name_that_no_host_has(slurm: Slurm) -> None:
    """One line on each host, at once, instead of all the time that ranks may take to find each other."""
    path = write(slurm.folder, slurm.folder / "run")
    script = slurm.folder / "step.sh"
    step = f"srun --kill-on-bad-exit=1 python -m fedhpc.main {path}"
    script.write_text(f"#!/bin/bash\nexport MASTER_ADDR=no-such-host.invalid\ndate +%s\n{step}\ndate +%s\n")
    job = slurm.submit(script)
    slurm.ended(job)
    lines = slurm.log().splitlines()
    begin, end = (int(line) for line in lines if line.isdigit())
    assert end - begin < 5 + 5 + 10, slurm.log()  # rank 1 lets rank 0 speak; Python starts beside other tests
    about = sorted(line for line in lines if "fedhpc: " in line)
    whose = "MASTER_ADDR: rank 0's host is 'no-such-host.invalid', and no address is known for that name"
    said = [line.partition(" on n")[0] for line in about]
    # Slurm may end rank 1 before it speaks.
    assert said in ([f"fedhpc: error: {whose}"], [f"fedhpc: error: {whose}", f"fedhpc: rank 1: {whose}"])
    assert not (slurm.folder / "run").exists() and "Traceback" not in slurm.log() and "c10d" not in slurm.log()


def test_two_steps_of_one_job_at_once(slurm: Slurm, whole: Path) -> None:
    """On the same two nodes, and in a path with a space; each gives what it gives alone."""
    folder = slurm.folder / "my project"
    folder.mkdir()
    write(folder, folder / "run")
    script = folder / "steps.sh"
    step = 'srun --overlap --kill-on-bad-exit=1 python -m fedhpc.main "$1" run.dir="$PWD/my project/run'
    script.write_text(f'#!/bin/bash\n{step} 1" & one=$!\n{step} 2" || exit\nwait $one\n')
    assert slurm.ended(slurm.submit(script, str(folder / "run.yaml"))) == "COMPLETED", slurm.log()
    for run in ("run 1", "run 2"):
        same_as(whole, folder / run)


def test_a_task_of_an_array_leaves_the_others_alone(slurm: Slurm) -> None:
    """Of three that run, the one whose id is that of the array is put back into the queue: the others run on."""
    task = slurm.folder / "task.sh"
    work = """
        trap 'echo "task $SLURM_ARRAY_TASK_ID interrupted"; sed -i s/3/4/ $1/status.json; exit 75' USR2
        echo "task $SLURM_ARRAY_TASK_ID begins, id $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0}"
        until [ -e go ]; do sleep 0.1; done
        echo "task $SLURM_ARRAY_TASK_ID is done"
    """
    (slurm.folder / "work.sh").write_text(f"#!/bin/bash\n{work}")
    directory = f"{slurm.folder}/$SLURM_ARRAY_TASK_ID"
    task.write_text(f"#!/bin/bash\nsource {REPOSITORY}/slurm/job.sh\nrun {directory} srun bash work.sh {directory}\n")
    for i in range(3):
        (slurm.folder / str(i)).mkdir()
        status = json.dumps({"state": "preempted", "round": 3}, indent=1)
        (slurm.folder / str(i) / "status.json").write_text(status)
    array = slurm.submit(task, options=("--nodes=1", "--array=0-2", "--open-mode=append", "--requeue"))
    slurm.until(lambda: slurm.log().count("begins") == 3)
    (first,) = [i for i in range(3) if f"task {i} begins, id {array}, " in slurm.log()]
    slurm("scancel", "--signal=USR2", f"{array}_{first}")
    slurm.until(lambda: f"task {first} begins, id {array}, restart 1" in slurm.log())
    assert all(slurm.shown(f"{array}_{i}")["JobState"] == "RUNNING" for i in range(3)), slurm.log()
    (slurm.folder / "go").touch()
    for i in range(3):
        assert slurm.ended(f"{array}_{i}") == "COMPLETED", slurm.log()
        assert slurm.shown(f"{array}_{i}")["Restarts"] == str(int(i == first)), slurm.log()
    assert slurm.log().count("begins") == 4 and slurm.log().count("is done") == 3


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


def test_check_and_an_interrupt_under_srun(slurm: Slurm) -> None:
    """The plan, and nothing written; then ^C, which says what is kept."""
    path = write(slurm.folder, slurm.folder / "run", federation={"rounds": 1000})
    script = slurm.folder / "steps.sh"
    steps = f'for i in --check ""; do bash {REPOSITORY}/launch/srun.sh "$@" $i; echo "exit $?"; done'
    script.write_text(f"#!/bin/bash\n{steps}\n")
    job = slurm.submit(script, str(path))
    slurm.until(lambda: "exit" in slurm.log())
    assert "2 ranks over gloo" in slurm.log() and "rounds: 1000; round 1: 6 clients" in slurm.log()
    assert "exit 0" in slurm.log() and not (slurm.folder / "run").exists()
    slurm.until(lambda: printed(slurm.log()) >= 2)
    slurm("scancel", "--signal=INT", f"{job}.1")
    slurm.ended(job)
    (line,) = [line for line in slurm.log().splitlines() if line.startswith("fedhpc: ")]
    kept = recorded(slurm.folder / "run")
    where = slurm.folder / "run"
    assert line == f"fedhpc: interrupted; {kept} rounds are kept in {where}, the same command goes on from there"
    assert state(slurm.folder / "run") == "preempted"


@pytest.mark.usefixtures("renamed")
def test_open_mpi_in_an_allocation(slurm: Slurm, whole: Path, open_mpi: dict[str, str]) -> None:
    """mpirun starts its daemons through srun, and the ranks on both nodes, whose names are no hosts."""
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
    assert {"other1", "other2"} <= set(slurm.log().splitlines()), slurm.log()
    same_as(whole, slurm.folder / "run")
