"""Detects from the environment which launcher started this process, and which rank it is.

There is one table of variables per launcher; everything else is derived. The innermost launcher wins: torchrun inside
mpiexec inside a Slurm step is torchrun. This module does not import torch, so that the configuration can be checked
first.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from fedhpc.errors import UserError
from fedhpc.ranks.placement import Placement

LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Set by several launchers, for the MPI library of their processes: also by Slurm.
_SHARED = ("PMI_RANK", "PMI_SIZE")


@dataclass(frozen=True)
class Launch:
    """How this process was launched: its rank, the number of ranks, and where rank 0 is."""

    launcher: Literal["single", "forked", "torchrun", "slurm", "mpi"] = "single"
    rank: int = 0
    world_size: int = 1  # 0: the launcher does not tell, MPI does
    local_rank: int = 0
    local_world_size: int = 1  # 0: the launcher does not tell
    master_addr: str | None = None
    master_port: int | None = None
    restart_count: int = 0
    agent_store: bool = False  # torchrun's agent already serves a TCPStore at master_addr:master_port
    job: str = ""  # what tells this launch from others on the same machines; the same on all ranks
    placement: Placement = field(default_factory=Placement)  # the GPUs of all ranks, once they have agreed on it

    @property
    def single_node(self) -> bool:
        """Whether all ranks share this machine, as far as the launcher tells."""
        return self.local_world_size == self.world_size > 0


@dataclass(frozen=True)
class _Variables:
    """The environment variables in which a launcher tells a process its rank; None for what it does not tell."""

    rank: str
    world_size: str
    local_rank: str
    local_world_size: str | None
    restart_count: str | None = None

    def set_in(self, environ: Mapping[str, str]) -> bool:
        """Whether any of them is set that no other launcher sets."""
        names = (self.rank, self.world_size, self.local_rank, self.local_world_size)
        return any(name in environ for name in names if name is not None and name not in _SHARED)


# People also export torchrun's variables by hand, without any launcher.
_TORCHRUN = _Variables("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "TORCHELASTIC_RESTART_COUNT")
# In the shell of an interactive step SLURM_NTASKS is that of the job, so the step's own count comes first.
_SLURM = _Variables("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", None, "SLURM_RESTART_COUNT")
# Launchers of MPI programs, each known by its own variables.
_MPI = (
    # Open MPI, and Spectrum MPI under jsrun.
    _Variables(
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    # MVAPICH2, MVAPICH 3, and jsrun with another MPI.
    _Variables("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    _Variables("MVP_COMM_WORLD_RANK", "MVP_COMM_WORLD_SIZE", "MVP_COMM_WORLD_LOCAL_RANK", "MVP_COMM_WORLD_LOCAL_SIZE"),
    _Variables("JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", "JSM_NAMESPACE_LOCAL_SIZE"),
    # HPE PALS.
    _Variables("PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    _Variables("FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", None),
    # Hydra: MPICH, Intel MPI, ParaStation.
    _Variables("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)
# A rank and little else, so that MPI has to tell the rest: any PMI, PMIx (PRRTE's prun), PALS with PMIx, Cray ALPS,
# IBM POE, MVAPICH 1.
_RANKS = ("PMI_RANK", "PMIX_RANK", "PALS_RANKID", "ALPS_APP_PE", "MP_CHILD", "MPIRUN_RANK")


def detect(environ: Mapping[str, str]) -> Launch:
    """Read the launch from environment variables; UserError where some are missing or contradict each other."""
    if "RANK" in environ or "WORLD_SIZE" in environ:
        launch = _torchrun(environ)
        if "TORCHELASTIC_RESTART_COUNT" not in environ:
            _agree(launch, environ)
        return launch
    for names in _MPI:
        if names.set_in(environ):
            return _launch(environ, "mpi", names, _local_world_size(environ, names))
    if "SLURM_STEP_ID" in environ:
        return _slurm(environ)
    for name in _RANKS:
        if name in environ:
            return _half_known(environ, name)
    return Launch()


def _local_world_size(environ: Mapping[str, str], names: _Variables) -> int | None:
    if names.local_world_size is not None:
        return _optional_int(environ, names.local_world_size)
    # Flux tells the number of nodes in its place.
    return _int(environ, names.world_size, names.rank) if environ.get("FLUX_JOB_NNODES") == "1" else 0


def _half_known(environ: Mapping[str, str], rank: str) -> Launch:
    """The launch by a launcher that tells the rank in the variable `rank`, and nothing of this node."""
    world_size = _int(environ, "PMI_SIZE", rank) if rank == "PMI_RANK" else 0
    return Launch(
        "mpi",
        _int(environ, rank, rank),
        world_size,
        local_world_size=0,
        master_addr=environ.get("MASTER_ADDR"),
        master_port=_optional_int(environ, "MASTER_PORT"),
    )


def _agree(launch: Launch, environ: Mapping[str, str]) -> None:
    """UserError where RANK and WORLD_SIZE, set by hand, contradict the launcher that started this process."""
    outer = detect({name: value for name, value in environ.items() if name not in ("RANK", "WORLD_SIZE")})
    if outer.world_size > 1 and (outer.rank, outer.world_size) != (launch.rank, launch.world_size):
        raise UserError(
            f"RANK={launch.rank}, WORLD_SIZE={launch.world_size} contradict the {outer.launcher} launcher's rank "
            f"{outer.rank} of {outer.world_size}: unset RANK and WORLD_SIZE"
        )


def _torchrun(environ: Mapping[str, str]) -> Launch:
    world_size = _int(environ, "WORLD_SIZE", "RANK")
    local_world_size = _optional_int(environ, "LOCAL_WORLD_SIZE")
    if local_world_size is None:
        if world_size > 1 and environ.get("MASTER_ADDR") not in LOOPBACK:
            raise UserError(
                "WORLD_SIZE is set but LOCAL_WORLD_SIZE is not: start with torchrun, "
                "or set LOCAL_RANK and LOCAL_WORLD_SIZE"
            )
        local_world_size = world_size
    return _launch(
        environ,
        "torchrun",
        _TORCHRUN,
        local_world_size,
        agent_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
    )


def _slurm(environ: Mapping[str, str]) -> Launch:
    _text(environ, "SLURM_PROCID", "SLURM_STEP_ID")
    names = _SLURM if _SLURM.world_size in environ else replace(_SLURM, world_size="SLURM_NTASKS")
    if _int(environ, names.world_size, "SLURM_PROCID") == 1:
        return Launch()
    job, step = _int(environ, "SLURM_JOB_ID", "SLURM_PROCID"), _int(environ, "SLURM_STEP_ID", "SLURM_PROCID")
    per_node = _tasks_per_node(environ)
    node = _int(environ, "SLURM_NODEID", "SLURM_PROCID")
    if node >= len(per_node):
        raise UserError(f"SLURM_NODEID={node} contradicts SLURM_STEP_TASKS_PER_NODE: {len(per_node)} nodes")
    hosts = environ.get("SLURM_STEP_NODELIST") or _text(environ, "SLURM_JOB_NODELIST", "SLURM_PROCID")
    return _launch(
        environ,
        "slurm",
        names,
        per_node[node],
        master_addr=environ.get("MASTER_ADDR") or first_host(hosts),
        master_port=_optional_int(environ, "MASTER_PORT") or _port(job, step),
        job=f"{job}.{step}.{environ.get(_SLURM.restart_count or '', '0')}",
    )


def _port(job: int, step: int) -> int:
    """A port for this step: another one for jobs and steps that probably run beside it on a node.

    All are below the ports that systems give to outgoing connections (from 32768).
    """
    return 20000 + (job + 1009 * step) % 12000


def _tasks_per_node(environ: Mapping[str, str]) -> list[int]:
    """How many tasks each node has: Slurm writes [2, 2, 2, 1] as "2(x3),1"."""
    name = "SLURM_STEP_TASKS_PER_NODE"
    if name not in environ:
        name = "SLURM_TASKS_PER_NODE"
    counts: list[int] = []
    for part in _text(environ, name, "SLURM_PROCID").split(","):
        tasks, _, times = part.partition("(x")
        try:
            counts += [int(tasks)] * int(times.rstrip(")") or 1)
        except ValueError:
            raise UserError(f"{name}={environ[name]!r} is not a list like 2(x3),1") from None
    return counts


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list; that of "gpu[03-05,9],cpu1" is "gpu03"."""
    depth = 0
    host = ""
    for character in nodelist:
        if character == "," and depth == 0:
            break
        depth += (character == "[") - (character == "]")
        host += character
    while "[" in host:
        prefix, _, rest = host.partition("[")
        inside, _, suffix = rest.partition("]")
        host = prefix + inside.split(",")[0].split("-")[0] + suffix
    return host


