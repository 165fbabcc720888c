"""Independent and identically distributed clients: a seeded shuffle dealt out evenly.

McMahan et al. 2017, "Communication-Efficient Learning of Deep Networks from Decentralized Data",
arXiv 1602.05629, section 3 (IID).
"""

from __future__ import annotations

import numpy as np

from fedhpc.data.partitioners.base import Assignment, Clients, Int32, Int64, check_size, grouped
from fedhpc.rng import generator


class Options(Clients):
    pass


def partition(num_examples: int, labels: Int32 | None, owners: Int32 | None, options: Options, seed: int) -> Assignment:
    """Sizes that differ by at most one."""
    check_size(num_examples, options)
    client_of: Int64 = np.empty(num_examples, np.int64)
    order = generator(seed, "partition:iid").permutation(num_examples)
    client_of[order] = np.arange(num_examples) * options.num_clients // num_examples
    return grouped(client_of, options.num_clients)
