"""Launcher detection, from environments recorded under torchrun 2.13, MPICH 5.0, Open MPI 5.0 and Slurm 22.05.

Rank numbers and counts are edited where two nodes or a restart are meant.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedhpc.errors import UserError
from fedhpc.ranks.launch import Launch, detect, first_host

TORCHRUN = {
    "GROUP_WORLD_SIZE": "1",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "localhost",
    "MASTER_PORT": "43921",
    "RANK": "1",
    "ROLE_RANK": "1",
    "TORCHELASTIC_MAX_RESTARTS": "3",
    "TORCHELASTIC_RESTART_COUNT": "2",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
    "WORLD_SIZE": "2",
}
MPICH = {
    "HYDI_CONTROL_FD": "7",
    "MPI_LOCALNRANKS": "2",
    "MPI_LOCALRANKID": "1",
    "PMI_FD": "11",
    "PMI_HOSTNAME": "vm",
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
}
# The third of four ranks on two hosts. PMIX_* are also there under `srun --mpi=pmix`, which is a Slurm step.
OPEN_MPI = {
    "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_NODE_RANK": "0",
    "OMPI_COMM_WORLD_RANK": "2",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_NUM_APP_CTX": "1",
    "OMPI_UNIVERSE_SIZE": "6",
    "OMPI_WORLD_LOCAL_SIZE": "2",
    "OMPI_WORLD_SIZE": "4",
    "PMIX_HOSTNAME": "fh2",
    "PMIX_NAMESPACE": "prterun-vm-21925@1",
    "PMIX_RANK": "2",
}
SLURM_BATCH = {
    "SLURM_JOB_ID": "100001",
    "SLURM_JOB_NODELIST": "n[1-2]",
    "SLURM_LOCALID": "0",
    "SLURM_NNODES": "2",
    "SLURM_NODEID": "0",
    "SLURM_NPROCS": "3",
    "SLURM_NTASKS": "3",
    "SLURM_PROCID": "0",
    "SLURM_TASKS_PER_NODE": "2,1",
}
SLURM_STEP = {
    **SLURM_BATCH,
    "SLURM_LAUNCH_NODE_IPADDR": "10.77.0.11",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "2",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
    "SLURM_RESTART_COUNT": "1",
}
SLURM_PMI2_STEP = {**SLURM_STEP, "PMI_FD": "11", "PMI_JOBID": "1.1", "PMI_RANK": "2", "PMI_SIZE": "3"}
# mpiexec inside sbatch starts one proxy per node with srun; the ranks inherit the proxies' step.
MPIEXEC_IN_SLURM = {
    **SLURM_BATCH,
    "MPI_LOCALNRANKS": "1",
    "MPI_LOCALRANKID": "0",
    "PMI_FD": "5",
    "PMI_RANK": "2",
    "PMI_SIZE": "3",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "n[1-2]",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
}
SLURM_LAUNCH = Launch("slurm", 2, 3, 0, 1, "n1", 20000 + 100001 % 12000, 1, job="100001.0.1")
# As the launchers' own documentation and public programs name them; the second of three ranks, on the second node.
PALS = {
    "PALS_LOCAL_RANKID": "0",
    "PALS_LOCAL_SIZE": "1",
    "PALS_NODEID": "1",
    "PALS_RANKID": "1",
    "PMI_LOCAL_RANK": "0",
    "PMI_LOCAL_SIZE": "1",
    "PMI_RANK": "1",
    "PMI_SIZE": "3",
}
FLUX = {
    "FLUX_JOB_ID": "f1",
    "FLUX_JOB_NNODES": "2",
    "FLUX_JOB_SIZE": "3",
    "FLUX_TASK_LOCAL_ID": "0",
    "FLUX_TASK_RANK": "1",
    "PMI_FD": "11",
    "PMI_RANK": "1",
    "PMI_SIZE": "3",
}
MVAPICH, MVAPICH_3, JSRUN = (
    {f"{prefix}_RANK": "1", f"{prefix}_SIZE": "3", f"{prefix}_LOCAL_RANK": "0", f"{prefix}_LOCAL_SIZE": "1"}
    for prefix in ("MV2_COMM_WORLD", "MVP_COMM_WORLD", "JSM_NAMESPACE")
)
SECOND_OF_3 = Launch("mpi", 1, 3, 0, 1)


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, Launch()),
        ({"MASTER_ADDR": "x", "HOME": "/root"}, Launch()),
        (TORCHRUN, Launch("torchrun", 1, 2, 1, 2, "localhost", 43921, 2, True)),
        (MPICH, Launch("mpi", 3, 4, 1, 2)),
        (OPEN_MPI, Launch("mpi", 2, 4, 0, 2)),
        (SLURM_BATCH, Launch()),
        (SLURM_STEP, SLURM_LAUNCH),
        (SLURM_PMI2_STEP, SLURM_LAUNCH),
        (MPIEXEC_IN_SLURM, Launch("mpi", 2, 3, 0, 1)),
        ({**SLURM_STEP, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, Launch()),
        ({k: v for k, v in SLURM_STEP.items() if "_STEP_N" not in k and "_STEP_T" not in k}, SLURM_LAUNCH),
        ({**SLURM_STEP, **TORCHRUN}, detect(TORCHRUN)),
        ({**MPICH, **TORCHRUN}, detect(TORCHRUN)),
        ({**OPEN_MPI, **TORCHRUN}, detect(TORCHRUN)),
        ({**SLURM_BATCH, **OPEN_MPI}, Launch("mpi", 2, 4, 0, 2)),
        ({**SLURM_STEP, **OPEN_MPI}, Launch("mpi", 2, 4, 0, 2)),
        ({**SLURM_STEP, "PMIX_RANK": "2", "PMIX_NAMESPACE": "slurm.pmix.100001.0"}, SLURM_LAUNCH),
        (PALS, SECOND_OF_3),
        (FLUX, Launch("mpi", 1, 3, 0, 0)),
        ({**FLUX, "FLUX_JOB_NNODES": "1", "FLUX_TASK_LOCAL_ID": "1"}, Launch("mpi", 1, 3, 1, 3)),
        ({**SLURM_STEP, **FLUX}, Launch("mpi", 1, 3, 0, 0)),
        (MVAPICH, SECOND_OF_3),
        (MVAPICH_3, SECOND_OF_3),
        (JSRUN, SECOND_OF_3),
        ({"PMI_RANK": "1", "PMI_SIZE": "3"}, Launch("mpi", 1, 3, 0, 0)),
        ({"PMIX_RANK": "1", "PALS_RANKID": "1", "PALS_LOCAL_SIZE": "1"}, Launch("mpi", 1, 0, 0, 0)),
        ({"ALPS_APP_PE": "1"}, Launch("mpi", 1, 0, 0, 0)),
    ],
    ids=[
        "nothing",
        "irrelevant",
        "torchrun",
        "mpich",
        "open_mpi",
        "sbatch_without_srun",
        "srun",
        "srun_pmi2",
        "mpiexec_in_slurm",
        "srun_one_task",
        "srun_of_an_older_slurm",
        "torchrun_in_slurm",
        "torchrun_in_mpiexec",
        "torchrun_in_open_mpi",
        "open_mpi_in_sbatch",
        "open_mpi_in_a_step",
        "srun_pmix",
        "pals",
        "flux",
        "flux_on_one_node",
        "flux_in_slurm",
        "mvapich2",
        "mvapich3",
        "jsrun",
        "any_pmi",
        "pals_with_pmix",
        "alps",
    ],
)
def test_detect(environ: dict[str, str], expected: Launch) -> None:
    assert detect(environ) == expected


def test_variables_set_by_hand_on_one_machine() -> None:
    by_hand = {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    launch = detect(by_hand)
    assert (launch.local_rank, launch.local_world_size, launch.single_node) == (1, 3, True)
    assert not launch.agent_store


def test_slurm_master_from_the_environment_goes_first() -> None:
    launch = detect({**SLURM_STEP, "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "1234"})
    assert (launch.master_addr, launch.master_port) == ("10.0.0.1", 1234)


@pytest.mark.parametrize(
    ("environ", "culprit"),
    [
        ({"RANK": "0"}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "4"}, "RANK"),
        ({**TORCHRUN, "RANK": "2"}, "RANK=2"),
        ({**TORCHRUN, "WORLD_SIZE": "two"}, "WORLD_SIZE"),
        ({**TORCHRUN, "RANK": "-1"}, "RANK='-1'"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "3"}, "LOCAL_WORLD_SIZE"),
        ({**TORCHRUN, "LOCAL_RANK": "2"}, "LOCAL_RANK=2"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT"),
        ({"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}, "LOCAL_WORLD_SIZE"),
        ({k: v for k, v in MPICH.items() if k != "PMI_SIZE"}, "PMI_SIZE"),
        ({k: v for k, v in MPICH.items() if k != "MPI_LOCALNRANKS"}, "MPI_LOCALNRANKS"),
        ({k: v for k, v in OPEN_MPI.items() if k != "OMPI_COMM_WORLD_RANK"}, "OMPI_COMM_WORLD_RANK"),
        ({k: v for k, v in SLURM_STEP.items() if "TASKS" not in k}, "SLURM_NTASKS"),
        ({k: v for k, v in SLURM_STEP.items() if "PER_NODE" not in k}, "SLURM_TASKS_PER_NODE"),
        ({k: v for k, v in SLURM_STEP.items() if k != "SLURM_JOB_ID"}, "SLURM_JOB_ID"),
        ({**SLURM_STEP, "SLURM_STEP_TASKS_PER_NODE": "2(3)"}, "SLURM_STEP_TASKS_PER_NODE"),
        ({**SLURM_STEP, "SLURM_NODEID": "2"}, "SLURM_NODEID"),
    ],
)
def test_half_set_or_contradictory_names_the_variable(environ: dict[str, str], culprit: str) -> None:
    with pytest.raises(UserError, match=culprit):
        detect(environ)


# What a launcher must have said; each of them missing, beyond the others, or no number.
SAYS = {
    "torchrun": (TORCHRUN, "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    "mpich": (MPICH, "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    "open_mpi": (
        OPEN_MPI,
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    "pals": (PALS, "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    "flux": (FLUX, "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID"),
    "mvapich2": (MVAPICH, *MVAPICH),
    "slurm": (SLURM_STEP, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_NODEID"),
}


def outcome(environ: dict[str, str]) -> Launch | UserError:
    """The launch, or what is wrong with it."""
    try:
        return detect(environ)
    except UserError as error:
        return error


@pytest.mark.parametrize("name", SAYS)
def test_every_variable_of_a_launcher_counts(name: str) -> None:
    """Without it the launch is the same all the same, or an error; with a wrong value an error that names it."""
    environ, *names = SAYS[name]
    for variable in names:
        others = {k: v for k, v in environ.items() if k != variable}
        found = outcome(others)
        assert found == detect(environ) or any(v in str(found) for v in names), (variable, found)
        # A world may be larger than what can be seen of it from here.
        world = variable.endswith(("WORLD_SIZE", "PMI_SIZE", "JOB_SIZE", "NUM_TASKS")) and "LOCAL" not in variable
        for wrong in ("x", "-1", *(["1"] if world else ["99999"])):
            if wrong == "1" and name == "slurm":
                continue  # a step of one task is a single process, whatever else is set
            with pytest.raises(UserError, match=variable):
                detect({**others, variable: wrong})


@pytest.mark.parametrize(
    "around",
    [MPICH, OPEN_MPI, PALS, {**FLUX, "FLUX_JOB_NNODES": "1"}, MVAPICH, SLURM_STEP],
    ids=["mpich", "open_mpi", "pals", "flux", "mv2", "slurm"],
)
def test_variables_set_by_hand_inside_a_launch(around: dict[str, str]) -> None:
    """Sites do set them from the launcher's; forgotten ones would be a world that never comes together."""
    launch = detect(around)
    same = {"RANK": str(launch.rank), "WORLD_SIZE": str(launch.world_size), "MASTER_ADDR": "n1", "MASTER_PORT": "1"}
    local = {"LOCAL_RANK": str(launch.local_rank), "LOCAL_WORLD_SIZE": str(launch.local_world_size)}
    assert detect({**around, **same, **local}).rank == launch.rank
    with pytest.raises(UserError, match="unset RANK and WORLD_SIZE"):
        detect({**around, "RANK": "0", "WORLD_SIZE": "1"})


def test_steps_and_jobs_beside_each_other_have_ports_of_their_own() -> None:
    launches = [
        detect({**SLURM_STEP, "SLURM_JOB_ID": str(job), "SLURM_STEP_ID": str(step)})
        for job in range(4242, 4252)
        for step in range(10)
    ]
    assert len({launch.master_port for launch in launches}) == len({launch.job for launch in launches}) == 100
    assert all(launch.master_port is not None and 20000 <= launch.master_port < 32000 for launch in launches)


@pytest.mark.parametrize(
    ("nodelist", "host"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[03-05,9],cpu1", "gpu03"),
        ("rack[2,4]n[07-09]-ib", "rack2n07-ib"),
    ],
)
def test_first_host(nodelist: str, host: str) -> None:
    assert first_host(nodelist) == host


def test_light() -> None:
    code = "import sys, fedhpc.ranks.launch; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
