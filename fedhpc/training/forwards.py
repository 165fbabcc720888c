"""The rows of one local step of a block, sorted by length and cut into the forward passes that cost least."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from fedhpc.data.tokens import Examples
from fedhpc.lazy import Tensor, kernels, torch
from fedhpc.models.base import Base, Batch
from fedhpc.objectives.base import Objective
from fedhpc.rng import bits

# What one more forward costs, in padded tokens: where the rows of a step are cut into several.
_FORWARD_COST_TOKENS = {"cpu": 160, "cuda": 4096}


@dataclass(frozen=True)
class Forward:
    """One forward pass: some rows of a step, B of them."""

    batch: Batch
    clients: Tensor  # int64 (B,): the client of each row, by its index in the block
    row_keys: Tensor  # int64 (B,): the key of each row's random draws
    row_weights: Tensor  # (B,): one over the supervised tokens of its client's step, or of its example
    examples: Tensor  # int64 (B,): the example of each row, by its index among the E of the forward
    owners: Tensor  # int64 (E,): the client of each example
    counts: bool = True  # False: there were too few rows for this rank to have one, which goes along with weight 0


@dataclass(frozen=True)
class Step:
    """One local step of the clients that take it: the first k of the block."""

    number: int  # from 0
    tokens: np.ndarray  # int64 (k,): supervised tokens of each client
    divisors: Tensor  # int64 (k,): the same on the device, at least 1
    forwards: Sequence[Forward]


def make_step(
    base: Base,
    objective: Objective,
    examples: Examples,
    rows: Sequence[np.ndarray],
    number: int,
    client_keys: Tensor,
    dtype: torch.dtype,
    at_once: int,
    packing: bool = False,
    by_example: bool = False,
    among: tuple[int, int] = (0, 1),
) -> Step:
    """Put the rows of a step on the device, as forward passes.

    rows: the examples of each of the k clients. client_keys: int64 (K,), a key of random draws for each client of the
    block. dtype: of the weights. at_once: how many examples of each client a forward has at most, on average.
    packing: several examples of a client may share a row. by_example: the loss of every example counts as much, however
    many tokens it has. among: which of how many ranks this one is, which take the rows of every forward in turn; each
    has as many forwards.
    """
    all_rows = np.concatenate(rows)
    owners = np.repeat(np.arange(len(rows)), [len(of_client) for of_client in rows])  # int64 (B,)
    within = np.concatenate([np.arange(len(of_client)) for of_client in rows])  # index in its client's step
    supervised = objective.num_supervised(examples, all_rows)
    tokens = np.bincount(owners, weights=supervised, minlength=len(rows)).astype(np.int64)
    divisors = np.maximum(tokens, 1)
    divisors_on_device = kernels.on_device(divisors, base.device)
    lengths = examples.lengths_of(all_rows)
    by_length = np.argsort(lengths, kind="stable")
    # A contrastive loss compares the rows of a batch with each other, so they stay together.
    cost = _FORWARD_COST_TOKENS[base.device.type]
    # Packed rows are all as long as the longest example.
    together = objective.needs_full_steps or packing
    member, ranks = among
    cuts = [0, len(all_rows)] if together else cut_by_length(lengths[by_length], cost * ranks)
    cuts = cut_further(cuts, at_once * len(rows) * ranks)
    forwards = []
    for begin, end in pairwise(cuts):
        counts = member < end - begin
        chosen = by_length[begin + member if counts else begin : end : ranks]
        make = objective.packed if packing else objective.batch
        batch = make(base, examples, all_rows[chosen], owners[chosen])
        owners_of_rows, within_step = batch.per_row(owners[chosen]), batch.per_row(within[chosen])
        clients = kernels.on_device(owners_of_rows, base.device)
        # A row's draws follow from its client, the step and its example's index in the client's step alone.
        counters = kernels.on_device(within_step + (number << 32), base.device)
        row_keys = bits(client_keys.index_select(0, clients), counters)
        of_rows = batch.per_row(np.maximum(supervised[chosen], 1)) if by_example else divisors[owners_of_rows]
        weights = kernels.on_device(counts / of_rows, base.device, dtype)
        if batch.example is None:
            examples_of_rows, owners_of_examples = torch.arange(len(clients), device=base.device), clients
        else:
            examples_of_rows = kernels.on_device(batch.example, base.device)
            owners_of_examples = kernels.on_device(owners[chosen], base.device)
        forwards.append(Forward(batch, clients, row_keys, weights, examples_of_rows, owners_of_examples, counts))
    return Step(number, tokens, divisors_on_device, forwards)


def cut_by_length(lengths: np.ndarray, forward_cost: int) -> list[int]:
    """Where to cut ascending `lengths` (B,) into forwards so that padded tokens plus forward_cost each are fewest.

    Returns the bounds, 0 and B included. Dynamic programming over the last cut.
    """
    # Between rows of one length there is never a cut.
    different, starts = np.unique(lengths, return_index=True)
    bounds = np.append(starts, len(lengths))
    best = np.zeros(len(bounds))
    came_from = np.zeros(len(bounds), dtype=np.int64)
    for end in range(1, len(bounds)):
        costs = best[:end] + (bounds[end] - bounds[:end]) * different[end - 1] + forward_cost
        came_from[end] = int(np.argmin(costs))
        best[end] = costs[came_from[end]]
    cuts = [len(bounds) - 1]
    while cuts[-1] > 0:
        cuts.append(int(came_from[cuts[-1]]))
    return bounds[cuts[::-1]].tolist()


def cut_further(bounds: Sequence[int], most: int) -> list[int]:
    """Bounds between which there are at most `most` rows: longer pieces are cut into equal ones."""
    further = [0]
    for begin, end in pairwise(bounds):
        parts = math.ceil((end - begin) / most)
        further += [begin + (end - begin) * part // parts for part in range(1, parts + 1)]
    return further
