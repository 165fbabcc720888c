"""The ensemble: the weighted mean of what the clients hold likely at each position of the public set.

Probabilities travel in 16 bits, so each is a whole multiple of 2^-24, and the weighted sum over the clients

    P(s, v) = sum_i n_i c_i(s) p_i(s, v) / sum_i n_i c_i(s)

is a sum of integers: exact in any order, hence the same on any number of ranks. n_i is 1 or the client's number of
examples; c_i(s) is 1, or how confident the client is at position s, in steps of 2^-14. With c_i = 1 this is the mean of
FedDF's teachers as probabilities (Lin et al. 2020, arXiv 2006.07242) and FedMD's consensus (Li and Wang 2019, arXiv
1910.03581, algorithm 1); with c_i = exp(-entropy) models that waver count less.

The positions are divided over the ranks, a chunk at a time: every rank gets the records of all clients for its share,
sums them and sends the k largest classes to rank 0. So no rank ever holds what the cohort sent, and the memory of a
chunk does not grow with the cohort.
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

_PROBABILITY_STEPS = 2**24  # of the smallest number in 16 bits
_CONFIDENCE_STEPS = 2**14
_ENTRIES = 2**20  # of all clients that a rank sums at once
MOST_EXAMPLES = 2**24  # of a cohort, so that the sums stay below 2^63


def mean(records: Knowledge, weights: Int64, k: int) -> Knowledge:
    """The weighted mean of C clients at S positions, its k likeliest classes. records (C, S, ...), weights (C,).

    All zeros at a position that no client knows anything of.
    """
    clients, positions, width = records.index.shape
    counts = np.broadcast_to(weights[:, None], (clients, positions))
    if records.confidence is not None:
        steps = np.rint(records.confidence.astype(np.float64) * _CONFIDENCE_STEPS).astype(np.int64)
        # One who is hardly confident counts little, one who knows nothing not at all.
        counts = counts * np.where(records.confidence > 0, np.maximum(steps, 1), 0)
    units = np.rint(records.probability.astype(np.float64) * _PROBABILITY_STEPS).astype(np.int64)
    index, sums = largest_sums(
        positions,
        k,
        np.broadcast_to(np.arange(positions)[:, None], (clients, positions, width)).ravel(),
        records.index.astype(np.int64).ravel(),
        (counts[..., None] * units).ravel(),
    )
    whole = np.maximum(counts.sum(axis=0), 1)[:, None] * float(_PROBABILITY_STEPS)
    return Knowledge(index, (sums / whole).astype(np.float16))


def exchange(
    transport: Transport,
    slots: np.ndarray,
    records: Tensor,
    owners: np.ndarray,
    weights: Int64,
    format_: Format,
    k: int,
) -> Knowledge | None:
    """`mean` of the clients of all ranks: on rank 0, None elsewhere. Collective.

    records: uint8 (c, S, record_bytes) of this rank's clients, whose positions in the cohort are `slots`. owners: the
    rank of each client in cohort order; weights (C,) likewise; the same on every rank.
    """
    out = Format(format_.classes, k, weighted=False)
    total = combine_shards(
        transport,
        slots,
        records,
        owners,
        max(1, _ENTRIES // (len(owners) * format_.k)) * transport.world_size,
        lambda arrived: out.pack(mean(format_.unpack(arrived), weights, k)),
        torch.empty(0, out.record_bytes, dtype=torch.uint8),
    )
    return None if total is None else out.unpack(total)
