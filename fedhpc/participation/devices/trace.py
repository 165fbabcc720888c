"""Devices from a file: a row with speed, links and availability for each client.

The columns are those of `Device`, and `client`: the client's number, or its name where the partition is natural.
`availability` may be missing: 1. Without a column `client` each client has one of the rows, drawn by seed, as
simulations with traces of measured phones do (FedScale, Lai et al. 2022, arXiv 2105.11367).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import Field

from fedhpc.data.files import read_file
from fedhpc.data.population import Population
from fedhpc.errors import UserError
from fedhpc.participation.devices.base import Device, Devices, Timed
from fedhpc.registry import Open
from fedhpc.rng import generator

_KEY = "devices.file"


class Trace(Devices):
    """Each client has the device of its row in a file."""

    class Options(Timed):
        file: str = Field(
            "devices.csv",
            min_length=1,
            description="CSV or JSONL: client (or none: rows are drawn), tokens_per_s, down_bytes_per_s, "
            "up_bytes_per_s, availability",
        )

    def __init__(self, options: Open, seed: int, population: Population) -> None:
        super().__init__(options, seed, population)
        path = Path(options.file)
        if not path.is_file():
            raise UserError(f"there is no file '{path}' in {Path.cwd()}", key=_KEY)
        rows = list(read_file(path))
        if not rows:
            raise UserError(f"{path} has no rows", key=_KEY)
        self._devices = [_device(row, location) for location, row in rows]
        self._row_of: dict[int, int] | None = None
        if "client" in rows[0][1]:
            self._row_of = self._rows_of_clients([(location, _cell(row, "client", location)) for location, row in rows])
        self.fingerprint = hashlib.sha256(path.read_bytes()).hexdigest()[:16]

    def of(self, client: int) -> Device:
        if self._row_of is not None:
            return self._devices[self._row_of[client]]
        return self._devices[int(generator(self.seed, "device", client).integers(len(self._devices)))]

    @property
    def lowest_availability(self) -> float:
        return min(device.availability for device in self._devices)

    def _rows_of_clients(self, cells: list[tuple[str, Any]]) -> dict[int, int]:
        """Client -> its row. UserError where a client has none, or several."""
        population, row_of = self.population, dict[str, int]()
        for number, (location, cell) in enumerate(cells):
            if row_of.setdefault(str(cell), number) != number:
                raise UserError(f"{location}: client {cell} has two rows", key=_KEY)
        names = population.names or [str(client) for client in range(population.num_clients)]
        missing = next((client for client, name in enumerate(names) if name not in row_of), None)
        if missing is not None:
            raise UserError(
                f"{self.options.file} has no row for {population.title(missing)}",
                key=_KEY,
                remedy="add one, or take the column client out: then each client has a row that is drawn by seed",
            )
        return {client: row_of[name] for client, name in enumerate(names)}


def _device(row: Mapping[str, Any], location: str) -> Device:
    cells = {name: _cell(row, name, location) for name in Device._fields if name in row or name != "availability"}
    numbers = {"availability": 1.0}
    for name, cell in cells.items():
        try:
            numbers[name] = float(cell)
        except (TypeError, ValueError):
            raise UserError(f"{location}: {name} must be a number, got {cell!r}", key=_KEY) from None
        if not 0 < numbers[name] < math.inf or (name == "availability" and numbers[name] > 1):
            most = " and at most 1" if name == "availability" else ""
            raise UserError(f"{location}: {name} must be above 0{most}, got {cell!r}", key=_KEY)
    return Device(**numbers)


def _cell(row: Mapping[str, Any], name: str, location: str) -> Any:
    if name not in row:
        raise UserError(f"{location}: there is no column {name}", key=_KEY)
    return row[name]
