"""Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943, section 3) spends its budget on good candidates.

A generation of candidates lasts several rounds, its rungs. In rung r the best population / eta^r of them are scored on
examples * eta^r rows of every client of the round's cohort, so all rungs cost about the same: 16 candidates with eta 2
and 8 examples make rungs of 16, 8, 4, ... candidates on 8, 16, 32, ... rows.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Rung:
    """One round of a generation: how many candidates are scored on how many rows."""

    number: int  # from 0
    size: int  # how many candidates are scored
    examples: int  # on how many rows of each client
    last: bool


def rungs(population: int, survivors: int, eta: int, examples: int) -> list[Rung]:
    """The rungs of a generation, down to the last one with at least `survivors` candidates."""
    sizes = [population]
    while sizes[-1] // eta >= survivors:
        sizes.append(sizes[-1] // eta)
    return [Rung(r, size, examples * eta**r, r == len(sizes) - 1) for r, size in enumerate(sizes)]
