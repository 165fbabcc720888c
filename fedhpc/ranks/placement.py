"""Decides which GPU every rank works on: a pure function of the GPUs that the ranks see, the same on every rank.

The server computes little, so workers choose first, one GPU each where there are enough. The server takes a GPU that is
left over; if there is none, it works on the CPU, where it takes no memory and no time from a worker.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from fedhpc.errors import UserError

Server = Literal["auto", "own", "shared", "cpu"]


@dataclass(frozen=True)
class Placement:
    """The GPU of every rank: its unique id, or "" for the CPU. Without any GPU, `gpus` is empty."""

    gpus: tuple[str, ...] = ()
    seen: int = 0  # how many GPUs these ranks see in all

    @property
    def trains_on(self) -> Literal["cpu", "cuda"]:
        """The type of device that all workers train on."""
        return "cuda" if any(self.gpus) else "cpu"

    @property
    def one_gpu_each(self) -> bool:
        """Whether every rank has a GPU of its own, as NCCL demands."""
        return len(self.gpus) > 1 and all(self.gpus) and len(set(self.gpus)) == len(self.gpus)

    def evaluators(self, world_size: int) -> tuple[int, ...]:
        """The ranks that share an evaluation: all but a server on the CPU beside workers on GPUs, which would crawl."""
        return tuple(r for r in range(world_size) if self.trains_on == "cpu" or self.gpus[r])

    def describe(self) -> str:
        """The placement in words: "cpu", or something like "2 GPUs, the server on the CPU"."""
        if self.trains_on == "cpu":
            return "cpu"
        if len(self.gpus) == 1:
            return "1 GPU" + _idle(self.seen - 1)
        server, workers = self.gpus[0], self.gpus[1:]
        used = len(set(workers))
        server_text = "the server on the CPU" if not server else "the server on a GPU of its own"
        if server in workers:
            server_text = "the server sharing one of them"
        line = f"{used} {'GPU' if used == 1 else 'GPUs'}, {server_text}"
        if used < len(workers):
            line += f" ({len(workers)} workers share them: {used + 1} ranks would be one each)"
        return line + _idle(self.seen - len(set(self.gpus) - {""}))


def _idle(count: int) -> str:
    return f" ({count} more {'GPU is' if count == 1 else 'GPUs are'} not used: start more ranks)" if count else ""


def assign_gpus(
    visible: Sequence[Sequence[str]], server: Server, quantized: bool = False, server_trains: bool = False
) -> Placement:
    """Assign a GPU, or the CPU, to every rank. UserError where that is impossible.

    visible: for each rank, the unique ids of the GPUs that it may use, in its own order; empty for a rank that is to
    use the CPU. server: where rank 0 works if it is not alone: "own" is a GPU without a worker, "shared" a GPU that a
    worker may use too, "cpu" the CPU. "auto" is "own" where a GPU is left over, otherwise "cpu", or "shared" where the
    base is `quantized`, so that a CPU rounds otherwise, or where the server trains a model too (`server_trains`).
    """
    world = len(visible)
    workers = range(1, world) if world > 1 else range(1)
    without = [r for r in workers if not visible[r]]
    if len(without) == len(workers):
        if server in ("own", "shared"):
            raise UserError(f"runtime.server: {server} needs GPUs, and the workers have none; use auto")
        return Placement()
    if without:
        raise UserError(
            f"ranks {without} see no GPU, the other workers do: start ranks only where there are GPUs, or set "
            "runtime.device=cpu"
        )
    used: Counter[str] = Counter()
    gpus = [""] * world
    if server == "own" and world > 1:
        if not visible[0]:
            raise UserError("runtime.server: own, but rank 0 sees no GPU; use auto")
        gpus[0] = visible[0][-1]
        crowded = [r for r in workers if set(visible[r]) == {gpus[0]}]
        if crowded:
            raise UserError(
                f"runtime.server: own, but ranks {crowded} see no other GPU than the server's; use auto, or bind GPUs "
                "to ranks in another way"
            )
    for r in workers:
        free = [gpu for gpu in visible[r] if gpu != gpus[0]] if gpus[0] else list(visible[r])
        gpus[r] = min(free, key=lambda gpu: used[gpu])  # the first of the least used ones
        used[gpus[r]] += 1
    if server in ("auto", "shared") and world > 1:
        left = sorted(visible[0], key=lambda gpu: used[gpu])
        if server == "shared" and not left:
            raise UserError("runtime.server: shared, but rank 0 sees no GPU; use auto")
        if left and (server == "shared" or quantized or server_trains or not used[left[0]]):
            gpus[0] = left[0]
    if quantized and not gpus[0]:
        raise UserError(
            "runtime.server: beside workers on GPUs a quantised base (model.quantize) needs one for rank 0: use shared"
        )
    return Placement(tuple(gpus), len({gpu for ids in visible for gpu in ids}))
