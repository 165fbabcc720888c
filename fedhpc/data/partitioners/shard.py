"""Clients with few labels: examples sorted by label, cut into shards, a fixed number of shards per client.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
arXiv 1602.05629, section 3 (pathological non-IID, two shards per client).
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedhpc.data.partitioners.base import Assignment, Clients, Int64, Partitioner, Rows, check_size, given, with_minimum
from fedhpc.errors import UserError
from fedhpc.rng import generator


class Shard(Partitioner):
    """Gives every client pieces of the data sorted by label, so that it has few labels."""

    class Options(Clients):
        shards_per_client: int = Field(2, ge=1, description="pieces of the label-sorted data per client")

    needs_labels = True

    def partition(self, rows: Rows) -> Assignment:
        """Shards differ in size by at most one; examples of one label are sorted at random."""
        options, num_examples, labels = self.options, len(rows), given(rows.labels)
        check_size(num_examples, options)
        shards = options.num_clients * options.shards_per_client
        if shards > num_examples:
            raise UserError(
                f"partition.shards_per_client: {options.shards_per_client} shards for each of "
                f"{options.num_clients} clients need {shards} training examples, there are {num_examples}; "
                "use fewer shards or clients"
            )
        rng = generator(self.seed, "partition:shard")
        order = rng.permutation(num_examples)
        by_label = order[np.argsort(labels[order], kind="stable")]
        holder = rng.permutation(shards) // options.shards_per_client
        client_of: Int64 = np.empty(num_examples, np.int64)
        client_of[by_label] = holder[np.arange(num_examples) * shards // num_examples]
        return with_minimum(client_of, order, options)
