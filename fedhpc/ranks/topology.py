"""Says which ranks form each worker, and which rank speaks for it.

A worker is a group of ranks that hold one copy of the base between them: one rank, or several where the base is
sharded (runtime.worker_ranks). Workers are counted from 0, and the first rank of a group speaks for it: a worker sends
what it has once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from fedhpc.errors import UserError


@dataclass(frozen=True)
class Topology:
    """The ranks of every worker: `workers[i]` are those of worker i, in ascending order."""

    workers: tuple[tuple[int, ...], ...]
    _worker_of: dict[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """ValueError where a worker has no rank, or two share one."""
        worker_of = {rank: worker for worker, ranks in enumerate(self.workers) for rank in ranks}
        if not all(self.workers) or len(worker_of) != sum(map(len, self.workers)):
            raise ValueError(f"a rank belongs to one worker, and a worker has ranks: {self.workers}")
        object.__setattr__(self, "_worker_of", worker_of)

    @classmethod
    def of(cls, world_size: int, group_size: int = 1, nodes: Sequence[Sequence[int]] = ()) -> Topology:
        """The topology of `world_size` ranks: rank 0 is the server, every `group_size` others are a worker.

        nodes: the ranks of each machine; none where they are not known. The ranks of a worker are on one machine where
        they can be. A single rank is server and worker. Of 5 ranks with group_size 2, workers 0 and 1 are the ranks
        (1, 2) and (3, 4). UserError where the others do not divide into such groups.
        """
        ranks = range(1, world_size) if world_size > 1 else range(1)
        if len(ranks) % group_size:
            enough = [1 + group_size * workers for workers in (1, 2, 3)]
            dividing = [str(size) for size in range(1, len(ranks) + 1) if len(ranks) % size == 0]
            these = f"{world_size} ranks are a server and {world_size - 1} others, which do not divide into workers"
            if world_size == 1:
                these = "one rank alone is no worker"
            raise UserError(
                f"{these} of {group_size}", key="runtime.worker_ranks",
                remedy=f"start {enough[0]}, {enough[1]}, {enough[2]}, ... ranks, or give {' or '.join(dividing)}",
            )  # fmt: skip
        there = [[rank for rank in node if rank in ranks] for node in nodes or [ranks]]
        fitting = [len(node) - len(node) % group_size for node in there]
        together = [rank for node, count in zip(there, fitting, strict=True) for rank in node[:count]]
        apart = [rank for node, count in zip(there, fitting, strict=True) for rank in node[count:]]
        ordered = [*together, *apart]
        return cls(tuple(sorted(tuple(ordered[i : i + group_size]) for i in range(0, len(ordered), group_size))))

    @property
    def num_workers(self) -> int:
        return len(self.workers)

    @property
    def group_size(self) -> int:
        """G, the ranks of each worker."""
        return len(self.workers[0])

    @property
    def training(self) -> tuple[int, ...]:
        """The ranks of all workers."""
        return tuple(rank for ranks in self.workers for rank in ranks)

    def rank_of(self, worker: int, member: int) -> int:
        """The rank that is member `member` (from 0) of a worker."""
        return self.workers[worker][member]

    def worker_of(self, rank: int) -> int | None:
        """The worker that `rank` belongs to; None for a server that trains nothing."""
        return self._worker_of.get(rank)

    def speaker(self, worker: int) -> int:
        """The rank that speaks for `worker`."""
        return self.workers[worker][0]

    def spread(self, nodes: Sequence[Sequence[int]]) -> list[tuple[int, ...]]:
        """The workers whose ranks are on several machines. nodes: the ranks of each machine; none: not known."""
        return [ranks for ranks in self.workers if nodes and not any(set(ranks) <= set(node) for node in nodes)]

    def is_speaker(self, rank: int) -> bool:
        """Whether `rank` speaks for its worker."""
        worker = self.worker_of(rank)
        return worker is not None and self.speaker(worker) == rank
