"""The population says which training examples each client holds, and which of them it keeps for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from fedhpc import config, registry
from fedhpc.data.partitioners.base import Assignment, Draws, Int64, Partitioner, limited
from fedhpc.data.tokens import Examples
from fedhpc.errors import UserError
from fedhpc.rng import generator

_SHOWN = 10  # clients, and at most as many labels, in the table of `--check`


@dataclass(frozen=True)
class Population:
    """N clients and the training examples that each of them holds, given as indices.

    Either all are assigned (`assignment`), or the population is virtual and a client's are drawn when they are asked
    for (`draw`).
    """

    num_clients: int
    seed: int
    held_out_fraction: float  # share of each client's examples that is kept for evaluation
    assignment: Assignment | None = None
    draw: Callable[[int], Int64] | None = None
    draw_many: Callable[[Sequence[int]], list[Int64]] | None = None  # `draw` of several clients, where that is faster
    drawn: int = 0  # how many examples every client of a virtual population has
    names: list[str] | None = None  # of the clients of a natural partition: the owners of the data

    @classmethod
    def divided(cls, settings: config.Config, train: Examples) -> Population:
        """Divide the training data among clients as the section `partition` says; UserError where that fails."""
        options, seed = settings.partition, settings.run.seed
        fraction = settings.evaluation.client_fraction
        partitioner: Partitioner = registry.choice("partitioners", options.name, "partition.name")(options, seed)
        made = partitioner.partition(train)
        if isinstance(made, Draws):
            return cls(made.num_clients, seed, fraction, draw=made.draw, draw_many=made.draw_many, drawn=made.size)
        _check(made, len(train), options.name)
        limit = getattr(options, "max_examples", None)
        assignment = made if limit is None else limited(made, limit, seed)
        names = partitioner.client_names(train)
        return cls(len(assignment.offsets) - 1, seed, fraction, assignment, names=names)

    @classmethod
    def single(cls, settings: config.Config, train: Examples) -> Population:
        """A population of one client that holds all training data, for mode centralized."""
        everything = Assignment(np.arange(len(train)), np.array([0, len(train)]))
        return cls(1, settings.run.seed, settings.evaluation.client_fraction, everything)

    def title(self, client: int) -> str:
        """What a client is called in a message: "client 3", or "client 3 (Blue Spice)" where clients have names."""
        return f"client {client}" + (f" ({self.names[client]})" if self.names else "")

    def indices(self, client: int) -> Int64:
        """The examples that a client trains on, ascending: all of its own but those held out."""
        return self._split(client, self._all(client))[0]

    def indices_of(self, clients: Sequence[int]) -> list[Int64]:
        """`indices` of each of the clients; faster than one by one."""
        if self.draw_many is None:
            return [self.indices(client) for client in clients]
        each = zip(clients, self.draw_many(clients), strict=True)
        return [self._split(client, everything)[0] for client, everything in each]

    def held_out(self, client: int) -> Int64:
        """The client's examples that only evaluate it (`evaluation.client_fraction`), ascending."""
        return self._split(client, self._all(client))[1]

    def num_examples(self, client: int) -> int:
        """How many examples a client trains on; held-out ones do not count."""
        size = self.drawn if self.draw is not None else len(self._all(client))
        return size - int(self._num_held_out(np.array(size))) if self.held_out_fraction else size

    def num_examples_of(self, clients: Sequence[int]) -> Int64:
        """`num_examples` of each of the clients, int64 (len(clients),)."""
        if self.draw is not None:
            sizes = np.full(len(clients), self.drawn)
        else:
            offsets, chosen = self._materialised().offsets, np.array(clients, dtype=np.int64)
            sizes = offsets[chosen + 1] - offsets[chosen]
        return sizes - self._num_held_out(sizes)

    def sizes(self) -> Int64:
        """How many examples each client trains on, int64[N]. ValueError for a virtual population."""
        sizes = np.diff(self._materialised().offsets)
        return sizes - self._num_held_out(sizes)

    def label_counts(self, examples: Examples) -> Int64:
        """How many examples of each label each client holds, held-out ones too, int64[N, C].

        ValueError for a virtual population, or for examples without labels.
        """
        if examples.labels is None:
            raise ValueError("these examples have no labels")
        indices, offsets = self._materialised()
        classes = len(examples.label_names)
        clients = np.repeat(np.arange(self.num_clients), np.diff(offsets))
        cells = np.bincount(clients * classes + examples.labels[indices], minlength=self.num_clients * classes)
        return cells.reshape(self.num_clients, classes)

    def _materialised(self) -> Assignment:
        if self.assignment is None:
            raise ValueError("a virtual population has no per-client arrays")
        return self.assignment

    def _all(self, client: int) -> Int64:
        if not 0 <= client < self.num_clients:
            raise IndexError(f"client {client} of {self.num_clients}")
        if self.draw is not None:
            return self.draw(client)
        indices, offsets = self._materialised()
        return indices[offsets[client] : offsets[client + 1]]

    def _num_held_out(self, sizes: Int64) -> Int64:
        """At least one of every client that has two, and never all."""
        if self.held_out_fraction == 0:
            return np.zeros_like(sizes)
        wanted = np.rint(sizes * self.held_out_fraction).astype(np.int64)
        count: Int64 = np.minimum(np.maximum(wanted, 1), np.maximum(sizes - 1, 0))
        return count

    def _split(self, client: int, indices: Int64) -> tuple[Int64, Int64]:
        if not self.held_out_fraction:
            return indices, indices[:0]
        count = int(self._num_held_out(np.array(len(indices))))
        held_out = np.zeros(len(indices), bool)
        if count:
            order = generator(self.seed, "held_out", client).permutation(len(indices))
            held_out[order[:count]] = True
        return indices[~held_out], indices[held_out]


