"""The ensemble of clients: the weighted mean of their predicted probabilities at each position of the public set.

Probabilities are sent in 16 bits, so each is an integer multiple of 2^-24, and the weighted sum over the clients

    P(s, v) = sum_i n_i c_i(s) p_i(s, v) / sum_i n_i c_i(s)

is a sum of integers: exact in any order, hence the same on any number of ranks. n_i is 1 or the client's number of
examples; c_i(s) is 1, or how confident the client is at position s, in steps of 2^-14. With c_i = 1 this is the mean of
FedDF's teachers as probabilities (Lin et al. 2020, arXiv 2006.07242) and FedMD's consensus (Li and Wang 2019, arXiv
1910.03581, algorithm 1); with c_i = exp(-entropy), uncertain models count less.

The positions are divided among the ranks, a chunk at a time: every rank gets the records of all clients for its share,
sums them and sends the k largest classes to rank 0. So no rank ever holds all that the cohort sent, and the memory of
a chunk does not grow with the cohort.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fedhpc.approaches.distillation.knowledge import Format, Int64, Knowledge, largest_sums
from fedhpc.lazy import lazy
from fedhpc.ranks.collectives import combine_shards
from fedhpc.ranks.transport.base import Transport

if TYPE_CHECKING:
    import torch
    from torch import Tensor
else:
    torch = lazy("torch")

_PROBABILITY_STEPS = 2**24  # 2^-24 is the smallest positive number in 16 bits
_CONFIDENCE_STEPS = 2**14
_ENTRIES = 2**20  # how many probabilities of all clients a rank sums at once
MOST_EXAMPLES = 2**24  # in a cohort, so that sums stay below 2^63


def mean(records: Knowledge, weights: Int64, k: int) -> Knowledge:
    """The weighted mean of C clients' knowledge at S positions, of which the k likeliest classes are kept.

    records: (C, S, ...). weights: (C,). All probabilities are 0 at a position about which no client knows anything.
    """
    clients, positions, width = records.index.shape
    counts = np.broadcast_to(weights[:, None], (clients, positions))
    if records.confidence is not None:
        steps = np.rint(records.confidence.astype(np.float64) * _CONFIDENCE_STEPS).astype(np.int64)
        # Hardly any confidence counts little but not nothing; only a confidence of exactly 0 counts nothing.
        counts = counts * np.where(records.confidence > 0, np.maximum(steps, 1), 0)
    units = np.rint(records.probability.astype(np.float64) * _PROBABILITY_STEPS).astype(np.int64)
    index, sums = largest_sums(
        positions,
        k,
        np.broadcast_to(np.arange(positions)[:, None], (clients, positions, width)).ravel(),
        records.index.astype(np.int64).ravel(),
        (counts[..., None] * units).ravel(),
    )
    total = np.maximum(counts.sum(axis=0), 1)[:, None] * float(_PROBABILITY_STEPS)
    return Knowledge(index, (sums / total).astype(np.float16))


def exchange(
    transport: Transport,
    indices: np.ndarray,
    records: Tensor,
    owners: np.ndarray,
    weights: Int64,
    format_: Format,
    k: int,
) -> Knowledge | None:
    """The `mean` over the clients of all ranks, on rank 0; None on the others. Collective.

    records: those of this rank's clients, uint8 (c, S, record_bytes). indices: their indices in the cohort. owners: the
    rank of each client of the cohort; weights (C,) likewise. Both are the same on every rank.
    """
    out = Format(format_.classes, k, weighted=False)
    total = combine_shards(
        transport,
        indices,
        records,
        owners,
        max(1, _ENTRIES // (len(owners) * format_.k)) * transport.world_size,
        lambda arrived: out.pack(mean(format_.unpack(arrived), weights, k)),
        torch.empty(0, out.record_bytes, dtype=torch.uint8),
    )
    return None if total is None else out.unpack(total)
