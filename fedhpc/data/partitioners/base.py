"""A partitioner says which training examples each client holds.

Most divide the examples among the clients (`Assignment`); `virtual` has clients draw theirs when asked (`Draws`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from pydantic import Field

from fedhpc.errors import UserError
from fedhpc.registry import Section
from fedhpc.rng import generator

Int64 = npt.NDArray[np.int64]
Int32 = npt.NDArray[np.int32]


class Assignment(NamedTuple):
    """Client i holds the examples indices[offsets[i]:offsets[i + 1]], in ascending order."""

    indices: Int64  # [num_examples]
    offsets: Int64  # [N + 1]


@dataclass(frozen=True)
class Draws:
    """Each of N clients draws `size` examples when asked for, ascending; clients may overlap."""

    num_clients: int
    size: int
    draw: Callable[[int], Int64]  # client -> int64 [size]
    draw_many: Callable[[Sequence[int]], list[Int64]] | None = None  # the same of several clients, where that is faster


class Rows(Protocol):
    """What a partitioner sees of the training examples: how many they are, and their labels and owners."""

    def __len__(self) -> int: ...
    @property
    def labels(self) -> Int32 | None: ...  # [n]; the class of each, where data.label is given
    @property
    def owners(self) -> Int32 | None: ...  # [n]; positions in owner_names, where data.client is given
    @property
    def owner_names(self) -> list[str]: ...


class Limited(Section):
    """Options of every partitioner that divides the examples."""

    max_examples: int | None = Field(None, ge=1, description="most examples of a client, a seeded sample; default all")


class Clients(Limited):
    """Options of every partitioner that divides the examples among a given number of clients."""

    num_clients: int = Field(20, ge=1, description="number of clients (N)")
    min_examples: int = Field(1, ge=1, description="training examples that every client has at least")


class Partitioner(ABC):
    """Says which training examples each client holds. A file of this folder has one class derived from this."""

    Options: ClassVar[type[Section]] = Clients

    #: Whether it needs the examples' labels (data.label) or owners (data.client).
    needs_labels: ClassVar[bool] = False
    needs_owners: ClassVar[bool] = False

    def __init__(self, options: Any, seed: int) -> None:
        self.options, self.seed = options, seed

    @abstractmethod
    def partition(self, rows: Rows) -> Assignment | Draws:
        """Every example to exactly one client, or a draw for each client.

        The same for the same rows, options and seed. `max_examples` of an assignment is applied by the caller.
        UserError where the examples do not suffice.
        """

    def client_names(self, rows: Rows) -> list[str] | None:
        """What the clients are called, where they have names."""
        return None


def given(ids: Int32 | None) -> Int32:
    """The labels or owners that a partitioner has said it needs."""
    if ids is None:
        raise ValueError("these rows have no labels or owners; needs_labels and needs_owners say what is needed")
    return ids


def grouped(client_of: npt.NDArray[np.signedinteger], num_clients: int) -> Assignment:
    """The assignment in which example e belongs to client_of[e]."""
    indices = np.argsort(client_of, kind="stable").astype(np.int64)
    offsets = np.zeros(num_clients + 1, np.int64)
    np.cumsum(np.bincount(client_of, minlength=num_clients), out=offsets[1:])
    return Assignment(indices, offsets)


def limited(assignment: Assignment, limit: int, seed: int) -> Assignment:
    """At most `limit` examples of every client, in ascending order; those under a lower limit are among them."""
    parts = []
    for client, mine in enumerate(np.split(assignment.indices, assignment.offsets[1:-1])):
        chosen = generator(seed, "partition:max_examples", client).permutation(len(mine))[:limit]
        parts.append(mine[np.sort(chosen)])
    offsets = np.concatenate([[0], np.cumsum([len(part) for part in parts])]).astype(np.int64)
    return Assignment(np.concatenate(parts), offsets)


def check_size(num_examples: int, options: Clients) -> None:
    """UserError where the examples cannot give every client its minimum."""
    if num_examples < options.num_clients:
        raise UserError(
            f"partition.num_clients: {options.num_clients} clients, but only {num_examples} training "
            f"examples; use at most {num_examples} clients, or partition.name virtual"
        )
    if num_examples < options.num_clients * options.min_examples:
        raise UserError(
            f"partition.min_examples: {options.min_examples} for each of {options.num_clients} clients needs "
            f"{options.num_clients * options.min_examples} training examples, there are {num_examples}; "
            f"use at most {num_examples // options.num_clients}, or fewer clients"
        )


def with_minimum(client_of: Int64, order: Int64, options: Clients) -> Assignment:
    """`client_of` changed in as few examples as give every client `min_examples` (check_size has passed).

    The largest clients give, each the examples of its own that come last in `order`, a permutation of all.
    """
    sizes = np.bincount(client_of, minlength=options.num_clients)
    wanted = raised(sizes, options.min_examples)
    if (wanted != sizes).any():
        position = np.empty_like(order)
        position[order] = np.arange(len(order))
        by_client = np.lexsort((position, client_of))
        starts = np.cumsum(sizes) - sizes
        rank = np.arange(len(order)) - np.repeat(starts, sizes)  # of an example among those of its client
        given = by_client[rank >= np.repeat(wanted, sizes)]
        client_of = client_of.copy()
        client_of[given] = np.repeat(np.arange(options.num_clients), np.maximum(wanted - sizes, 0))
    return grouped(client_of, options.num_clients)


def raised(sizes: Int64, minimum: int) -> Int64:
    """Sizes with the same sum, none below `minimum`; the rest is cut from the largest, to one level."""
    missing = int(np.maximum(minimum - sizes, 0).sum())
    if missing == 0:
        return sizes
    low, high = minimum, int(sizes.max())
    while low < high:  # the highest level above which enough lies
        level = (low + high + 1) // 2
        if int(np.maximum(sizes - level, 0).sum()) >= missing:
            low = level
        else:
            high = level - 1
    result = np.clip(sizes, minimum, low)
    spare = int(np.maximum(sizes - low, 0).sum()) - missing
    result[np.flatnonzero(sizes > low)[:spare]] += 1
    return result
