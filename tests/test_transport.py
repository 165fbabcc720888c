"""One contract over all transports; each (transport, world size) is one launch, since imports cost seconds."""

from __future__ import annotations

import datetime
import socket
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path
from queue import SimpleQueue
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from fedhpc.errors import UserError
from fedhpc.ranks import network, rendezvous
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.network import interface_of, local_address_for
from fedhpc.ranks.transport import open_transport, torch_dist
from tests.contract_transport import run_all
from tests.ranks import Launcher, Ranks, free_port, run_ranks

CONTRACT = str(Path(__file__).with_name("contract_transport.py"))
SECOND = datetime.timedelta(seconds=1)
IN_PIECES = """
import sys
from fedhpc.ranks.transport import mpi
from tests import contract_transport
mpi._PIECE_BYTES = 3000
sys.argv[1:] = ["auto", "mpi"]
contract_transport.main()
"""


def test_loopback_keeps_the_contract() -> None:
    with open_transport(Launch(), "auto", 60) as transport:
        assert transport.name == "loopback"
        run_all(transport)
        assert transport.wire_bytes == 0


@pytest.mark.parametrize(
    ("launcher", "n", "name"),
    [
        ("forked", 3, "gloo"),
        ("mpiexec", 3, "mpi"),
        pytest.param("env", 2, "gloo", marks=pytest.mark.soak),
        pytest.param("mpiexec", 2, "mpi", marks=pytest.mark.soak),
        pytest.param("torchrun", 3, "gloo", marks=pytest.mark.slow),
    ],
)
def test_contract(launcher: Launcher, n: int, name: str) -> None:
    results = run_ranks(n, [CONTRACT, "auto", name], launcher)
    assert [result.code for result in results] == [0] * len(results), results
    assert "".join(result.out for result in results).count("contract kept") == n


