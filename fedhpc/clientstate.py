"""What single clients keep from round to round (modes centralized and local), out of core.

One file per client and round in the run directory, clients/<client>/<round>.safetensors, written by whichever rank
trained the client, before the checkpoint of that round; so state is never keyed by rank, and a run that resumes finds
exactly the version that its checkpoint means.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from fedhpc.errors import UserError
from fedhpc.rundir import atomic_write
from fedhpc.training.block import Memory

if TYPE_CHECKING:
    from torch import Tensor


def save(run_dir: Path, client: int, round_: int, memory: Memory, theta: Tensor, keep_from: int) -> None:
    """Write the client's state after `round_`: optimizer memory and own payload theta (P,).

    Versions older than round `keep_from`, the last one with a checkpoint, are removed.
    """
    from safetensors.torch import save as to_bytes

    folder = run_dir / "clients" / str(client)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"memory.{name}": buffer for name, buffer in memory.buffers.items()}
    content = to_bytes({"theta": theta.contiguous(), **tensors}, metadata={"count": str(memory.count)})
    atomic_write(folder / f"{round_}.safetensors", content)
    for old in folder.glob("*.safetensors"):
        if old.stem.isdigit() and int(old.stem) < keep_from:
            old.unlink(missing_ok=True)


def load(run_dir: Path, client: int, round_: int) -> tuple[Memory, Tensor]:
    """The client's state after `round_`. UserError where the file is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    path = run_dir / "clients" / str(client) / f"{round_}.safetensors"
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  not a mapping
            count = int(file.metadata()["count"])
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path}: the state of client {client} cannot be read ({error}); put it back, or start over with --fresh"
        ) from error
    theta = tensors.pop("theta")
    return Memory({name.removeprefix("memory."): t for name, t in tensors.items()}, count), theta


def fresh(buffers: list[str], size: int, dtype: torch.dtype) -> Memory:
    """The memory of a client that has not trained: zero buffers (T,)."""
    return Memory({name: torch.zeros(size, dtype=dtype) for name in buffers}, 0)
