"""Which GPU every rank works on: a pure function of the GPUs that the ranks see, the same on all of them.

The server computes little, so workers choose first, one GPU each where there are enough. What is left over the server
takes; else it stays on the CPU, where it takes no memory and no time from a worker.
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
    """The GPU of every rank by its unique id, "" on the CPU; empty where no rank has one."""

    gpus: tuple[str, ...] = ()
    seen: int = 0  # GPUs that there are for these ranks

    @property
    def trains_on(self) -> Literal["cpu", "cuda"]:
        """The kind of device of the workers, all the same."""
        return "cuda" if any(self.gpus) else "cpu"

    @property
    def apart(self) -> bool:
        """Whether every rank has a GPU of its own, as NCCL demands."""
        return len(self.gpus) > 1 and all(self.gpus) and len(set(self.gpus)) == len(self.gpus)

    def evaluators(self, world_size: int) -> tuple[int, ...]:
        """The ranks that share an evaluation: all but a server on the CPU beside workers on GPUs, which would crawl."""
        return tuple(r for r in range(world_size) if self.trains_on == "cpu" or self.gpus[r])

    def describe(self) -> str:
        """cpu, or which ranks are where."""
        if self.trains_on == "cpu":
            return "cpu"
        if len(self.gpus) == 1:
            return "1 GPU" + _idle(self.seen - 1)
        server, workers = self.gpus[0], self.gpus[1:]
        used = len(set(workers))
        where = "the server on the CPU" if not server else "the server on a GPU of its own"
        if server in workers:
            where = "the server sharing one of them"
        line = f"{used} {'GPU' if used == 1 else 'GPUs'}, {where}"
        if used < len(workers):
            line += f" ({len(workers)} workers share them: {used + 1} ranks would be one each)"
        return line + _idle(self.seen - len(set(self.gpus) - {""}))


def _idle(count: int) -> str:
    return f" ({count} more {'GPU is' if count == 1 else 'GPUs are'} not used: start more ranks)" if count else ""


def place(
    visible: Sequence[Sequence[str]], server: Server, quantized: bool = False, server_trains: bool = False
) -> Placement:
    """visible[r]: unique ids of the GPUs that rank r may use, in its own order; none for one that is to use the CPU.

    server: where rank 0 goes beside workers. own: a GPU without a worker; shared: a GPU, a worker's if need be; cpu;
    auto: own where a GPU is left over, else cpu, or shared where the base is `quantized`, which no CPU can hold, or
    `server_trains` a model of its own.
    UserError where that cannot be.
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
        gpus[r] = min(free, key=lambda gpu: used[gpu])  # the first of those least used
        used[gpus[r]] += 1
    if server in ("auto", "shared") and world > 1:
        left = sorted(visible[0], key=lambda gpu: used[gpu])
        if server == "shared" and not left:
            raise UserError("runtime.server: shared, but rank 0 sees no GPU; use auto")
        if left and (server == "shared" or quantized or server_trains or not used[left[0]]):
            gpus[0] = left[0]
    if quantized and not gpus[0]:
        raise UserError("runtime.server: a quantised base (model.quantize) needs a GPU for rank 0 too: use shared")
    return Placement(tuple(gpus), len({gpu for ids in visible for gpu in ids}))
