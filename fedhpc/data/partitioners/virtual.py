"""A population of any size: a client's examples are drawn from all the data when it is sampled.

Clients may overlap. The draw is a counter hash (Philox) of (seed, client): Salmon et al. 2011, "Parallel
Random Numbers: As Easy as 1, 2, 3". A client costs nothing until it is asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field

from fedhpc.data.partitioners.base import Draws, Int64, Partitioner, Rows
from fedhpc.errors import UserError
from fedhpc.registry import Section
from fedhpc.rng import generators


class Virtual(Partitioner):
    """Draws the examples of a client when it is sampled, from a population of any size."""

    class Options(Section):
        num_clients: int = Field(20, ge=1, lt=2**31, description="number of clients (N)")
        examples_per_client: int = Field(32, ge=1, description="training examples of every client")

    def partition(self, rows: Rows) -> Draws:
        """`examples_per_client` examples of each client, without repeats within a client."""
        size, num_examples = self.options.examples_per_client, len(rows)
        if size > num_examples:
            raise UserError(
                f"partition.examples_per_client: {size}, but there are only {num_examples} training examples; "
                f"use at most {num_examples}"
            )

        def draw_many(clients: Sequence[int]) -> list[Int64]:
            drawn = []
            for rng in generators(self.seed, "partition:virtual", clients):
                chosen: Int64 = rng.choice(num_examples, size, replace=False, shuffle=False)
                chosen.sort()
                drawn.append(chosen)
            return drawn

        return Draws(self.options.num_clients, size, lambda client: draw_many([client])[0], draw_many)