def _launch(
    environ: Mapping[str, str],
    launcher: Literal["torchrun", "slurm", "mpi"],
    names: _Variables,
    local_world_size: int | None,
    *,
    master_addr: str | None = None,
    master_port: int | None = None,
    agent_store: bool = False,
    job: str = "",
) -> Launch:
    world_size = _int(environ, names.world_size, names.rank)
    rank = _int(environ, names.rank, names.world_size)
    if not 0 <= rank < world_size:
        raise UserError(
            f"{names.rank}={rank} contradicts {names.world_size}={world_size}: ranks are 0..{world_size - 1}"
        )
    if local_world_size is None:
        missing = names.local_world_size
        raise UserError(f"{names.rank} is set but {missing} is not: start through the launcher")
    if local_world_size > world_size or (local_world_size == 0 and names.local_world_size):
        raise UserError(
            f"{names.local_world_size or 'SLURM_STEP_TASKS_PER_NODE'}: {local_world_size} ranks on this node "
            f"contradict {names.world_size}={world_size}"
        )
    local_rank = _optional_int(environ, names.local_rank)
    if local_rank is None:
        if local_world_size != world_size:
            raise UserError(f"{names.rank} is set but {names.local_rank} is not: start through the launcher")
        local_rank = rank
    if not 0 <= local_rank < (local_world_size or world_size):
        raise UserError(f"{names.local_rank}={local_rank} contradicts {local_world_size} ranks on this node")
    return Launch(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        master_addr=master_addr or environ.get("MASTER_ADDR"),
        master_port=master_port or _optional_int(environ, "MASTER_PORT"),
        restart_count=_optional_int(environ, names.restart_count) or 0,
        agent_store=agent_store,
        job=job,
    )


def _text(environ: Mapping[str, str], name: str, because: str) -> str:
    value = environ.get(name)
    if not value:
        raise UserError(f"{because} is set but {name} is not: start through the launcher, or unset {because}")
    return value


def _int(environ: Mapping[str, str], name: str, because: str) -> int:
    return _parse(name, _text(environ, name, because))


def _optional_int(environ: Mapping[str, str], name: str | None) -> int | None:
    value = environ.get(name) if name else None
    return _parse(name, value) if name and value else None


def _parse(name: str, value: str) -> int:
    # Only ASCII digits: int() also takes "1_0", " 1 " and "-1", which no launcher writes.
    if not (value.isascii() and value.isdigit()):
        raise UserError(f"{name}={value!r} in the environment is not a number of 0 or more")
    return int(value)
