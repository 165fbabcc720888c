"""Says which ranks form each worker, and which rank speaks for it.

A worker is a group of ranks that hold one copy of the base between them: one rank today, several where a base is
sharded. Workers are counted from 0, and the first rank of a group speaks for it: a worker sends what it has once.
"""

from __future__ import annotations

from dataclasses import dataclass, field


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
    def of(cls, world_size: int, group_size: int = 1) -> Topology:
        """The topology of `world_size` ranks: rank 0 is the server, every `group_size` others are a worker.

        A single rank is server and worker. Of 5 ranks with group_size 2, workers 0 and 1 are the ranks (1, 2) and
        (3, 4). ValueError where the others do not divide into such groups.
        """
        ranks = range(1, world_size) if world_size > 1 else range(1)
        if group_size < 1 or len(ranks) % group_size:
            raise ValueError(f"{len(ranks)} ranks do not divide into workers of {group_size}")
        return cls(tuple(tuple(ranks[i : i + group_size]) for i in range(0, len(ranks), group_size)))

    @property
    def num_workers(self) -> int:
        return len(self.workers)

    def worker_of(self, rank: int) -> int | None:
        """The worker that `rank` belongs to; None for a server that trains nothing."""
        return self._worker_of.get(rank)

    def speaker(self, worker: int) -> int:
        """The rank that speaks for `worker`."""
        return self.workers[worker][0]

    def is_speaker(self, rank: int) -> bool:
        """Whether `rank` speaks for its worker."""
        worker = self.worker_of(rank)
        return worker is not None and self.speaker(worker) == rank
