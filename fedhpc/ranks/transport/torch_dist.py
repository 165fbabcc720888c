"""The transport over torch.distributed: gloo, and NCCL where every rank has its own GPU.

This is the only module that imports torch.distributed. Ranks find each other through a store that rank 0 opens anew at
every start: with `torchrun --max-restarts`, the agent's store still holds the addresses of the dead processes.

Gloo knows nothing about nodes: its broadcast would send to every rank of another node separately. So each node has a
leader, its first rank, and data from or to rank 0 crosses between leaders once per node. NCCL does this by itself.
Nor does gloo choose by size: among many ranks, what is small is passed on in a tree here.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import secrets
import socket
import time
from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from fedhpc.errors import UserError
from fedhpc.ranks import rendezvous
from fedhpc.ranks.failed_collective import collective
from fedhpc.ranks.group import Agreed, Group
from fedhpc.ranks.launch import Launch
from fedhpc.ranks.network import interface_of, local_address_for
from fedhpc.ranks.placement import Placement
from fedhpc.ranks.topology import Topology
from fedhpc.ranks.transport.base import Transport, arrival_limit_s, connect_deadline

# Collectives wait for local training, however long; liveness bounds silence instead.
_NO_TIMEOUT = datetime.timedelta(days=365)
_ANSWER = datetime.timedelta(seconds=10)  # of the store, while many ranks of a machine start at once
# From this number of ranks on, tensors of up to this size go from rank to rank in a binomial tree, in which rank 0 has
# a message for each doubling of the ranks. Gloo's own sums go round in a ring: fewer bytes, but two messages for each
# rank.
_TREE_RANKS, _TREE_BYTES = 8, 2**20
# Newer releases of torch have other names for them, and warn of these.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class TorchTransport(Transport):
    """Exchanges tensors with gloo, and CUDA tensors with NCCL where every rank has its own GPU.

    Without NCCL, CUDA tensors go through pinned host memory.
    """

    forms_groups = True

    def __init__(self, launch: Launch, timeout_s: float) -> None:
        super().__init__(launch.rank, launch.world_size)
        self.name = "gloo"
        self._nccl: dist.ProcessGroup | None = None
        self._gpus: tuple[str, ...] = ()  # of all ranks; none: all work on CPUs
        limit_s = arrival_limit_s(timeout_s)
        with connect_deadline(launch, limit_s + 30):
            store = open_store(launch, limit_s)
            nodes = arrive(store, launch, limit_s)
            if "GLOO_SOCKET_IFNAME" not in os.environ:
                # Gloo would listen on what the host name resolves to, often an address no other host reaches.
                os.environ["GLOO_SOCKET_IFNAME"] = interface_of(_address(launch))
            dist.init_process_group(
                "gloo",
                store=PrefixStore("group", store),
                rank=launch.rank,
                world_size=launch.world_size,
                timeout=_NO_TIMEOUT,
            )
            self._store = store  # rank 0 serves it: it lives as long as the group
            self._meet(nodes)
            self.barrier()

    def _meet(self, nodes: list[list[int]]) -> None:
        """Make the process groups of the leaders and of this node's ranks. nodes: the ranks of each node, ascending."""
        self.nodes = nodes
        self._across: dist.ProcessGroup | None = dist.group.WORLD
        self._within: dist.ProcessGroup | None = None
        self._leader = self.rank
        #: What this rank is in, from the top: the leaders and its node, or all ranks; the first of each leads it.
        self._levels = [list(range(self.world_size))]
        if 1 < len(nodes) < self.world_size:
            ranks = next(ranks for ranks in nodes if self.rank in ranks)
            self._leader = ranks[0]
            # A rank alone on its node has a group too: torch names a group by how many a rank has made before.
            self._within = _subgroup(ranks)
            leaders = [ranks[0] for ranks in nodes]
            self._across = _subgroup(leaders) if self.rank == self._leader else None
            self._levels = [leaders, ranks] if self.rank == self._leader else [ranks]

    def use_placement(self, placement: Placement) -> None:
        # NCCL refuses two ranks on one GPU, and a rank without one.
        super().use_placement(placement)
        self._gpus = placement.gpus
        if placement.one_gpu_each:
            self._nccl = dist.new_group(backend="nccl", timeout=_NO_TIMEOUT)
            self.name = "nccl"

    def form_groups(self, topology: Topology) -> None:
        if topology.group_size == 1:
            return
        self.evaluators, gpus = topology.training, [self._gpus[rank] for rank in topology.training if self._gpus]
        if len(set(gpus)) < len(gpus):
            raise UserError(
                f"{len(gpus)} ranks train on {len(set(gpus))} GPUs, and those of one worker need a GPU each",
                key="runtime.worker_ranks", remedy="start as many ranks as there are GPUs, and one more for the server",
            )  # fmt: skip
        for worker, ranks in enumerate(topology.workers):
            guest = [0] if worker == 0 else []
            # Torch names a group by how many there were, so every rank makes those of all workers.
            agreeing = dist.new_group([*guest, *ranks], backend="gloo", timeout=_NO_TIMEOUT)
            over = dist.new_group([*ranks], backend="nccl" if gpus else "gloo", timeout=_NO_TIMEOUT)
            if self.rank in (*guest, *ranks):
                self.group = TorchGroup(agreeing, over, ranks, self.rank)

    def close(self) -> None:
        self.barrier()
        dist.destroy_process_group()

    def _broadcast(self, tensor: Tensor) -> None:
        content = tensor.view(-1).view(torch.uint8)
        if self._in_a_tree(tensor):
            for ranks in self._levels:
                _pass_down(content, ranks, self.rank)
            return
        across, within = self._groups(tensor)
        if across:
            dist.broadcast(content, src=0, group=across)
        if within:
            dist.broadcast(content, src=self._leader, group=within)

    def _reduce_sum(self, tensor: Tensor) -> None:
        if self._in_a_tree(tensor):
            for ranks in reversed(self._levels):
                _pass_up(tensor, ranks, self.rank, torch.add)
            return
        across, within = self._groups(tensor)
        if within:
            dist.reduce(tensor, dst=self._leader, op=dist.ReduceOp.SUM, group=within)
        if across:
            dist.reduce(tensor, dst=0, op=dist.ReduceOp.SUM, group=across)

    def _all_reduce_max(self, tensor: Tensor) -> None:
        if self._in_a_tree(tensor):
            for ranks in reversed(self._levels):
                _pass_up(tensor, ranks, self.rank, torch.maximum)
            for ranks in self._levels:
                _pass_down(tensor, ranks, self.rank)
            return
        across, within = self._groups(tensor)
        if within:
            dist.reduce(tensor, dst=self._leader, op=dist.ReduceOp.MAX, group=within)
        if across:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=across)
        if within:
            dist.broadcast(tensor, src=self._leader, group=within)

    def _exchange(self, send: dict[int, Tensor], receive: dict[int, Tensor]) -> None:
        operations = [dist.P2POp(dist.irecv, buffer, peer, self._group(buffer)) for peer, buffer in receive.items()]
        operations += [dist.P2POp(dist.isend, buffer, peer, self._group(buffer)) for peer, buffer in send.items()]
        if operations:
            for work in dist.batch_isend_irecv(operations):
                work.wait()

    def _takes(self, tensor: Tensor) -> bool:
        return self._nccl is not None or not tensor.is_cuda

    def _group(self, tensor: Tensor) -> dist.ProcessGroup | None:
        return self._nccl if tensor.is_cuda else None

    def _in_a_tree(self, tensor: Tensor) -> bool:
        return self.world_size >= _TREE_RANKS and tensor.nbytes <= _TREE_BYTES and not tensor.is_cuda

    def _groups(self, tensor: Tensor) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
        """The group of the leaders, if this rank is one, and that of this node, if nodes have several ranks."""
        return (self._nccl, None) if tensor.is_cuda else (self._across, self._within)


