"""A population of any size: a client's examples are drawn from all the data when it is sampled.

Clients may overlap. The draw is a counter hash (Philox) of (seed, client): Salmon et al. 2011, "Parallel
Random Numbers: As Easy as 1, 2, 3". A client costs nothing until it is asked for.
"""

from __future__ import annotations

from pydantic import Field

from fedhpc.data.partitioners.base import Int64
from fedhpc.errors import UserError
from fedhpc.registry import Section
from fedhpc.rng import generator


class Options(Section):
    num_clients: int = Field(20, ge=1, lt=2**31, description="number of clients (N)")
    examples_per_client: int = Field(32, ge=1, description="training examples of every client")


def draw(num_examples: int, options: Options, seed: int, client: int) -> Int64:
    """int64[examples_per_client], ascending, without repeats within the client."""
    if options.examples_per_client > num_examples:
        raise UserError(
            f"partition.examples_per_client: {options.examples_per_client}, but there are only "
            f"{num_examples} training examples; use at most {num_examples}"
        )
    chosen: Int64 = generator(seed, "partition:virtual", client).choice(
        num_examples, options.examples_per_client, replace=False, shuffle=False
    )
    chosen.sort()
    return chosen
