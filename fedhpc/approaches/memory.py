"""Whether the memory is enough: what a rank will hold, by how many ranks hold the layers of the base between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fedhpc import registry
from fedhpc.config import Config
from fedhpc.errors import UserError
from fedhpc.models.footprint import Footprint, footprint
from fedhpc.ranks.devices import memory_of
from fedhpc.ranks.placement import Placement

#: The sizes of groups that --check looks at.
WORKER_RANKS = (1, 2, 4, 8)
#: The share of the memory that `runtime.worker_ranks: auto` gives to the base; the rest is for training.
_FOR_BASE = 0.75


@dataclass(frozen=True)
class Room:
    """What memory the ranks of all workers have, before any weights are read."""

    device: str  # the type of device that they train on
    there: int  # bytes of one device, the smallest
    sharing: int  # ranks that share one, the most

    @classmethod
    def of(
        cls, placement: Placement, training: Sequence[int], nodes: Sequence[Sequence[int]], there: Sequence[int]
    ) -> Room:
        """training: the ranks of all workers. nodes: the ranks of each machine; none: not known. there: by rank."""
        if placement.trains_on == "cuda":
            sharing = max(Counter(placement.gpus[rank] for rank in training).values())
        else:
            sharing = max(map(len, nodes), default=len(there))
        return cls(placement.trains_on, min(there[rank] for rank in training), sharing)

    def taken(self, weights: Footprint, worker_ranks: int) -> int:
        """Bytes of the base on one device."""
        if self.device == "cuda":
            return weights.on_rank(worker_ranks) * self.sharing
        return weights.on_machine(worker_ranks, self.sharing)


def fewest(weights: Footprint, sizes: Sequence[int], room: Room) -> tuple[int, str]:
    """The smallest of `sizes`, ranks of a worker, that leaves room for training, and why in a few words.

    Where none does it is that of which the base takes the least.
    """
    leaving = (size for size in sizes if room.taken(weights, size) <= _FOR_BASE * room.there)
    chosen = next(leaving, min(sizes, key=lambda size: room.taken(weights, size)))
    shared = f"each of {room.sharing} ranks" if room.sharing > 1 else "a rank"
    return chosen, f"the base takes {_size(weights.on_rank(chosen))} of {shared}, there are {_size(room.there)}"


def require_room(config: Config, device: torch.device, worker_ranks: int) -> Footprint:
    """The footprint of the base. UserError where it takes more memory than `device` has. Reads no weights."""
    weights, there = footprint(config.model, device.type), memory_of(device)
    needed = weights.on_rank(worker_ranks)
    if needed > there:
        raise UserError(
            f"'{config.model.name}' needs {_gib(needed)} a rank in {config.model.dtype}, there are "
            f"{_gib(there)}", key="model.name", remedy=_remedy(config, weights, there, device.type),
        )  # fmt: skip
    return weights


def _remedy(config: Config, weights: Footprint, there: int, device_type: str) -> str:
    fitting = next((ranks for ranks in WORKER_RANKS if weights.on_rank(ranks) <= there), None)
    shares = registry.approach(config.method.name).spreads(config)  # of the others only full can be divided
    offloads = shares and device_type == "cuda" and not weights.few_bits
    if offloads and replace(weights, offloaded=True).on_rank(1) <= there:
        return "model.offload: cpu fits" + ("" if fitting is None else f", and so does runtime.worker_ranks: {fitting}")
    if fitting is None or weights.few_bits:
        return "choose a smaller base, or one in fewer bits (model.dtype, model.quantize)"
    apart = " with one rank on each machine" if device_type == "cpu" else ""
    if not shares:
        return f"runtime.worker_ranks: {fitting}{apart} fits, with method.name full; else choose a smaller base"
    if config.runtime.worker_ranks == "auto":
        return f"start {1 + fitting} ranks or more{apart}: a server, and workers of {fitting}"
    return f"runtime.worker_ranks: {fitting}{apart} fits"


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


@dataclass(frozen=True)
class Held:
    """Bytes that a rank holds where it holds the most, beside the base."""

    block: int  # what the clients of the largest block train: parameters, gradients, the optimizer's buffers
    updates: int  # of all clients of the rank
    exchange: int  # the model as it comes down, and the sum of the updates on its way
    server: int  # what rank 0 has more: the state that rounds move, and the aggregate
    program: int  # before the base was loaded
    activations: int | None  # all else that a step of the largest block took; None: none was taken
    model: int = 0  # of the exchange, the model as it comes down
    together: bool = False  # whether the ranks of a worker, where it has several, train each client together

    @property
    def total(self) -> int:
        """On a worker's rank, without the base."""
        return self.block + self.updates + self.exchange + self.program + (self.activations or 0)

    def of(self, ranks: int, weights: Footprint) -> Held:
        """The same of one of the ranks of a worker.

        Of those that train together each has a part of what is trained and of the model, beside the base's own weights,
        and some of the rows. Gradients come whole, of a layer and of what is outside the layers: once as they are
        computed, once as they are sent.
        """
        if ranks == 1 or not self.together:
            return self
        activations = self.activations
        if activations is not None:
            activations = -(-activations // ranks) + 2 * (weights.outside + weights.largest_layer)
        return replace(
            self,
            block=-(-(self.block + weights.total) // ranks),
            exchange=self.exchange - self.model + -(-self.model // ranks),
            activations=activations,
        )


def table(
    weights: Footprint, held: Held, sizes: Sequence[int], alone: bool, there: int | None, on_cpu: bool
) -> list[str]:
    """Lines of --check: what a rank holds in MiB, by each of the `sizes` of `runtime.worker_ranks`.

    alone: whether rank 0 is a worker too. there: bytes of the GPU's memory, or of the machine's; None: not known here.
    """
    columns = ["worker_ranks", "base", "block", "activations", "updates", "exchange", "program", "a rank", "server"]
    rows = [[*columns, "ranks that fit" if on_cpu else "fits"]]
    for ranks in sizes:
        base, program = weights.on_rank(ranks), held.program
        of_server = weights.outside + weights.largest_layer if ranks > 1 else base  # it has a layer at a time
        server = held.exchange + held.server + program + of_server
        of_rank = held.of(ranks, weights)
        rank = base + of_rank.total + (held.server if alone else 0)
        parts = [base, of_rank.block, of_rank.activations, of_rank.updates, of_rank.exchange, program, rank]
        rows.append([str(ranks), *map(_mib, parts), "-" if alone else _mib(server), _fits(rank, there, on_cpu)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    unknown = ", without activations" if held.activations is None else ""
    of = "" if there is None else f", of {_mib(there)} of {'this machine' if on_cpu else 'the GPU'}"
    return [
        f"memory in MiB{of}, by runtime.worker_ranks{unknown}:",
        *(_row(row, widths) for row in rows),
    ]


def _fits(rank: int, there: int | None, on_cpu: bool) -> str:
    """How many ranks of `rank` bytes the machine has room for, or whether the GPU has it for one."""
    if there is None:
        return "-"
    return f"{there // max(rank, 1):,}" if on_cpu else ("yes" if rank <= there else "no")


def _row(cells: Sequence[str], widths: Sequence[int]) -> str:
    return "  ".join(cell.rjust(width) for cell, width in zip(cells, widths, strict=True))


def _size(size: float) -> str:
    return _gib(size) if size >= 2**30 else f"{size / 2**20:,.1f} MiB"


def _mib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**20:,.1f}"
