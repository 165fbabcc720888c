"""One client per owner: the value of the column `data.client`.

Caldas et al. 2018, "LEAF: A Benchmark for Federated Settings", arXiv 1812.01097, section 2.
"""

from __future__ import annotations

from pydantic import Field

from fedhpc.data.partitioners.base import Assignment, Limited, Partitioner, Rows, given, grouped
from fedhpc.errors import UserError


class Natural(Partitioner):
    """Makes one client of each owner that the data names."""

    class Options(Limited):
        min_examples: int = Field(0, ge=0, description="owners with fewer examples are left out, data and all")

    needs_owners = True

    def partition(self, rows: Rows) -> Assignment:
        """Client i is owner i; an owner may have no example.

        Owners below `min_examples` are gone before this: fedhpc.data leaves their rows out when it reads them.
        """
        if not len(rows):
            raise UserError("data.train: there is no training example left")
        return grouped(given(rows.owners), len(rows.owner_names))

    def client_names(self, rows: Rows) -> list[str]:
        return rows.owner_names
