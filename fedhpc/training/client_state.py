"""What single clients keep from round to round, out of core: nothing is in memory but what a block trains.

One file per client and round in the run directory, clients/<client>/<round>.safetensors, written by whichever rank
trained the client, so state is never keyed by rank. It is written before the checkpoint of that round, and the
checkpoint names the version of every client that counts (`Server.versions`): a file of a later round that was lost is
not read and is overwritten, a file that is named and missing is an error, and a client that was never sampled has none.
Older versions go when a checkpoint that no longer names them is on disk.

- modes centralized and local: its optimizer's `memory.<buffer>` and `memory.count`; in local `theta`, its payload.
- client.scaffold: `control`, its control variate.
- personalization.parts: `personal`, its own part of the payload.
- transforms that keep something: `transforms.<position>.<name>` (fedhpc.updates.pipeline).
- distillation: `theta`, its own payload, of its group's method.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from fedhpc.errors import UserError
from fedhpc.results.files import DAMAGE, load_tensors, save_tensors
from fedhpc.training.block import Memory


def save(run_dir: Path, client: int, round_: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the client's state after `round_`. UserError where the disk is full."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    save_tensors(_path(run_dir, client, round_), arrays, {"client": client, "round": round_})


def load(run_dir: Path, client: int, version: int) -> dict[str, Tensor]:
    """The client's state after round `version`. UserError where the file is missing or a bit of it differs."""
    path = _path(run_dir, client, version)
    try:
        arrays, meta = load_tensors(path)
        if meta != {"client": client, "round": version}:
            raise ValueError(f"it is of client {meta['client']} in round {meta['round']}")
    except DAMAGE as error:
        raise UserError(
            f"{path}: the state of client {client} cannot be read ({error}); put it back, or start over with --fresh"
        ) from error
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def load_all(run_dir: Path, clients: Sequence[int], versions: Mapping[int, int]) -> list[dict[str, Tensor]]:
    """Each client's state in its version; empty for a client that has none (version 0, or not named)."""
    return [load(run_dir, client, versions[client]) if versions.get(client) else {} for client in clients]


def prune(run_dir: Path, client: int, version: int) -> None:
    """Remove the versions before `version`, which the checkpoint on disk names."""
    for file in (run_dir / "clients" / str(client)).glob("*.safetensors"):
        if file.stem.isdigit() and int(file.stem) < version:
            file.unlink(missing_ok=True)


def pack(memory: Memory) -> dict[str, Tensor]:
    """An optimizer's memory as tensors of a file."""
    return {f"memory.{name}": t for name, t in memory.buffers.items()} | {"memory.count": torch.tensor(memory.count)}


def unpack(tensors: Mapping[str, Tensor]) -> Memory:
    """The inverse of `pack`; other tensors are left out."""
    buffers = {name.removeprefix("memory."): t for name, t in tensors.items() if name.startswith("memory.")}
    count = int(buffers.pop("count"))
    return Memory(buffers, count)


def _path(run_dir: Path, client: int, round_: int) -> Path:
    return run_dir / "clients" / str(client) / f"{round_}.safetensors"
