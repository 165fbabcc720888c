"""Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943, section 3): the budget goes to the promising.

A generation of candidates lasts some rounds, its rungs. In rung r the best population / eta^r of them are scored on
examples * eta^r rows of every client of the round's cohort, so every rung costs about as much as the first.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """One round of a generation."""

    number: int  # from 0
    size: int  # candidates that are scored
    examples: int  # rows of each client that they are scored on
    last: bool


def rungs(population: int, survivors: int, eta: int, examples: int) -> list[Rung]:
    """The rounds of a generation: down to the fewest that are not below `survivors`."""
    sizes = [population]
    while sizes[-1] // eta >= survivors:
        sizes.append(sizes[-1] // eta)
    return [Rung(r, size, examples * eta**r, r == len(sizes) - 1) for r, size in enumerate(sizes)]