@pytest.mark.slow
@pytest.mark.parametrize("tree_ranks", [1, 8])
def test_contract_over_nodes(tree_ranks: int) -> None:
    """Two nodes, one of them with two ranks; with real ones and what crosses between them: cluster/test_hosts.py."""
    program = f"""
import sys
from fedhpc.ranks.transport import torch_dist
from tests import contract_transport
torch_dist._TREE_RANKS = {tree_ranks}
torch_dist._node = lambda launch: "other" if launch.rank else "first"
sys.argv[1:] = ["auto", "gloo"]
contract_transport.main()
"""
    results = run_ranks(3, program, "forked")
    assert [result.code for result in results] == [0] * 3, results
    assert "".join(result.out for result in results).count("contract kept") == 3


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8, 16, 33])
def test_a_small_tensor_takes_rank_0_a_message_for_each_doubling_of_the_ranks(
    world: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    wire: dict[tuple[int, int], SimpleQueue[torch.Tensor]] = defaultdict(SimpleQueue)
    here, messages = threading.local(), Counter[int]()

    def send(tensor: torch.Tensor, dst: int) -> None:
        wire[here.rank, dst].put(tensor.clone())
        messages[here.rank] += 1

    def recv(tensor: torch.Tensor, src: int) -> None:
        tensor.copy_(wire[src, here.rank].get(timeout=10))
        messages[here.rank] += 1

    monkeypatch.setattr(torch_dist, "dist", SimpleNamespace(send=send, recv=recv))
    ranks = [10 * index for index in range(world)]
    sums, highest = {}, {}

    def work(rank: int) -> None:
        here.rank = rank
        sums[rank] = torch.tensor([rank, 1])
        torch_dist._pass_up(sums[rank], ranks, rank, torch.add)
        highest[rank] = torch.tensor([-rank, rank])
        torch_dist._pass_up(highest[rank], ranks, rank, torch.maximum)
        torch_dist._pass_down(highest[rank], ranks, rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sums[0].tolist() == [sum(ranks), world]
    assert all(one.tolist() == [0, ranks[-1]] for one in highest.values()) and len(highest) == world
    assert messages[0] == 3 * (world - 1).bit_length()


@pytest.mark.slow
def test_contract_in_pieces() -> None:
    """As tensors beyond what one call of MPI takes; cluster/test_launch.py has Open MPI and more than 2^31 bytes."""
    (result,) = run_ranks(3, IN_PIECES, "mpiexec")
    assert (result.code, result.out.count("contract kept")) == (0, 3), result


@pytest.mark.gpu
@pytest.mark.parametrize(("n", "name"), [(1, "loopback"), (2, "gloo")])
def test_contract_on_one_gpu(n: int, name: str) -> None:
    results = run_ranks(n, [CONTRACT, "auto", name, "cuda"], "env")
    assert [result.code for result in results] == [0] * n, results


@pytest.mark.soak
def test_restarted_ranks_find_each_other() -> None:
    """torchrun --max-restarts: the second try must not follow the first one's addresses. With the whole program:
    test_kill.py."""
    program = """
import os, torch
from fedhpc.ranks.launch import detect
from fedhpc.ranks.transport import open_transport
launch = detect(os.environ)
with open_transport(launch, "auto", 60) as transport:
    transport.reduce_sum(torch.ones(3))
    if launch.restart_count == 0 and launch.rank == 0:
        os.kill(os.getpid(), 9)
    transport.barrier()
    os.write(1, f"done {launch.restart_count}\\n".encode())
"""
    (result,) = run_ranks(2, program, "torchrun", launcher_args=["--max-restarts=1"])
    assert result.code == 0, result
    assert result.out.count("done 1") == 2


def test_torch_under_mpiexec_needs_an_address() -> None:
    with pytest.raises(UserError, match="MASTER_ADDR"):
        open_transport(Launch("mpi", 0, 2, 0, 2), "torch", 60)


def test_mpi_without_mpi4py_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(UserError, match=r"fedhpc\[mpi\]"):
        open_transport(Launch(), "mpi", 60)


@pytest.mark.slow
def test_mpi_that_disagrees_with_the_launcher() -> None:
    for result in run_ranks(2, [CONTRACT, "mpi", "mpi"], "env"):  # two MPI worlds of one rank each
        assert result.code != 0
        assert "the launcher says rank" in result.err


def test_missing_ranks_are_named() -> None:
    launch = Launch("torchrun", 0, 3, 0, 3, "127.0.0.1", free_port())
    store = torch_dist.open_store(launch, 5)
    store.set("here/2", "yes")
    with pytest.raises(UserError, match=r"ranks \[1\] of 3"):
        torch_dist.arrive(store, launch, 0.2)
    with pytest.raises(UserError, match="another rank 0 is here already, of another run"):
        torch_dist.arrive(store, launch, 0.2)
    store.delete_key("arrived/0")
    store.set("here/1", "a host")
    store.set("here/2", "127.0.0.1")
    assert torch_dist.arrive(store, launch, 5) == [[0, 2], [1]]


def test_a_stale_store_is_not_followed() -> None:
    """Neither a dead owner's address nor a stranger's store on it: the published one is read again."""
    stranger = dist.TCPStore("127.0.0.1", 0, None, True, SECOND, wait_for_workers=False)
    stranger.set("nonce", "another")
    real = dist.TCPStore("127.0.0.1", 0, None, True, SECOND, wait_for_workers=False)
    real.set("nonce", "mine")
    real.set("hello", "world")
    published = iter([free_port(), stranger.port, real.port])
    found = torch_dist.follow(lambda: f"127.0.0.1 {next(published)} mine", 20)
    assert found.get("hello") == b"world"
    with pytest.raises(UserError, match="did not answer"):
        torch_dist.follow(lambda: f"127.0.0.1 {free_port()} mine", 0.2)


def test_a_store_that_answers_late_is_waited_for_in_silence(capfd: pytest.CaptureFixture[str]) -> None:
    """As where many ranks start at once on few cores: more come than rank 0 has accepted."""
    store = dist.TCPStore("127.0.0.1", 0, None, True, SECOND, wait_for_workers=False)
    store.set("nonce", "mine")

    def carry(source: socket.socket, to: socket.socket) -> None:
        while read := source.recv(4096):
            to.sendall(read)
        to.shutdown(socket.SHUT_WR)

    def answer() -> None:
        time.sleep(1.5)
        listening.accept()[0].close()  # a first look, which is all that fits in the backlog
        with listening.accept()[0] as client, socket.create_connection(("127.0.0.1", store.port)) as server:
            back = threading.Thread(target=carry, args=(server, client))
            back.start()
            carry(client, server)
            back.join()

    with socket.create_server(("127.0.0.1", 0), backlog=0) as listening:
        late = threading.Thread(target=answer, daemon=True)
        late.start()
        found = torch_dist.follow(lambda: f"127.0.0.1 {listening.getsockname()[1]} mine", 20)
        assert found.get("nonce") == b"mine"
        del found
        late.join()
    assert capfd.readouterr().err == ""


def test_a_rank_that_never_comes_ends_the_others() -> None:
    """The watchdog of the connect phase, where no liveness is there yet."""
    program = """
import time
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.transport.base import connect_deadline
with connect_deadline(Launch("torchrun", 1, 2), 0.2):
    time.sleep(3600)
"""
    with Ranks(1, program) as ranks:
        (result,) = ranks.wait(300)
    assert (result.code, result.err.count("\n")) == (1, 1)
    assert "rank 1 of 2 could not connect" in result.err


def test_addresses() -> None:
    assert local_address_for("127.0.0.1") == local_address_for("localhost") == "127.0.0.1"
    assert interface_of("127.0.0.1") in ("lo", "lo0")
    with pytest.raises(UserError, match="MASTER_ADDR"):
        local_address_for("no-such-host.invalid")
    with pytest.raises(UserError, match="GLOO_SOCKET_IFNAME"):
        interface_of("192.0.2.1")


def test_a_rank_never_follows_another_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither rank 0 nor the others; a program that says nothing, or something else, is not rank 0 either."""
    port = free_port()
    rendezvous.announce(port, "job/1", "here I am")
    assert rendezvous.ask("127.0.0.1", port, "job/1", 20) == "here I am"
    with pytest.raises(UserError, match=f"MASTER_PORT: port {port} .* cannot be used .Address already in use"):
        rendezvous.announce(port, "job/2", "")
    monkeypatch.setattr(rendezvous, "_STRANGERS_S", 0.1)
    monkeypatch.setattr(rendezvous, "_ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        for wrong in (port, silent.getsockname()[1]):
            began = time.monotonic()
            with pytest.raises(UserError, match=f"MASTER_PORT: port {wrong} of 127.0.0.1 is that of another run"):
                rendezvous.ask("127.0.0.1", wrong, "job/2", 60)
            assert time.monotonic() - began < 30  # not the 60 s
    with pytest.raises(UserError, match="did not answer"):
        rendezvous.ask("127.0.0.1", free_port(), "job/2", 0.2)


def test_a_host_that_nobody_knows_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the transport, and not after the minutes that ranks may take to find each other."""
    assert network._LOOK_UP_S < 5
    monkeypatch.setattr(network, "_LOOK_UP_S", 0.5)
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    for launcher in ("torchrun", "slurm", "mpi"):
        began = time.monotonic()
        with pytest.raises(UserError, match=r"MASTER_ADDR: rank 0's host is 'no-such-host.invalid', and no address"):
            network.locate(Launch(launcher, 1, 2, 0, 1, "no-such-host.invalid", 1))  # type: ignore[arg-type]
        assert time.monotonic() - began < 30  # not minutes


def test_slurm_knows_the_address_of_its_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NodeName is no name of a host; with a real Slurm: cluster/test_slurm.py."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$3 Arch=x86_64 NodeAddr=192.0.2.7 NodeHostName=other Port=6818"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr(network, "_LOOK_UP_S", 0.5)
    launch = Launch("slurm", 1, 2, 0, 1, "no-such-host.invalid", 1)
    assert network.locate(launch).master_addr == "192.0.2.7"
    scontrol.write_text("#!/bin/sh\nexit 1\n")
    with pytest.raises(UserError, match="no address is known"):
        network.locate(launch)


def test_rank_0_is_found_by_its_address() -> None:
    def located(address: str | None, local_world_size: int = 1) -> str | None:
        return network.locate(Launch("torchrun", 1, 2, 0, local_world_size, address, 1)).master_addr

    assert located("192.0.2.7") == "192.0.2.7"
    assert located("localhost") == "127.0.0.1"
    assert located("no-such-host.invalid", local_world_size=2) == "127.0.0.1"  # all ranks are here
    assert located(None) is None


def test_the_address_that_other_hosts_reach() -> None:
    """Without any name: MPI needs no MASTER_ADDR."""
    mine = network.host_addresses()
    assert not any(address.startswith("127.") for address in mine)
    assert network.reachable_address([mine, mine]) == "127.0.0.1"
    if mine:
        neighbour = mine[0].rpartition(".")[0] + ".253"
        assert network.reachable_address([mine, ["172.17.0.1", neighbour]]) in [*mine, "127.0.0.1"]
