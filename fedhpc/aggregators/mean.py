"""The weighted mean of the updates (FedAvg, McMahan et al. 2017, arXiv 1602.05629, algorithm 1).

Linear in the updates, so it rides the exact sum-reduce of `fedhpc.aggregation` and needs no code here.
"""

from __future__ import annotations

from fedhpc.registry import Section

LINEAR = True


class Options(Section):
    pass
