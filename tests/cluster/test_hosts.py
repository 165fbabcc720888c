"""Three hosts as network namespaces, gloo over the links between them: a run across them, one that is cut off, ranks
that start again, and what crosses between hosts."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from tests.cluster.conftest import LIMIT_S
from tests.ranks import BIN, REPOSITORY, _clean_environ
from tests.test_kill import printed, recorded, same_as, write

HOSTS = (1, 2, 3)
TIMEOUT_S = 15  # beside other tests, or while it imports, a rank may be silent for seconds


def ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


@pytest.fixture
def hosts() -> Iterator[None]:
    """fh1 to fh3 with 10.88.0.11 to .13 on a bridge; `ip link set fhv3 down` cuts the third off."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("hosts as network namespaces need Linux, root and the program ip")
    take_down()  # what a killed session left
    try:
        try:
            ip("link", "add", "fhbr0", "type", "bridge")
            ip("netns", "add", "fh1")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"no network namespaces on a bridge here: {error.stderr.decode().strip()}")
        ip("link", "set", "fhbr0", "up")
        for i in HOSTS[1:]:
            ip("netns", "add", f"fh{i}")
        for i in HOSTS:
            ip("link", "add", f"fhv{i}", "type", "veth", "peer", "name", "eth0", "netns", f"fh{i}")
            ip("link", "set", f"fhv{i}", "master", "fhbr0", "up")
            ip("-n", f"fh{i}", "link", "set", "lo", "up")
            ip("-n", f"fh{i}", "addr", "add", f"10.88.0.1{i}/24", "dev", "eth0")
            ip("-n", f"fh{i}", "link", "set", "eth0", "up")
        yield
    finally:
        take_down()


def take_down() -> None:
    for i in HOSTS:
        # The link first: a network namespace goes when its last connection has.
        subprocess.run(["ip", "link", "del", f"fhv{i}"], capture_output=True)
        subprocess.run(["ip", "netns", "del", f"fh{i}"], capture_output=True)
    subprocess.run(["ip", "link", "del", "fhbr0"], capture_output=True)


class Ranks:
    """A program on the first hosts, rank 0 on the first of them, with torchrun's variables. Ended with the block.

    per_host: how many ranks on each. program: the arguments of Python.
    """

    def __init__(self, folder: Path, port: int, per_host: tuple[int, ...], *program: str) -> None:
        self.logs: list[Path] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        for i, ranks in zip(HOSTS, per_host, strict=False):
            for local in range(ranks):
                rank = len(self.processes)
                environ = {
                    "MASTER_ADDR": "10.88.0.11",
                    "MASTER_PORT": str(port),
                    "RANK": str(rank),
                    "WORLD_SIZE": str(sum(per_host)),
                    "LOCAL_RANK": str(local),
                    "LOCAL_WORLD_SIZE": str(ranks),
                }
                self.logs.append(folder / f"rank{rank}-{port}.log")
                self.processes.append(on_host(i, [sys.executable, *program], environ, self.logs[-1]))

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()
            process.wait()

    def output(self) -> str:
        return "".join(log.read_text() for log in self.logs)

    def wait(self, timeout_s: float) -> list[int]:
        deadline = time.monotonic() + timeout_s
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in self.processes]


def on_host(
    i: int, command: Sequence[str], environ: Mapping[str, str], log: Path, names: str = ""
) -> subprocess.Popen[bytes]:
    """`command` on the host fh{i}, with its output in `log`; names: a file in place of /etc/hosts."""
    common = {
        **_clean_environ(), "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environ,
    }  # fmt: skip
    common.pop("GLOO_SOCKET_IFNAME", None)  # the program finds the way between hosts itself
    begin = f'hostname fh{i} && {{ [ -z "$0" ] || mount --bind "$0" /etc/hosts; }} && exec "$@"'
    host = ["ip", "netns", "exec", f"fh{i}", "unshare", "--uts", "--mount", "sh", "-c", begin, names]
    with log.open("w") as file:
        return subprocess.Popen([*host, *command], env=common, stdin=subprocess.DEVNULL, stdout=file, stderr=file)


def main_on_hosts(path: Path, port: int, *per_host: int) -> Ranks:
    return Ranks(path.parent, port, per_host, "-m", "fedhpc.main", str(path), f"runtime.timeout_s={TIMEOUT_S}")