def describe(population: Population, train: Examples) -> list[str]:
    """The lines of `--check` about clients: how many, how large, and the labels of the first ones."""
    if population.assignment is None:
        return [
            f"clients: {population.num_clients} (virtual), {population.num_examples(0)} examples each, "
            f"drawn from {len(train)}"
        ]
    sizes = population.sizes()
    lines = [
        f"clients: {population.num_clients}",
        f"training examples per client: min {sizes.min()}, median {np.median(sizes):g}, max {sizes.max()}",
    ]
    empty = int((sizes == 0).sum())
    if empty:
        lines.append(f"clients without data: {empty}, rejected when sampled")
    if train.labels is None or len(train.label_names) > _SHOWN:
        return lines
    counts = population.label_counts(train)
    shown = list(range(min(population.num_clients, _SHOWN)))
    heading = ["client", *(name or "(empty)" for name in train.label_names)]
    rows = [
        [population.names[client] if population.names else str(client), *map(str, counts[client])] for client in shown
    ]
    widths = [max(len(row[column]) for row in [heading, *rows]) for column in range(len(heading))]
    for row in [heading, *rows]:
        lines.append("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    if population.num_clients > _SHOWN:
        lines.append(f"and {population.num_clients - _SHOWN} more clients")
    return lines


def _check(made: Assignment, num_examples: int, name: str) -> None:
    """UserError where a partitioner, which may be a plugin, did not give every example to exactly one client."""
    problem = ""
    if not isinstance(made, Assignment):
        problem = f"gave {type(made).__name__} instead of an Assignment"
    elif len(made.offsets) < 2 or made.offsets[0] != 0 or made.offsets[-1] != len(made.indices):
        problem = "gave offsets that do not go from 0 to the number of its indices"
    elif (np.diff(made.offsets) < 0).any():
        problem = "gave offsets that are not ascending"
    elif not np.array_equal(np.sort(made.indices), np.arange(num_examples)):
        problem = f"did not give each of the {num_examples} training examples to exactly one client"
    if problem:
        raise UserError(f"{name} {problem}", key="partition.name")
