"""Independent and identically distributed clients: a seeded shuffle dealt out evenly.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
arXiv 1602.05629, section 3 (IID).
"""

from __future__ import annotations

import numpy as np

from fedhpc.data.partitioners.base import Assignment, Int64, Partitioner, Rows, check_size, grouped
from fedhpc.rng import generator


class IID(Partitioner):
    """Deals the examples out evenly, in random order."""

    def partition(self, rows: Rows) -> Assignment:
        """Sizes that differ by at most one."""
        check_size(len(rows), self.options)
        client_of: Int64 = np.empty(len(rows), np.int64)
        order = generator(self.seed, "partition:iid").permutation(len(rows))
        client_of[order] = np.arange(len(rows)) * self.options.num_clients // len(rows)
        return grouped(client_of, self.options.num_clients)