def test_a_host_cut_off_in_mid_run(hosts: None, whole: Path, tmp_path: Path) -> None:
    """All end within the time-out, each part with one line; what was reported is kept; the other hosts go on."""
    path = write(tmp_path, tmp_path / "run")
    with main_on_hosts(path, 29510, 1, 1, 1) as running:
        deadline = time.monotonic() + LIMIT_S
        while printed(running.output()) < 2:
            assert time.monotonic() < deadline and running.processes[0].poll() is None, running.output()
            time.sleep(0.05)
        ip("link", "set", "fhv3", "down")
        assert running.wait(TIMEOUT_S + 30) == [1, 1, 1], running.output()
        said = [[line for line in log.read_text().splitlines() if "fedhpc: " in line] for log in running.logs]
        # Rank 1 speaks where rank 0 is lost, which it is not; rank 2 is alone with its own log.
        assert said[0] == [f"fedhpc: error: rank 2 was silent for {TIMEOUT_S} s: stopped or cut off"], said
        assert said[1] == [], said
        assert said[2] == [f"fedhpc: error: rank 2: rank 0 was silent for {TIMEOUT_S} s: stopped or cut off"], said
        seen = printed(running.output())
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert status["state"] == "failed" and "was silent" in status["reason"]
    assert recorded(tmp_path / "run") >= seen >= 2
    with main_on_hosts(path, 29511, 1, 1) as running:
        assert running.wait(LIMIT_S) == [0, 0], running.output()
        assert "resuming after round" in running.output() and "2 ranks over gloo" in running.output()
    same_as(whole, tmp_path / "run")


PROGRAM = """
import json, os, time, torch
from fedhpc.ranks.launch import detect
from fedhpc.ranks.transport import open_transport

def crossed():
    return [int(open(f"/sys/class/net/eth0/statistics/{way}_bytes").read()) for way in ("tx", "rx")]

found = {}
with open_transport(detect(os.environ), "torch", 60) as transport:
    for name in ("broadcast", "reduce_sum", "all_reduce_max"):
        tensor = torch.full((2**18,), transport.rank)
        transport.barrier()
        time.sleep(0.5)  # acknowledgements
        before = crossed()
        getattr(transport, name)(tensor)
        time.sleep(0.5)
        found[name] = [(b - a) / tensor.nbytes for a, b in zip(before, crossed())]
        if name == "reduce_sum" and transport.rank == 0:
            assert tensor.eq(10).all()
    if transport.rank == 0:
        print(json.dumps(found))
"""


def test_what_crosses_between_hosts(hosts: None, tmp_path: Path) -> None:
    """Two and three ranks: a payload crosses once per host, not once per rank."""
    with Ranks(tmp_path, 29512, (2, 3), "-c", PROGRAM) as running:
        assert running.wait(LIMIT_S) == [0] * 5, running.output()
        found = json.loads(next(line for line in running.output().splitlines() if line.startswith("{")))
    (sent, _), (_, received), (there, back) = (found[n] for n in ("broadcast", "reduce_sum", "all_reduce_max"))
    # Gloo's own broadcast sends 3 payloads, and its reduction of two ranks up to 1 1/4.
    assert 1.0 <= sent < 1.15, found
    assert 1.0 <= received < 1.4, found
    assert there < 1.15 and back < 1.15, found


def test_ranks_start_again_on_two_hosts(hosts: None, whole: Path, tmp_path: Path) -> None:
    """torchrun --max-restarts: a rank of the second host dies, and the command on both comes to its end."""
    path = write(tmp_path, tmp_path / "run")
    logs = [tmp_path / f"host{i}.log" for i in (1, 2)]
    environ = {
        "NODES": "2", "HEAD": "fh1", "PORT": "29513", "RANKS": "1", "PET_MAX_RESTARTS": "2",
        "PATH": os.pathsep.join([str(BIN), os.environ["PATH"]]),
    }  # fmt: skip
    names = tmp_path / "hosts"  # torchrun looks its own one up
    names.write_text("127.0.0.1 localhost\n" + "".join(f"10.88.0.1{i} fh{i}\n" for i in HOSTS))
    script = ["bash", str(REPOSITORY / "launch" / "torchrun_nodes.sh"), str(path)]
    running = [on_host(i, script, environ, log, str(names)) for i, log in zip((1, 2), logs, strict=True)]
    try:
        deadline = time.monotonic() + LIMIT_S

        def until(text: str) -> None:
            while text not in (said := "".join(log.read_text() for log in logs)):
                assert time.monotonic() < deadline and all(p.poll() is None for p in running), said
                time.sleep(0.05)

        until("round 2/")
        (rank,) = [p for p in psutil.Process(running[1].pid).children(recursive=True) if "RANK" in p.environ()]
        rank.kill()
        until("resuming after round")
        said = [(process.wait(LIMIT_S), log.read_text()) for process, log in zip(running, logs, strict=True)]
        assert [code for code, _ in said] == [0, 0], said
        assert "fedhpc: error: rank 1 died" in said[0][1]
    finally:
        for process in running:
            for child in psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []:
                with contextlib.suppress(psutil.NoSuchProcess):
                    child.kill()
            process.kill()
            process.wait()
    same_as(whole, tmp_path / "run")
