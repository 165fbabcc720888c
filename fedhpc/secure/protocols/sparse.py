"""Every client shares masks with k others of the cohort (SecAgg+, Bell et al. 2020, doi 10.1145/3372297.3417885).

The graph is a Harary graph whose corners are dealt out at random in every round (their section 3.2): the clients stand
in a ring, in random order, and the neighbours of one are the k/2 on either side. So what a client computes and sends
grows with k, which needs to grow with the logarithm of the cohort alone.
"""

from __future__ import annotations

import math

import numpy as np
from pydantic import Field

from fedhpc.errors import UserError
from fedhpc.registry import Section
from fedhpc.secure.protocols.base import Protocol, two_thirds

# What `enough_neighbours` guards against, and how surely.
CORRUPT, DROPPING = 0.2, 0.05  # shares of the clients that tell the server all they know, and that drop out
_PRIVACY_BITS, _SUCCESS_BITS = 40, 30  # it fails with a probability of at most 2^-40, or 2^-30


class Sparse(Protocol):
    """A random ring: every client knows its k nearest."""

    class Options(Section):
        neighbours: int | None = Field(
            None, ge=2, multiple_of=2,
            description="clients that each one shares masks with, k; default as many as its paper's bounds ask for",
        )  # fmt: skip
        threshold: int | None = Field(
            None, ge=2, description="clients that can recover a mask; default two thirds of the k + 1, and one more"
        )

    def graph(self, count: int, generator: np.random.Generator) -> list[list[int]]:
        degree = self.degree(count)
        if degree >= count - 1:
            return [[other for other in range(count) if other != client] for client in range(count)]
        ring = generator.permutation(count)
        steps = [step for step in range(-(degree // 2), degree // 2 + 1) if step]
        near = {int(ring[at]): sorted(int(ring[(at + step) % count]) for step in steps) for at in range(count)}
        return [near[client] for client in range(count)]

    def threshold(self, holders: int) -> int:
        return two_thirds(holders) if self.options.threshold is None else int(self.options.threshold)

    def require(self, sampled: int, awaited: int) -> None:
        if self.degree(sampled) >= sampled:
            raise UserError(
                f"secure.neighbours is {self.degree(sampled)}, but a client of a cohort of {sampled} has {sampled - 1} "
                "others", key="secure.neighbours", remedy=f"give at most {2 * ((sampled - 1) // 2)}",
            )  # fmt: skip
        super().require(sampled, awaited)

    def degree(self, count: int) -> int:
        return enough_neighbours(count) if self.options.neighbours is None else int(self.options.neighbours)


def enough_neighbours(count: int) -> int:
    """The smallest even k that keeps the three promises of a random graph, of `count` clients; else all others.

    Of `count` clients a share CORRUPT tells the server what it knows, and a share DROPPING drops out. But for small
    probabilities (Bell et al. 2020, section 3.1) no client has as many corrupt neighbours as can recover its secrets,
    the clients that are neither corrupt nor gone hang together, and no client's holders become too few. A ring of
    which k/2 neighbours each way are joined comes apart only where k/2 in a row are corrupt or gone.
    """
    corrupt, gone = math.ceil(CORRUPT * count), math.ceil(DROPPING * count)
    for k in range(2, count - 1, 2):
        threshold = two_thirds(k + 1)
        caught = count * _at_least(threshold, count - 1, corrupt, k)
        apart = count * (CORRUPT + DROPPING) ** (k // 2)
        lost = count * _at_least(k - threshold + 1, count - 1, gone, k)
        if max(caught, apart) <= 2.0**-_PRIVACY_BITS and lost <= 2.0**-_SUCCESS_BITS:
            return k
    return count - 1


def _at_least(least: int, total: int, marked: int, drawn: int) -> float:
    """The probability that `drawn` of `total` clients have at least `least` of the `marked` ones (hypergeometric)."""

    def log_choose(n: int, k: int) -> float:
        return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)

    among = range(max(least, drawn - (total - marked)), min(marked, drawn) + 1)
    all_ = log_choose(total, drawn)
    return math.fsum(math.exp(log_choose(marked, i) + log_choose(total - marked, drawn - i) - all_) for i in among)
