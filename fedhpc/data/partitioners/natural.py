"""One client per owner: the value of the column `data.client`.

Caldas et al. 2018, "LEAF: A Benchmark for Federated Settings", arXiv 1812.01097, section 2.
"""

from __future__ import annotations

from pydantic import Field

from fedhpc.data.partitioners.base import Assignment, Int32, Limited, grouped
from fedhpc.errors import UserError


class Options(Limited):
    min_examples: int = Field(0, ge=0, description="owners with fewer examples are left out, data and all")


def partition(num_examples: int, labels: Int32 | None, owners: Int32 | None, options: Options, seed: int) -> Assignment:
    """Client i is owner i, up to the last owner that has an example.

    Owners below `min_examples` are gone before this: fedhpc.data leaves their rows out when it reads them.
    """
    if owners is None or num_examples == 0:
        raise UserError("partition.name natural needs data.client (the column that names the owner)")
    return grouped(owners, int(owners.max()) + 1)
