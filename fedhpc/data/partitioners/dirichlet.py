"""Clients with skewed labels: the examples of every class are divided in proportions drawn from Dir(alpha).

Hsu, Qi and Brown 2019, "Measuring the Effects of Non-Identical Data Distribution for Federated Visual
Classification", arXiv 1909.06335, draw a mix of classes for each client, all of one size. Here the
draw is a mix of clients for each class c, p_c ~ Dir_N(alpha), as in Yurochkin et al. 2019, "Bayesian
Nonparametric Federated Learning of Neural Networks", arXiv 1905.12022: sizes are skewed too. A small alpha
gives few classes per client.
"""

from __future__ import annotations

import numpy as np
from pydantic import Field

from fedhpc.data.partitioners.base import Assignment, Clients, Int64, Partitioner, Rows, check_size, given, with_minimum
from fedhpc.rng import generator


class Dirichlet(Partitioner):
    """Divides every class of examples unevenly, so that clients differ in labels and in size."""

    class Options(Clients):
        alpha: float = Field(0.5, gt=0, description="concentration; small: few classes per client, large: even")

    needs_labels = True

    def partition(self, rows: Rows) -> Assignment:
        """Clients left below the minimum get examples of the largest ones; nothing is drawn again."""
        options, seed, num_examples, labels = self.options, self.seed, len(rows), given(rows.labels)
        check_size(num_examples, options)
        order = generator(seed, "partition:dirichlet").permutation(num_examples)
        by_class = order[np.argsort(labels[order], kind="stable")]
        client_of: Int64 = np.empty(num_examples, np.int64)
        start = 0
        for label, count in enumerate(np.bincount(labels)):
            share = generator(seed, "partition:dirichlet:class", label).dirichlet(
                np.full(options.num_clients, options.alpha)
            )
            ends = np.rint(np.cumsum(share) * count).astype(np.int64)
            ends[-1] = count
            members = by_class[start : start + count]
            client_of[members] = np.searchsorted(ends, np.arange(count), side="right")
            start += count
        return with_minimum(client_of, order, options)
