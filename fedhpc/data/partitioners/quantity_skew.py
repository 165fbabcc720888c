"""Clients of uneven size with alike labels: sizes in proportions drawn from Dir_N(alpha), examples at random.

Li, Diao, Chen and He 2021, "Federated Learning on Non-IID Data Silos: An Experimental Study",
arXiv 2102.02079 (quantity skew).
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedhpc.data.partitioners.base import Assignment, Clients, Int64, Partitioner, Rows, check_size, with_minimum
from fedhpc.rng import generator


class QuantitySkew(Partitioner):
    """Gives clients alike examples, but very different numbers of them."""

    class Options(Clients):
        alpha: float = Field(0.5, gt=0, description="concentration; small: few large clients, large: even sizes")

    def partition(self, rows: Rows) -> Assignment:
        """Clients left below the minimum get examples of the largest ones; nothing is drawn again."""
        options, num_examples = self.options, len(rows)
        check_size(num_examples, options)
        rng = generator(self.seed, "partition:quantity_skew")
        share = rng.dirichlet(np.full(options.num_clients, options.alpha))
        order = rng.permutation(num_examples)
        ends = np.rint(np.cumsum(share) * num_examples).astype(np.int64)
        ends[-1] = num_examples
        client_of: Int64 = np.empty(num_examples, np.int64)
        client_of[order] = np.searchsorted(ends, np.arange(num_examples), side="right")
        return with_minimum(client_of, order, options)
