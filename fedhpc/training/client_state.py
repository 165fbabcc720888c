"""What single clients keep from round to round, out of core: nothing is in memory but what a block trains.

One file per client and round in the run directory, clients/<client>/<round>.safetensors, written by whichever rank
trained the client, so state is never keyed by rank. It is written before the checkpoint of that round, and the
checkpoint names the version of every client that counts (`ServerState.versions`): a file of a later round that was lost
is not read and is overwritten, a file that is named and missing is an error, and a client that was never sampled has
none. Older versions go when a checkpoint that no longer names them is on disk.

Who keeps something says the names of its tensors (`Keeper`); the file of a client has those of all of them:

- modes centralized and local, `memory.<buffer>` and `memory.count`: its optimizer's memory (`fedhpc.training.memory`)
- mode local and distillation, `theta`: its own payload (`OwnPayload`)
- client.scaffold, `control`: its control variate (`fedhpc.training.rules.scaffold`)
- personalization.parts, `personal.<tensor>`: its own part of the payload (`fedhpc.approaches.averaging.personal`)
- transforms, their own names (`fedhpc.updates.transforms`)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np

from fedhpc.errors import UserError
from fedhpc.lazy import Tensor, torch
from fedhpc.results.files import DAMAGE, load_tensors, save_tensors

PERSONAL = "personal"  # a client's own part of the payload, in its file


class Keeper(Protocol):
    """Something of which every client keeps tensors from round to round."""

    @property
    def keeps(self) -> Sequence[str]:
        """The names of the tensors in the client's file; empty where nothing is kept."""

    def initial(self, name: str) -> Tensor:
        """The tensor `name` of a client that was never sampled, on the CPU."""


@dataclass(frozen=True)
class OwnPayload:
    """Keeps the payload of a client that never gets another's."""

    first: Callable[[], Tensor]  # gives the payload before any training (P,)

    keeps: ClassVar[tuple[str, ...]] = ("theta",)

    def initial(self, name: str) -> Tensor:
        return self.first()

    def of_clients(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The payloads (K, P) among what K clients keep."""
        return tensors["theta"]

    def tensors(self, payloads: Tensor) -> dict[str, Tensor]:
        """The inverse of `of_clients`."""
        return {"theta": payloads}


def read(
    run_dir: Path, clients: Sequence[int], versions: Mapping[int, int], keepers: Iterable[Keeper]
) -> dict[str, Tensor]:
    """What each of K clients keeps in its version (0, or not named: it was never sampled): name -> (K, ...)."""
    owners = {name: keeper for keeper in keepers for name in keeper.keeps}
    files = [
        _by_name(load(run_dir, client, versions[client]), owners) if versions.get(client) else {} for client in clients
    ]
    return {
        name: torch.stack([tensors[name] if name in tensors else keeper.initial(name) for tensors in files])
        for name, keeper in owners.items()
    }


def _by_name(tensors: dict[str, Tensor], owners: Mapping[str, Keeper]) -> dict[str, Tensor]:
    """A client's tensors; files of older versions have the personal part as one flat tensor, which is cut here."""
    if PERSONAL not in tensors:
        return tensors
    initial = [(name, keeper.initial(name)) for name, keeper in owners.items() if name.startswith(f"{PERSONAL}.")]
    parts = tensors[PERSONAL].split([tensor.numel() for _, tensor in initial])
    return tensors | {name: part.view(first.shape) for (name, first), part in zip(initial, parts, strict=True)}


def write(
    run_dir: Path, clients: Sequence[int], round_: int, tensors: Mapping[str, Tensor], chosen: np.ndarray
) -> None:
    """Write what the chosen ones (bool (K,)) of the clients keep after `round_`: name -> (K, ...).

    No file where nothing is kept. UserError where the disk is full.
    """
    for i, client in enumerate(clients):
        if tensors and chosen[i]:
            save(run_dir, client, round_, {name: tensor[i].contiguous() for name, tensor in tensors.items()})


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


def prune(run_dir: Path, client: int, version: int) -> None:
    """Remove the versions before `version`, which the checkpoint on disk names."""
    for file in (run_dir / "clients" / str(client)).glob("*.safetensors"):
        if file.stem.isdigit() and int(file.stem) < version:
            file.unlink(missing_ok=True)


def _path(run_dir: Path, client: int, round_: int) -> Path:
    return run_dir / "clients" / str(client) / f"{round_}.safetensors"