class TorchGroup(Group):
    """Agrees over gloo, and gathers layers over gloo, or NCCL where the ranks have GPUs."""

    def __init__(self, agreeing: dist.ProcessGroup, over: dist.ProcessGroup, ranks: Sequence[int], rank: int) -> None:
        """agreeing: of `ranks` and their guest, if they have one; over: of `ranks`, who hold the layers."""
        super().__init__(len(ranks), ranks.index(rank) if rank in ranks else None)
        self._agreeing, self._over = agreeing, over
        self._speaker, self._speaks = ranks[0], rank == ranks[0]

    @property
    def process_group(self) -> dist.ProcessGroup:
        return self._over

    def gathered(self, tensor: Tensor) -> Tensor:
        of_all = tensor.new_empty(self.size * len(tensor))
        if len(tensor):
            with collective("gathering parts"):
                _all_gather(of_all, tensor, group=self._over)
        self._count(of_all.nbytes - tensor.nbytes)
        return of_all

    def reduced(self, tensor: Tensor) -> Tensor:
        mine = tensor.new_empty(len(tensor) // self.size)
        if len(mine):
            with collective("summing parts"):
                _reduce_scatter(mine, tensor, group=self._over)
        self._count(tensor.nbytes - mine.nbytes)
        return mine

    def add_up(self, tensor: Tensor) -> Tensor:
        with collective("summing over a worker"):
            dist.all_reduce(tensor, group=self._over)
        return tensor

    def _agree(self, number: int) -> Agreed:
        numbers = torch.tensor([number, number if self.is_guest else -1])
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self._agreeing)
        return Agreed(*numbers.tolist())

    def _send(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors if self._speaks else ():
            dist.send(tensor.detach().to("cpu").contiguous(), dst=0, group=self._agreeing)

    def _receive(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            dist.recv(tensor.detach(), src=self._speaker, group=self._agreeing)


def _pass_down(tensor: Tensor, ranks: Sequence[int], rank: int) -> None:
    """Copy the tensor of the first of `ranks` into those of the others, as `rank` among them."""
    index, distance = ranks.index(rank), 1 << (len(ranks) - 1).bit_length()
    while distance := distance >> 1:
        if index % (2 * distance) == distance:
            dist.recv(tensor, ranks[index - distance])
        elif index % (2 * distance) == 0 and index + distance < len(ranks):
            dist.send(tensor, ranks[index + distance])


def _pass_up(tensor: Tensor, ranks: Sequence[int], rank: int, combine: Callable[..., object]) -> None:
    """Combine the tensors of all `ranks` in that of the first, as `rank` among them; the others are undefined then."""
    index, distance = ranks.index(rank), 1
    while distance < len(ranks):
        if index % (2 * distance) == distance:
            dist.send(tensor, ranks[index - distance])
            return
        if index + distance < len(ranks):
            received = torch.empty_like(tensor)
            dist.recv(received, ranks[index + distance])
            combine(tensor, received, out=tensor)
        distance *= 2


def _subgroup(ranks: list[int]) -> dist.ProcessGroup:
    # Only its members make it: otherwise every rank would wait for every group.
    return dist.new_group(ranks, backend="gloo", timeout=_NO_TIMEOUT, use_local_synchronization=True)


def _address(launch: Launch) -> str:
    """The address at which other ranks reach this process."""
    if launch.single_node:
        return "127.0.0.1"
    return local_address_for(str(launch.master_addr))


def open_store(launch: Launch, limit_s: float) -> Store:
    """Open a store that only the processes of this start use, none of an earlier one and none of another run."""
    wait = datetime.timedelta(seconds=limit_s)
    address, port = str(launch.master_addr), int(launch.master_port or 0)
    agent = TCPStore(address, port, None, False, wait) if launch.agent_store else None
    start = f"fedhpc/{launch.launcher}/{launch.job}/{launch.world_size}"  # every rank can tell it by itself
    if launch.rank == 0:
        store = TCPStore("127.0.0.1", 0, None, True, wait, wait_for_workers=False)  # listens at all addresses
        nonce = secrets.token_hex(16)
        store.set("nonce", nonce)
        published = f"{_address(launch)} {store.port} {nonce}"
        if agent is not None:
            agent.set("fedhpc", published)
        else:
            rendezvous.announce(port, start, published)
        return store
    if agent is not None:
        return follow(lambda: agent.get("fedhpc").decode(), limit_s)
    published_at = rendezvous.ask(address, port, start, limit_s)
    return follow(lambda: published_at, limit_s)


def follow(published: Callable[[], str], limit_s: float) -> Store:
    """Connect to the store that rank 0 published, reading its address again until the store answers.

    After a restart the address may first be that of the dead rank 0: then nobody answers, or another program listens
    there now, which does not know the nonce.
    """
    deadline = time.monotonic() + limit_s
    while time.monotonic() < deadline:
        address, port, nonce = published().split()
        with contextlib.suppress(OSError, dist.DistStoreError, dist.DistNetworkError):
            # A TCPStore that is refused, or gives up waiting, writes a page of C++ frames to stderr; a socket does not.
            socket.create_connection((address, int(port)), timeout=1).close()
            store = TCPStore(address, int(port), None, False, _ANSWER)
            if store.get("nonce").decode() == nonce:
                store.set_timeout(datetime.timedelta(seconds=limit_s))
                return store
        time.sleep(0.1)
    raise UserError(f"rank 0's store did not answer within {limit_s:.0f} s: did rank 0 start?")


def _node(launch: Launch) -> str:
    """A name of this machine: equal for all ranks on it, and different on other machines."""
    return _address(launch)


def arrive(store: Store, launch: Launch, limit_s: float) -> list[list[int]]:
    """Wait until every rank has arrived; returns the ranks of each node. UserError where a rank arrives twice."""
    keys = [f"here/{rank}" for rank in range(launch.world_size)]
    if store.add(f"arrived/{launch.rank}", 1) > 1:
        raise UserError(
            f"another rank {launch.rank} is here already, of another run at the same MASTER_ADDR and MASTER_PORT",
            remedy="export a free port on all hosts",
        )
    store.set(keys[launch.rank], _node(launch))
    try:
        store.wait(keys, datetime.timedelta(seconds=limit_s))
    except dist.DistStoreError as error:
        missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
        raise UserError(
            f"ranks {missing} of {launch.world_size} did not arrive within {limit_s:.0f} s: "
            "check that all of them were started"
        ) from error
    nodes: dict[bytes, list[int]] = {}
    for rank, node in enumerate(store.multi_get(keys)):
        nodes.setdefault(node, []).append(rank)
    return list(nodes.values())
